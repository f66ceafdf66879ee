"""Fault injection: what is killed, or finds no room on the disk, or may not write, goes on to the same end.

    python tests/faults.py [SEED]

Runs of the command line are killed with -9 at 20 moments, have a disk of 10 sizes, and a folder that turns read-only.
Each is then resumed as a user would, and compared with a run that nothing happened to: the tensors of its checkpoint
bit for bit, its log, its metrics. Disks are small tmpfs mounts, for which one must be root on Linux.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
STEPS = 200
SMALL = ["width=64", "depth=3", "batch_size=64", f"steps={STEPS}", "checkpoint_every=10", "eval_samples=1500"]
TRAIN = ["train", "toy", "--resume", "--set", *SMALL, "--out"]


def start(*words):
    command = [sys.executable, "-m", "tinytwinflow", *map(str, words)]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def whole(*words):
    """Run a command that must succeed."""
    process = start(*words)
    said = process.communicate()[1]
    assert process.returncode == 0, said


def wait(process, until):
    """Wait until something is so, or the process has ended."""
    while process.poll() is None and not until():
        time.sleep(0.0005)


def lines(folder):
    return (folder / "log.jsonl").read_bytes().count(b"\n") if (folder / "log.jsonl").exists() else 0


def same(a, b):
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def differs(folder, quiet):
    """In what a run differs from one that nothing happened to: names of files."""
    checkpoints = [torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, quiet)]
    logs = [(path / "log.jsonl").read_text() for path in (folder, quiet)]
    found = {"checkpoint.pt": same(*checkpoints), "log.jsonl": logs[0] == logs[1]}
    if (quiet / "metrics.json").exists():
        measured = [json.loads((path / "metrics.json").read_text()) | {"seconds": 0} for path in (folder, quiet)]
        found["metrics.json"] = measured[0] == measured[1]
    left = {path.name for path in folder.iterdir()} ^ {path.name for path in quiet.iterdir()}
    return [name for name, equal in found.items() if not equal] + sorted(left)


def kills(home, quiet, draw):
    """Moments of training, of saving and of measuring, each named and as a function that kills a run then."""

    def in_training(folder, process, at=None):
        wait(process, lambda: lines(folder) > at)

    def in_saving(folder, process, at=None):
        for _ in range(at):
            wait(process, lambda: not (folder / "checkpoint.pt.tmp").exists())
            wait(process, lambda: (folder / "checkpoint.pt.tmp").exists())

    def in_measuring(folder, process, at=None):
        wait(process, lambda: lines(folder) >= STEPS)
        time.sleep(at)

    moments = [("training", in_training, draw.randrange(STEPS - 1)) for _ in range(8)]
    moments += [("saving", in_saving, draw.randrange(1, STEPS // 10)) for _ in range(4)]
    moments += [("measuring", in_measuring, draw.uniform(0.02, 1.0)) for _ in range(3)]
    for i, (name, when, at) in enumerate(moments):
        folder = home / f"killed-{i}"
        folder.mkdir()
        process = start(*TRAIN, folder)
        when(folder, process, at=at)
        process.kill()
        process.communicate()
        whole(*TRAIN, folder)
        yield f"killed in {name}, {at}", process.returncode == -9, differs(folder, quiet)


def kills_of_evaluate(home, quiet, draw):
    began, evaluated = time.time(), shutil.copytree(quiet, home / "evaluated")
    whole("evaluate", evaluated)
    seconds = time.time() - began
    for i in range(5):
        folder, at = shutil.copytree(quiet, home / f"measured-{i}"), draw.uniform(0.3, 0.9) * seconds
        process = start("evaluate", folder)
        time.sleep(at)
        process.kill()
        process.communicate()
        whole("evaluate", folder)
        found = differs(folder, evaluated) + differs(folder / "flow-matching", evaluated / "flow-matching")
        yield f"evaluate killed after {at:.1f} s", process.returncode == -9, found


@contextmanager
def disk(place, size):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield lambda *options: subprocess.run(["mount", "-o", ",".join(["remount", *options]), place]).returncode == 0
    finally:
        subprocess.run(["umount", place], check=True)


def refused(process, word):
    """Whether a run ended with exit code 2 and one line with a word."""
    said = process.communicate()[1].strip()
    print("   ", said)
    return process.returncode == 2 and len(said.splitlines()) == 1 and word in said


def full_disks(home, quiet, draw):
    need = 2 * (quiet / "checkpoint.pt").stat().st_size + (quiet / "log.jsonl").stat().st_size
    for i, share in enumerate((0.01, 0.1, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)):
        with disk(home / f"disk-{i}", int(share * need)) as remount:
            folder = home / f"disk-{i}" / "run"
            folder.mkdir()
            told = refused(start(*TRAIN, folder), "No space left on device")
            tidy = not [path for path in folder.rglob("*.tmp")]
            remount("size=100m")
            whole(*TRAIN, folder)
            yield f"a disk of {share:.0%} of what it takes", told and tidy, differs(folder, quiet)


def read_only(home, quiet, draw):
    for i in range(3):
        with disk(home / f"closed-{i}", "100m") as remount:
            folder, at = home / f"closed-{i}" / "run", draw.randrange(STEPS - 30)
            folder.mkdir()
            process = start(*TRAIN, folder)
            wait(process, lambda folder=folder, at=at: lines(folder) > at)
            wait(process, lambda remount=remount: remount("ro"))  # busy while a file is open for writing
            told = refused(process, "Read-only file system")
            remount("rw")
            whole(*TRAIN, folder)
            yield f"read-only from step {at}", told, differs(folder, quiet)


def main(seed=0):
    home, draw = Path(tempfile.mkdtemp()), random.Random(seed)
    quiet = home / "quiet"
    quiet.mkdir()
    whole(*TRAIN, quiet)
    for fault in (kills, kills_of_evaluate, full_disks, read_only):
        count = good = 0
        for name, struck, found in fault(home, quiet, draw):
            count, good = count + 1, good + (struck and not found)
            print(f"{name}: {'as it should' if struck else 'NOT STRUCK'}; {found or 'the same end'}", flush=True)
        print(f"== {fault.__name__}: {good} of {count}", flush=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
