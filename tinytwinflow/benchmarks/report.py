"""Every hardware figure that the pages quote, measured on the machine at hand: python -m tinytwinflow report.

The pieces are worked off in this order, each in a process of its own, so that one that crashes or takes too long ends
alone. What is done is kept, and is not done again; what is not is tried again by the next call.
"""

import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from ..bars import bar
from ..evaluation.tables import markdown
from ..files import read_json, reason, write_json
from . import pieces
from .speed import on_gpu

QWEN = partial(pieces.backbone, name="qwen-image", rows=1)
PIECES = {  # name: minutes that it takes on a GPU; those of its stand-in on a CPU; what it does
    "tests": (0.7, 0.1, pieces.gpu_tests),
    "dit-xl-2, eager": (0.7, 0.4, pieces.dit_steps),
    "dit-xl-2, compiled": (1.8, 0.7, partial(pieces.dit_steps, compile="default")),
    "recipe fashion": (1.3, 0.5, pieces.fashion_steps),
    "casts of dit-xl-2": (0.4, 0.1, pieces.casts),
    "qwen-image, adapters": (1.6, 0.3, partial(QWEN, training="adapters")),
    "qwen-image, adapters, compiled": (2.4, 0.6, partial(QWEN, training="adapters", compile="default")),
    "qwen-image, in backward": (2.2, 0.3, partial(QWEN, training="in backward")),
    "sana-1.6b, adapters": (0.8, 0.3, partial(pieces.backbone, name="sana-1.6b", training="adapters", rows=32)),
    "recipe fashion, trained": (2.0, 0.6, pieces.fashion_trained),
}
DONE = "done"
HEADER = ("piece", "what", "ms", "ratio", "GiB", "beside it")


def machine(device):
    """What the figures depend on: the card, or the processor and its threads, and the versions."""
    if on_gpu(device):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {device}, threads: {torch.get_num_threads()}"
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "Python": platform.python_version()}
    return {"device": name, **versions}


def _processor():
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(device="cpu", minutes=8.0, out="report.json", todo=PIECES):
    """Work off the pieces that are not done yet in so many minutes; write `out` and beside it the table, and print it.

    todo: as PIECES. Raises ValueError if the minutes are not positive, or if `out` is of another machine or torch.
    """
    out, here = Path(out), machine(device)
    if not 0 < minutes < math.inf:
        raise ValueError(f"--minutes must be a positive number, got {minutes}")
    if out.suffix != ".json":
        raise ValueError(f"--out takes FILE.json, got {out}")
    content = read_json(out, "report") if out.exists() else {**here, "pieces": {}}
    for key in ("device", "torch"):
        if content.get(key) != here[key]:
            raise ValueError(f"{out} was made with {key} {content.get(key)}, here is {here[key]}: choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    ends, kept = time.monotonic() + 60 * minutes, content["pieces"]
    for name, (needs, needs_on_cpu, run) in bar(todo.items(), "report", unit="pieces"):
        if kept.get(name, {}).get("outcome") == DONE:
            continue
        left, needs = ends - time.monotonic(), needs if on_gpu(device) else needs_on_cpu
        if left < 60 * needs:
            found = {"rows": kept.get(name, {}).get("rows", []), "outcome": f"no time left (needs about {needs:g} min)"}
        else:
            found = alone(run, device, left)
        kept[name] = found
        write_json(out, content)
    text = shown(content, todo, on_gpu(device))
    out.with_suffix(".md").write_text(text + "\n")
    print(f"{text}\n\n{out}  {out.with_suffix('.md')}")


def alone(run, device, seconds):
    """Run a piece in a process of its own, for so many seconds at most.  -> its rows, the outcome, the seconds"""
    context, began = get_context("forkserver"), time.monotonic()
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe()
    process = context.Process(target=_tell, args=(sender, run, device, seconds, torch.get_num_threads()))
    process.start()
    sender.close()
    rows, told = [], None
    try:
        while told is None:
            if not receiver.poll(max(0, began + seconds - time.monotonic())):
                told = f"no time left (needs more than {seconds / 60:.2g} min)"
            elif isinstance(said := receiver.recv(), dict):
                rows.append(said)
            else:
                told = said
                process.join(10)
    except EOFError:
        process.join(10)
        told = f"failed: its process ended with status {process.exitcode}"
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return {"rows": rows, "outcome": told, "seconds": round(time.monotonic() - began, 1)}


def _tell(sender, run, device, seconds, threads):
    """In the piece's process: send its rows, then the outcome."""
    os.setpgrp()  # so that what it starts ends with it
    threading.Thread(target=_end_with, args=(sender,), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        for found in run(device, seconds):
            sender.send(found)
        sender.send(DONE)
    except ValueError as error:  # what the piece lacks, in the library's words
        sender.send(str(error).strip().splitlines()[0])
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        sender.send(f"failed: {reason(error)}")


def _end_with(other):
    """Wait until the report's process is gone, then end this one and all that it has started."""
    with suppress(EOFError, OSError):
        other.recv()
    os.killpg(0, signal.SIGKILL)


def shown(content, names, gpu=True):
    """The table in Markdown, with the machine above it: ratios are of the milliseconds of the rows."""
    about = ", ".join(f"{key} {value}" for key, value in content.items() if key not in ("device", "pieces"))
    where = "" if gpu else "; on a CPU small stand-ins take the places of the networks, GiB are of a whole process"
    cells = []
    for name in names:
        found = content["pieces"][name]
        ms = {row["what"]: row["ms"] for row in found["rows"] if "ms" in row}
        lines = [_cells(row, ms) for row in found["rows"]]
        lines += [] if found["outcome"] == DONE else [[found["outcome"], "", "", "", ""]]
        cells += [["" if i else name, *line] for i, line in enumerate(lines)]
    note = "ratio: to the piece's flow matching, or step; of samples, to 1 NFE"
    return f"{content['device']}, {about}{where}\n\n{markdown(HEADER, cells)}\n\n{note}"


def _cells(row, ms):
    """What, ms, ratio, GiB and what stands beside it."""
    beside = (
        f"{key} {value if isinstance(value, str) else f'{value:,.4g}'}" for key, value in row.get("beside", {}).items()
    )
    return [
        row["what"],
        f"{row['ms']:,.4g}" if "ms" in row else "",
        f"{row['ms'] / ms[row['to']]:.2f}" if "to" in row else "",
        f"{row['bytes'] / 2**30:.1f}" if "bytes" in row else "",
        "; ".join(beside).strip(),
    ]
