"""What a user has who installs a built wheel and has no clone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel installs, built from a copy, since building leaves files beside the sources."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "tinytwinflow", copy / "tinytwinflow", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", copy, "--no-deps", "--no-build-isolation", "--wheel-dir", copy]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = copy.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(out)
    return out


def test_a_wheel_holds_the_whole_package(installed):
    """Every file that lies in it here, templates too, and no tests or tutorials."""
    here = {path.relative_to(ROOT) for path in (ROOT / "tinytwinflow").rglob("*.*") if "__pycache__" not in path.parts}
    there = {path.relative_to(installed) for path in installed.rglob("*.*") if path.is_file()}
    assert {path for path in there if not path.parts[0].endswith(".dist-info")} == here


def test_the_main_job_runs_in_an_empty_folder(installed, tmp_path):
    """With the installed package, not with that of the clone."""
    run = [sys.executable, "-m", "tinytwinflow", "--set", "steps=20", "batch_size=64", "eval_samples=400"]
    told = subprocess.run(
        run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "sliced_wasserstein" in told.stdout and (tmp_path / "runs/toy/samples.png").stat().st_size > 10_000
    where = subprocess.run(
        [sys.executable, "-c", "import tinytwinflow; print(tinytwinflow.__file__)"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(installed))
