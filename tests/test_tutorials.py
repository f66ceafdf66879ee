"""The tutorials run, their saved pages are whole, their exercises can be solved, and every link leads somewhere."""

import importlib
import inspect
import itertools
import operator
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ended, fresh
from PIL import Image, ImageSequence

import tinytwinflow as ttf
from tinytwinflow.data.readers import DEBIAN

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]
PLACE = re.compile(r"/tmp|file:|(?<![\w.)\]}/])/\w\w")  # on some machine; no division and no address on the net
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")  # it brings IPython and the inline pictures

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


QUICK = {"TTF_QUICK": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


def cells_of(path):
    """A notebook's cells one after another, in this process; exit 1 where one fails."""
    import matplotlib
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """There is no window to draw in."""

    os.chdir(path.parent)
    sys.path.insert(0, "")
    matplotlib.use("agg")
    shell = Shell.instance(config=Config(HistoryManager={"enabled": False}), colors="NoColor")
    for number, cell in enumerate(nbformat.read(path, 4).cells):
        if cell.cell_type == "code" and not shell.run_cell(cell.source, store_history=True).success:
            print(f"{path.name}, cell {number}, failed")
            sys.exit(1)


def program(path, *words):
    """A program, in this process: python path words."""
    os.chdir(ROOT)
    sys.argv[:], sys.path[:0] = map(str, (path, *words)), [str(path.parent)]
    runpy.run_path(path, run_name="__main__")


def said_by(said, function, *args):
    """Call a function in a fresh process.  -> its exit status, None if it took too long, and its words"""
    (status,) = ended([fresh(said, QUICK, function, *args)])
    return status, said.read_text()


@notebooks
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    """In its quick setting; the checks of what the text says are cells of it, and fail here if they fail."""
    if path.stem == "06_images" and not Path(DEBIAN["fashion"]).is_dir() and not (ROOT / "data").is_dir():
        pytest.skip("Fashion-MNIST is not on this machine: apt install dataset-fashion-mnist")
    status, words = said_by(tmp_path / "said", cells_of, path)
    assert status == 0, f"{path.name}: exit status {status}\n{words}"
    cells = nbformat.read(path, 4).cells
    assert sum("assert " in cell.source for cell in cells if cell.cell_type == "code") >= 3


def test_a_notebook_that_fails_says_where(tmp_path):
    """Its name, the cell and the traceback; cells see those before them, and nothing of another notebook."""
    code = [
        nbformat.v4.new_code_cell(source) for source in ("a = 1", "%matplotlib inline\na += 1", "assert a == 3", "b")
    ]
    path = tmp_path / "wrong.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# It"), *code]), path)
    status, words = said_by(tmp_path / "said", cells_of, path)
    assert status == 1 and words.endswith("wrong.ipynb, cell 3, failed\n")
    assert "assert a == 3" in words and "AssertionError" in words and "NameError" not in words


