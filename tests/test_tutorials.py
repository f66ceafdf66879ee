"""The tutorials run, their saved pages are whole, their exercises can be solved, and every link leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinytwinflow.data.readers import DEBIAN

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "tutorials").glob("*.md"))]
PLACE = re.compile(r"/tmp|file:|(?<![\w.)\]}/])/\w\w")  # on some machine; no division and no address on the net
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@notebooks
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    """In its quick setting; the checks of what the text says are cells of it, and fail here if they fail."""
    if path.stem == "06_images" and not Path(DEBIAN["fashion"]).is_dir() and not (ROOT / "data").is_dir():
        pytest.skip("Fashion-MNIST is not on this machine: apt install dataset-fashion-mnist")
    for name, value in (("TTF_QUICK", "1"), ("OMP_NUM_THREADS", "1"), ("MPLBACKEND", "agg")):
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    client = nbclient.NotebookClient(notebook, timeout=150, resources={"metadata": {"path": path.parent}})
    client.execute()
    assert sum("assert " in cell.source for cell in notebook.cells if cell.cell_type == "code") >= 3


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


def test_the_syllabus_names_every_notebook():
    text = (ROOT / "tutorials" / "README.md").read_text()
    for path in NOTEBOOKS:
        assert f"({path.name})" in text


def check(path):
    return subprocess.run(
        [sys.executable, ROOT / "tutorials" / "exercises.py", path], capture_output=True, text=True, cwd=ROOT
    )


def test_the_answers_are_right():
    told = check(ROOT / "tutorials" / "answers.py")
    assert told.returncode == 0 and told.stdout.count(": right\n") == 8


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
    }
    for old, new in wrong.items():
        assert answers.count(old) == 1, old
        answers = answers.replace(old, new)
    (tmp_path / "mine.py").write_text(answers)
    told = check(tmp_path / "mine.py")
    assert told.returncode == 1 and ": right" not in told.stdout and len(told.stdout.splitlines()) == 8
    (tmp_path / "none.py").write_text("")
    told = check(tmp_path / "none.py")
    assert told.returncode == 1 and told.stdout.count("not there") == 8


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
        assert "(tinytwinflow/" in row and "(tests/test_" in row
    assert numbers == set(range(1, 11))
