"""What pages say can be done: their Python blocks run as a reader would run them, their commands name what there is."""

import configparser
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder

import tinytwinflow as ttf
from tinytwinflow.backbones.families import published_names
from tinytwinflow.benchmarks.pays import SHORT
from tinytwinflow.benchmarks.plan import TRAININGS
from tinytwinflow.cli.arguments import config_of, parser
from tinytwinflow.data.toys import TOYS
from tinytwinflow.method.samplers import MODES
from tinytwinflow.nets.dit import dimensions
from tinytwinflow.runs.methods import entry, named
from tinytwinflow.runs.recipes import configured
from tinytwinflow.training.distributed import COMPILE

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(TUTORIALS.glob("*.md")), *NOTEBOOKS]
OF_A_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with pictures in a folder a class."""
    write_folder(tmp_path / "pictures", n=20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(page):
    """The text of a page; of a notebook, that of its cells in Markdown."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks_of(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def ran(block, names):
    """Run a block, with fewer steps, in a namespace."""
    exec(re.sub(r"(?<!warmup_)steps=\d{3,}\b", "steps=20", re.sub(r"warmup_steps=\d+", "warmup_steps=5", block)), names)


def test_the_blocks_of_readme_run_and_leave_what_they_say(here, capsys):
    blocks = blocks_of(words_of(ROOT / "README.md"), "python")
    assert len(blocks) == 3
    names, models = {}, []
    for block in blocks:
        ran(block, names)
        models.append(names["model"])
    points, pictures, own = models
    assert isinstance(points.sample(3), np.ndarray) and points.sample(3).dtype == np.float64
    apart = (points.sample(500) - [1000, -5]) / [20, 0.1]  # in the units of x, though hardly trained
    assert (abs(apart.mean(0)) < 0.5).all() and (abs(apart.std(0) - 1) < 0.5).all()
    assert np.array_equal(ttf.load("model.pt").sample(50, seed=1), points.sample(50, seed=1))
    table = capsys.readouterr().out
    assert "sliced_wasserstein" in table and re.findall(r"^twinflow +any +(\d+) ", table, re.M) == "1 2 4 8 100".split()
    assert re.search("^real data ", table, re.M)
    assert pictures.sample(2).dtype == torch.uint8 and pictures.sample(64, cond=1).shape == (64, 3, 16, 16)
    assert isinstance(own.net, names["Net"]) and own.sample(3).shape == (3, 2)


def test_the_output_in_readme_is_that_of_its_block(here, capsys):
    """Nearly: other processors round in another way, and 200 steps later it shows."""
    readme = words_of(ROOT / "README.md")
    exec(blocks_of(readme, "python")[0], {})
    shown, said = blocks_of(readme, "text")[0], capsys.readouterr().out
    tables = []
    for text in shown, said:
        rows = re.findall(r"^(twinflow +any +\d+|real data) +(\S+) +(\S+)% +(\S+) +(\S+)$", text, re.MULTILINE)
        tables.append({" ".join(name.split()): np.array(figures, float) for name, *figures in rows})
    assert len(tables[0]) == 6 and tables[0].keys() == tables[1].keys()
    for name, figures in tables[0].items():
        assert (abs(figures - tables[1][name]) < [0.02, 1, 0.01, 0.1]).all(), name


def test_readme_is_short():
    assert len(re.sub(r"^```.*?^```", "", words_of(ROOT / "README.md"), flags=re.DOTALL | re.MULTILINE).split()) < 950


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_python_blocks_of_tutorials_run(page, here):
    names = {}
    if page.name == "backbones.md":
        leave_pipeline(here)
    for block in blocks_of(words_of(page), "python"):
        ran(block, names)
    if page.name == "backbones.md":
        assert names["image"].size == (256, 256) and names["pipeline"].get_active_adapters() == ["twinflow"]


def leave_pipeline(folder):
    """The tiny pipeline and the adapters that the page on backbones speaks of."""
    from test_painting import pipeline_of
    from test_pipelines import trained, written
    from test_prompts import FLUX

    pipeline = pipeline_of(FLUX, folder)  # a whole one: that of SD3 lacks its T5, and loading it must be told so
    pipeline.save_pretrained(folder / "sd3.5-large")
    (folder / "fox-in-one-step").mkdir()
    written(trained(pipeline), folder / "fox-in-one-step" / "pytorch_lora_weights.safetensors")