@notebooks
def test_a_saved_notebook_is_whole(path):
    """Run once from the first cell to the last, in its full setting, with pictures and no errors, and small."""
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1.5e6
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    words = [cell.source for cell in notebook.cells]
    words += [str(output.get("text", "")) + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not any(PLACE.search(word) for word in words)


def test_pages_print_the_sources_as_they_are():
    """What a page prints of the library's code, `print(inspect.getsource(ttf.gap))`, stands in what was saved."""
    seen = 0
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            shown = "".join(output.get("text", "") for output in cell.get("outputs", []))
            for name in re.findall(r"^print\(inspect\.getsource\(ttf\.([\w.]+)\)\)$", cell.source, re.MULTILINE):
                assert inspect.getsource(operator.attrgetter(name)(ttf)) in shown, f"{path.name}: {name} is another now"
                seen += 1
    assert seen >= 10


def test_the_syllabus_names_every_notebook():
    text = (ROOT / "tutorials" / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in text


def check(answers, tmp_path):
    """What the exercises say to a file of answers.  -> exit status, words"""
    return said_by(tmp_path / f"said-{answers.stem}", program, ROOT / "tutorials" / "exercises.py", answers)


def test_the_answers_are_right(tmp_path):
    status, words = check(ROOT / "tutorials" / "answers.py", tmp_path)
    assert status == 0 and words.count(": right\n") == 9


def test_wrong_answers_are_told_so(tmp_path):
    """Each answer with one thing wrong, a sign, a factor, a term; and a file that has none."""
    answers = (ROOT / "tutorials" / "answers.py").read_text()
    wrong = {
        "return -(x_t +": "return -(x_t -",
        "landed = x_t - (t - s)": "landed = x_t + (t - s)",
        "return velocity(real) - velocity(fake)": "return velocity(fake) - velocity(real)",
        "return (1 - t) ** 2 / t": "return (1 - t) / t",
        "return -(-calls // order)": "return calls",
        "distances = [torch.pdist(features[labels == label]).mean()": "distances = [torch.pdist(features).mean()",
        "base * flow_share, batch * share / 2,": "base * flow_share, batch * share,",
        "return 5 * 4": "return 4 * 4",
        "topk(2, largest=False)[0][:, 1].quantile(0.999)": "topk(2, largest=False)[0][:, 1].quantile(0.99)",
    }
    for old, new in wrong.items():
        assert answers.count(old) == 1, old
        answers = answers.replace(old, new)
    (tmp_path / "mine.py").write_text(answers)
    status, words = check(tmp_path / "mine.py", tmp_path)
    assert status == 1 and ": right" not in words and len(words.splitlines()) == 9
    (tmp_path / "none.py").write_text("")
    status, words = check(tmp_path / "none.py", tmp_path)
    assert status == 1 and words.count("not there") == 9


def test_the_moving_picture_is_made(tmp_path):
    """A frame before the first step, one each so many steps, of which the last stays; in all the fakes move."""
    status, words = said_by(
        tmp_path / "said", program, ROOT / "tutorials" / "walk.py", "--steps", 20, "--out", tmp_path / "a.gif"
    )
    assert status == 0 and re.search(
        r"off data \d+\.\d% in one step, base alone \d+\.\d%, flow matching \d+\.\d% in a hundred", words
    )
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 21
        frames = [np.asarray(frame.convert("L"), float) for frame in ImageSequence.Iterator(film)]
        assert film.info["duration"] > 2000
    assert all(abs(frame - after)[50:, :250].max() > 50 for frame, after in itertools.pairwise(frames))


def pull_between_gaussians():
    """Print where fakes about (-1, 0) are pulled if the data lie about (1, 0)."""
    sys.path.insert(0, str(ROOT / "tutorials"))
    walk = importlib.import_module("walk")
    means, cov, weight = torch.tensor([[1.0, 0.0]]), 0.1 * torch.eye(2)[None], torch.ones(1)
    real, fake = (ttf.GaussianMixture(side * means, cov, weight) for side in (1, -1))
    print(*walk.shot(ttf.Twins(real, fake))[2].mean(0).tolist())


def test_the_moving_picture_points_from_fakes_to_data(tmp_path):
    """-dv = (E[x | x_t, data] - E[x | x_t, fakes]) / t, along the first axis for these two, whatever x_t is."""
    status, words = said_by(tmp_path / "said", pull_between_gaussians)
    along, across = map(float, words.split()[-2:])
    assert status == 0 and along > 1 and abs(across) < 1e-3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """A file that is there; and where the link's text is a `name` of code, the file defines it."""
    links = re.findall(r"!?\[([^\]]*)\]\(([^)]+)\)", page.read_text())
    for text, target in links:
        if target.startswith("http"):
            continue
        path = page.parent / target.partition("#")[0]
        assert path.exists(), target
        name = re.fullmatch(r"`([\w.]+)`", text)
        if name and path.suffix == ".py":
            last = name.group(1).split(".")[-1]
            assert re.search(rf"^\s*(def|class) {last}\b|^{last} =", path.read_text(), re.M), f"{last} in {target}"


def test_each_equation_has_its_code_and_its_test():
    """The table in the README: equations 1 to 10, each row with a function and a test, both linked."""
    table = (ROOT / "README.md").read_text().split("## Where each equation lives")[1].split("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "Eq" in line]
    numbers = set()
    for row in rows:
        first, *others = (int(number) for number in re.findall(r"\d+", row.split("|")[1]))
        numbers |= set(range(first, (others or [first])[-1] + 1))
        assert "(tinytwinflow/" in row and "(tests/method/test_" in row
    assert numbers == set(range(1, 11))
