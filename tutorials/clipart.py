"""The picture of clip art on the page of results: real pictures, TwinFlow at 1, 4 and 100 NFE, flow matching at 100.

    python tutorials/clipart.py [RUN] [--out tutorials/pictures/clipart.png]

Each place has the same noise and class. It measures the run as `evaluate` does, and trains flow matching if need be.
"""  # fmt: skip

import argparse
from pathlib import Path

from style import plt

from tinytwinflow.evaluation.pictures import FLOW, ONE, REAL, panel
from tinytwinflow.files import aside
from tinytwinflow.runs.evaluate import evaluate
from tinytwinflow.runs.folder import trained

SHOWN = [("data", REAL), *((("twinflow", nfe), ONE) for nfe in (1, 4, 100)), (("flow matching", 100), FLOW)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/clipart"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures" / "clipart.png")
    args = parser.parse_args()
    try:
        own = trained(args.run)
    except ValueError as error:
        parser.error(str(error))
    _, kept, _ = evaluate(own)
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(15.5, 3.5), dpi=100)
    for axis, (name, color) in zip(axes, SHOWN):
        panel(axis, kept[name].numpy(), name if name == "data" else f"{name[0]}, {name[1]} NFE", color)
    with aside(args.out) as file:
        figure.savefig(file, format="png")


if __name__ == "__main__":
    main()