@OF_A_PAGE
def test_blocks_are_of_a_kind_that_is_tried(page):
    kinds = re.findall(r"^```(.*)$", words_of(page), re.MULTILINE)
    assert kinds[1::2] == [""] * (len(kinds) // 2) and set(kinds[::2]) <= {"python", "sh", "text"}


def commands_of(text):
    """The commands of the package that a page names, in its blocks and in its sentences.  -> lists of words

    "..." stands for the command before it.
    """
    code, before = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), ""
    lines = [part for block in blocks_of(text, "sh") for line in block.splitlines() for part in line.split(" && ")]
    for line in lines + re.findall(r"`([^`]+)`", code):
        line = line.replace("\n", " ")
        known = re.fullmatch(r"(?:python|torchrun .*?) -m tinytwinflow(?![.\w])(.*)", line)
        known = known or re.fullmatch(r"((?:train \w|compare ).*)", line)
        if known:
            before = known[1]
        elif before and line.startswith("... "):
            known = [None, f"{before.partition(' --set ')[0]} {line[4:]}"]
        if known:
            yield shlex.split(known[1], comments=True)


def checked(words):
    """Raise ValueError, or exit, unless a command knows all that it is given by name."""
    args = parser().parse_args(words or ["toy"])
    if args.command in ("toy", "train"):
        config_of(args, getattr(args, "recipe", "toy"))
    elif args.command == "settings":
        configured(args.recipe or "toy")
    elif args.command == "compare":
        for method in args.methods or ():
            name, own = named(method)
            entry(" ".join([SHORT.get(name, name), *own]), args.changes)
        assert set(args.data or ()) <= set(TOYS)
    elif args.command in ("memory", "bench"):
        if args.net != "mlp" and args.net not in published_names():
            dimensions(args.net.removeprefix("dit-"))
        for method in args.methods or ():
            entry(method)
        if args.command == "bench":
            assert args.training in (None, *TRAININGS) and args.compile in (None, *COMPILE)
    elif args.command in ("sample", "paint"):
        assert args.mode in MODES


@OF_A_PAGE
def test_commands_name_what_there_is(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(words_of(page)):
        checked(words)


def test_commands_are_found():
    """As many as there are, so that one which is written in another way is not passed over."""
    for page in PAGES:
        text = words_of(page)
        assert len(list(commands_of(text))) >= len(re.findall(r"-m tinytwinflow(?![.\w])", text)), page


@pytest.mark.parametrize(
    "words",
    [
        "train tay",
        "trian toy",
        "train toy --set stepps=3",
        "train toy --set order=-1",
        "compare --methods twinflux",
        'compare --methods "twinflow ordre=2"',
        "compare --data moon",
        'compare --from RUN --methods "the papers base"',
        "compare --form RUN",
        "memory --net dit-b-3",
        "sample RUN --stpes 2",
        "sample RUN --mode ani",
        "settings toi",
        "bench --training adaptors",
    ],
)
def test_a_slip_in_a_command_is_seen(words):
    with pytest.raises((ValueError, SystemExit, AssertionError)):
        checked(shlex.split(words))


def test_other_commands_of_blocks_name_what_there_is():
    """pip's extras are those of setup.cfg, scripts are there, one-liners compile."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    seen = 0
    for page in PAGES:
        for block in blocks_of(words_of(page), "sh"):
            for extras in re.findall(r'pip install -e "\.\[([\w,]+)\]"', block):
                assert set(extras.split(",")) <= set(setup["options.extras_require"])
                seen += 1
            for script in re.findall(r"python (\S+\.py)", block):
                assert (ROOT / script).is_file()
                seen += 1
            for code in re.findall(r'python -c "(.*)"', block):
                compile(code, page.name, "exec")
                seen += 1
        for room in re.findall(r"-m (tinytwinflow\.[\w.]+)", words_of(page)):
            assert "__main__" in (ROOT / f"{room.replace('.', '/')}.py").read_text()
            seen += 1
    assert seen >= 6
