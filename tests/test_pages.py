"""The Python blocks of README run, one after another, as a reader would run them, and say what is true."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_folder

import tinytwinflow as ttf

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with pictures in a folder a class."""
    write_folder(tmp_path / "pictures", n=20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_of_readme_run_and_leave_what_they_say(here, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names, models = {}, []
    for block in blocks:
        exec(re.sub(r"steps=[24]00\b", "steps=20", block).replace("warmup_steps=100", "warmup_steps=5"), names)
        models.append(names["model"])
    points, pictures, labelled, own = models[:4]
    assert isinstance(points.sample(3), np.ndarray) and points.sample(3).dtype == np.float64
    assert np.array_equal(ttf.load("model.pt").sample(50, seed=1), points.sample(50, seed=1))
    assert "sliced_wasserstein" in capsys.readouterr().out
    assert pictures.sample(2).dtype == torch.uint8 and pictures.sample(64, cond=1).shape == (64, 3, 16, 16)
    assert labelled.net.classes == 3 and isinstance(own.net, names["Net"])
    assert names["x"].shape == (1000, 2) and set(names["record"]) >= {"step", "total", "gap"}
