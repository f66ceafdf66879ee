"""The arguments of the command line, and the settings that they amount to."""

import argparse
import sys
from pathlib import Path

import torch

from ..backbones.families import published_names
from ..backbones.painting import LAYOUTS
from ..benchmarks import compare, pays, plan, speed_backbone
from ..data.points import is_table
from ..data.readers import IMAGE_SETS
from ..data.toys import TOYS
from ..method.samplers import MODES
from ..runs.build import published_kind
from ..runs.methods import known_methods
from ..runs.recipes import RECIPES, configured
from ..training.distributed import COMPILE


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a wrong argument."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def seed(text):
    """A seed: what all random generators take. Raises ArgumentTypeError for another text."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to 2^63 - 1, got {text}")
    return int(text)


def rows(text):
    """A batch size: a number, or "largest". Raises ArgumentTypeError for another text."""
    if text != speed_backbone.LARGEST and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"a batch has 1 row or more, or is the {speed_backbone.LARGEST}, got {text}")
    return text if text == speed_backbone.LARGEST else int(text)


def parser():
    about = "TwinFlow: one-step generation with one network."
    whole = Parser(prog="tinytwinflow", description=about, fromfile_prefix_chars="@")
    own = sys.modules["tinytwinflow"].__version__
    whole.add_argument("--version", action="version", version=f"tinytwinflow {own}, torch {torch.__version__}")
    commands = whole.add_subparsers(dest="command", required=True)

    def add(name, does):
        command = commands.add_parser(name, help=does, description=does)
        return command

    def add_settings(command):
        command.add_argument(
            "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", dest="changes",
            help="settings, as many as you like: `python -m tinytwinflow settings` lists them",
        )  # fmt: skip

    def add_training(command, data):
        add_settings(command)
        command.add_argument("--data", help=data)
        command.add_argument("--data-dir", help="folder in which data is looked for")
        command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
        command.add_argument("--seed", type=seed, help="default 0")
        command.add_argument("--out", metavar="DIR")

    toy = add("toy", "train TwinFlow and flow matching on 2D data, compare them, draw them (the default)")
    add_training(toy, f"{', '.join(TOYS)}, FILE.npy or FILE.csv")

    train = add("train", "train a recipe")
    train.add_argument("recipe", help=", ".join(RECIPES))
    add_training(train, f"{', '.join((*TOYS, *IMAGE_SETS))}, FILE.npy, FILE.csv or a folder")
    train.add_argument("--unmeasured", action="store_true", help="take the steps alone: `evaluate` measures later")
    train.add_argument("--resume", action="store_true", help="go on with the run in DIR from its last checkpoint")
    train.add_argument(
        "--init-from", metavar="RUN", help="run folder, checkpoint, sit:FILE or dit:FILE, for the first weights"
    )

    told = add("settings", "every setting: what it means, what it may be, its value in a recipe")
    told.add_argument("recipe", nargs="?", help=f"{', '.join(RECIPES)} (default: the defaults)")

    draw = add("sample", "sample from a run")
    draw.add_argument("folder", metavar="RUN")
    draw.add_argument("--steps", type=int, default=1, help="network calls (default 1)")
    draw.add_argument("--mode", default="any", help=", ".join(MODES))
    draw.add_argument("--n", type=int, help="how many (default 5000 points, 64 images)")
    draw.add_argument("--vae", metavar="DIR", help="diffusers AutoencoderKL, for a run on latents")
    draw.add_argument("--cond", type=int, help="label, for a conditional run")
    draw.add_argument("--seed", type=seed, default=0)
    draw.add_argument("--out", metavar="FILE", help="FILE.png, a picture (default), or FILE.npy, the points")
    draw.add_argument("--device", default="cpu")

    words = add("embed", "encode prompts, and images if there are any, into a data set for the recipe text")
    words.add_argument("prompts", help="FILE.txt, FILE.jsonl, or a folder of NAME.txt, see --size")
    words.add_argument(
        "--pipeline", metavar="DIR", required=True, help="diffusers pipeline; its transformer is not read"
    )
    words.add_argument(
        "--size", type=int,
        help="encode the folder's pictures too, as squares of this side: NAME.png, and source/NAME.png to edit",
    )  # fmt: skip
    words.add_argument(
        "--buckets", type=int, default=1, metavar="B",
        help="in place of squares the nearest of so many ratios: 1:1, 4:3, 3:4, 3:2, 2:3, 16:9, 9:16 (default 1)",
    )  # fmt: skip
    words.add_argument("--tokens", type=int, help="length of a prompt (default: the pipeline's)")
    words.add_argument("--out", metavar="DIR", default="texts")
    words.add_argument("--device", default="cpu")

    paint = add("paint", "make images of prompts, in the folders that GenEval and DPG-Bench read")
    paint.add_argument("folder", metavar="RUN", help="a run of the recipe text, or a diffusers flow transformer")
    paint.add_argument("--prompts", required=True, help="FILE.txt, FILE.jsonl or a folder of NAME.txt")
    paint.add_argument("--pipeline", metavar="DIR", required=True, help="diffusers pipeline for text and pixels")
    paint.add_argument("--layout", default="plain", help=", ".join(LAYOUTS))
    paint.add_argument("--steps", type=int, default=1, help="network calls (default 1)")
    paint.add_argument("--mode", default="any", help="any (default) or multi")
    paint.add_argument("--n", type=int, default=4, help="images of a prompt (default 4)")
    paint.add_argument("--size", type=int, help="side of an image (default: the run's, or 1024)")
    paint.add_argument("--tokens", type=int, help="length of a prompt (default: the pipeline's)")
    paint.add_argument("--batch-size", type=int, default=4, metavar="B")
    paint.add_argument("--seed", type=seed, default=0)
    paint.add_argument("--out", metavar="DIR", default="images")
    paint.add_argument("--device", default="cpu")

    give = add("export", "write a trained backbone for diffusers: its adapters' average, or the whole model")
    give.add_argument("folder", metavar="RUN")
    give.add_argument("--out", required=True, metavar="DIR", help="a new folder, or FILE.safetensors of adapters alone")
    give.add_argument("--pipeline", metavar="DIR", help="diffusers pipeline that draws samples for the model's card")
    give.add_argument("--prompts", help="of those samples: FILE.txt, FILE.jsonl or a folder of NAME.txt")
    give.add_argument("--device", default="cpu")

    add("families", "the flow transformers of diffusers that are known, and what holds for each, tried on small ones")

    code = add("encode", "encode a folder of images into latents to train on")
    code.add_argument("images", metavar="FOLDER", help="images in a folder a class")
    code.add_argument("--vae", metavar="DIR", required=True, help="diffusers AutoencoderKL")
    code.add_argument("--size", type=int, default=256, help="side of the square that is encoded (default 256)")
    code.add_argument("--out", metavar="DIR", default="latents")
    code.add_argument("--device", default="cpu")

    measure = add("evaluate", "measure a run at 1, 2, 4, 8 and 100 NFE next to flow matching")
    measure.add_argument("folder", metavar="RUN")
    measure.add_argument("--device", default="cpu")

    page = add("play", "write a page on which a browser runs a 2D model: one file, without a network")
    page.add_argument("folder", metavar="RUN")
    page.add_argument("--out", metavar="FILE.html", help="default RUN/play.html")
    page.add_argument("--device", default="cpu", help="of what is trained to stand beside it")

    peers = add("compare", "TwinFlow and its peers on equal terms: one table")
    peers.add_argument("--data", nargs="+", metavar="D", help=f"default {' '.join(compare.COMPARED_SETS)}")
    peers.add_argument("--from", dest="source", metavar="RUN", help="fine-tune this flow-matching run by every method")
    peers.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help=f"with --from: for so many steps (default {' '.join(map(str, pays.LENGTHS))})",
    )
    peers.add_argument("--adapters", type=int, metavar="R", help="with --from, of a dit: train adapters of this rank")
    known = f"from {', '.join(known_methods())}; with settings of its own: 'dmd2 lr=1e-3'; @FILE reads them, one a line"
    known += f"; with --from also {', '.join(pays.SHORT)}"
    peers.add_argument("--methods", nargs="+", metavar="M", help=known)
    peers.add_argument("--seeds", type=int, default=3, metavar="K", help="how many (default 3)")
    peers.add_argument("--first-seed", type=seed, default=0, metavar="S", help="the first of them (default 0)")
    peers.add_argument("--jobs", type=int, metavar="J", help="processes of one thread (default: one a core)")
    add_settings(peers)
    peers.add_argument("--out", metavar="DIR", help="default runs/compare, with --from runs/pays")

    count = add("memory", "bytes of a training step of every method, counted")
    count.add_argument(
        "--net", default="dit-xl-2", help=f"dit-s-2 ... dit-xl-8 (default dit-xl-2), {', '.join(published_names())}"
    )
    count.add_argument("--batch-size", type=int, metavar="B", help="default 64, of a backbone 1")
    count.add_argument("--methods", nargs="+", metavar="M", help="default all; three of them on a backbone")

    speed = add("bench", "step time, sampling time, memory, and share of the machine's matrix peak")
    speed.add_argument(
        "--net", default="mlp", help=f"mlp (default), dit-s-2 ... dit-xl-8, {', '.join(published_names())}"
    )
    speed.add_argument("--training", help=f"of a backbone: {', '.join(plan.TRAININGS)} (default the first)")
    speed.add_argument("--methods", nargs="+", help="of a backbone: twinflow (default), flow matching, dmd2 ...")
    speed.add_argument(
        "--batch-size", type=rows, metavar="B", help="rows, of a backbone 1 by default; or largest: what the GPU holds"
    )
    speed.add_argument("--compile", help=f"{', '.join(COMPILE)}: how torch.compile is called")
    speed.add_argument("--device", default="cpu")
    speed.add_argument("--threads", type=int, help="CPU threads")

    told = add("report", "measure every hardware figure that the pages quote; called again it goes on")
    told.add_argument("--device", default="cpu")
    told.add_argument("--minutes", type=float, default=8.0, metavar="M", help="how long at most (default 8)")
    told.add_argument("--out", metavar="FILE.json", default="report.json", help="FILE.md is the table")
    return whole


def config_of(args, recipe):
    """The settings of a run of a recipe: what is named on the command line, paths from the root."""
    config = configured(recipe, args.changes, **({} if args.seed is None else {"seed": args.seed}))
    if getattr(args, "init_from", None):
        config["init_from"] = args.init_from
    if args.data:
        config["data"] = args.data
    if "data_dir" in config:
        config["data_dir"] = str(Path(args.data_dir or config["data_dir"]).resolve())
    for key in ("init_from", "features", "vae", "model", "validation"):
        kind, path = published_kind(config.get(key, "")) if key == "init_from" else ("", config.get(key, ""))
        if path and path != "classifier":
            config[key] = f"{kind}:" * bool(kind) + str(Path(path).resolve())
    from_disk = "model" in config or "size" in config and config["data"] not in IMAGE_SETS
    if from_disk or is_table(config["data"]):
        config["data"] = str((Path(args.data_dir or ".") / config["data"]).resolve())
    return config
