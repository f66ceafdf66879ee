"""The command line: python -m tinytwinflow [toy | train | sample | evaluate | compare | bench | ...]."""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from ..backbones import captions, painting, prompts, texts
from ..backbones.families import published_names
from ..benchmarks import checked, compare, memory, pays, plan, report, speed, speed_backbone
from ..data.given import in_units
from ..data.latents import autoencoder, decode, encode
from ..data.readers import Folder
from ..evaluation import pictures
from ..evaluation.tables import run_table
from ..files import aside, reason, write_json
from ..model import load
from ..runs.evaluate import evaluate
from ..runs.export import export, refuse_out
from ..runs.folder import attach, condition_of, painter, read_config, read_log, trained
from ..runs.methods import compared_methods, entry
from ..runs.play import play, refuse_page
from ..runs.recipes import configured
from ..runs.run import RESULTS, begin, finish, resume
from ..runs.settings import listed, loss_of, method_of
from ..training.checkpoints import has_checkpoint
from ..training.distributed import COMPILE, device_of, first, joined, refuse_graphs
from .arguments import config_of, parser


def show(folder, result, kept, off):
    """Draw a measured run: real data, one call, flow matching at 100 and at 1, what is off data marked; the gap."""
    config = read_config(folder)
    method = method_of(config)
    drawn = [("data", pictures.REAL), ((method, 1), pictures.ONE)]
    if method != "flow matching":
        drawn += [(name, pictures.FLOW) for nfe in (100, 1) if (name := ("flow matching", nfe)) in kept]
    title = f"{Path(config['data']).name}, {config['steps']} steps, seed {config['seed']}"
    titles = {name: name if name == "data" else f"{name[0]}, {name[1]} NFE" for name, _ in drawn}
    panels = [(titles[name], kept[name].numpy(), color, off.get(name)) for name, color in drawn]
    pictures.draw(Path(folder) / "samples.png", panels, read_log(folder), config, title)
    print(run_table(result))
    print(f"\n{folder}/samples.png  {folder}/metrics.json")


def measure(run, with_baseline):
    """Measure and draw a run that has taken its last step, its network as the checkpoint has it.  -> Trained"""
    own = trained(run.folder, run.device)._replace(data=run.data if run.world is None else None)
    show(run.folder, *evaluate(own, nfes=(1, 2, 4), with_baseline=with_baseline, device=run.device))
    return own


def run_toy(args):
    began = time.perf_counter()
    folder = Path(args.out or "runs/toy")
    config, device = config_of(args, "toy"), device_of(args.device)
    own = measure(finish(begin(config, folder, device, replace=True)), with_baseline=True)
    try:
        refuse_page(own, folder / "play.html")
    except ValueError as error:  # of points that no plane holds, say
        print(f"no page to play with: {error}")
    else:
        print(play(own, with_base=False))
    print(f"{time.perf_counter() - began:.0f} s on {device}, {torch.get_num_threads()} threads")


def run_train(args):
    folder, config = Path(args.out or f"runs/{args.recipe}"), config_of(args, args.recipe)
    with joined(args.device, config["seed"]) as world:
        device = device_of(world.device if world else args.device)
        if args.resume and not folder.is_dir():
            raise ValueError(f"{folder}: no such run to resume")
        if args.resume and ((folder / "config.json").exists() or has_checkpoint(folder)):
            first(world, lambda: keeps_settings(folder, config, args))
            run = resume(folder, device, world)
        else:
            run = begin(config, folder, device, world, measured=not args.unmeasured)
        measured = run.state.step >= run.config["steps"] and all((folder / name).exists() for name in RESULTS)
        finish(run)
    if world is not None and world.rank > 0:
        return
    if "model" in config:
        shown = "1, 2, 4 NFE" if config["vae"] else "1, 2, 4 NFE as colours, --set vae=PIPELINE decodes"
        print(f"{folder}/samples.png: latents at {shown}; python -m tinytwinflow paint makes images of prompts")
    elif measured:
        print(f"{folder} had taken its last step and was measured: python -m tinytwinflow evaluate does so anew")
    elif args.unmeasured:
        print(f"{folder}: python -m tinytwinflow evaluate measures it")
    else:
        print("measuring; --set eval_samples=N takes fewer samples than it does now, --unmeasured none")
        measure(run, with_baseline=False)


def keeps_settings(folder, config, args):
    """See that the run to resume has the settings that are given; where its data lie may have changed."""
    own, given = read_config(folder), {change.partition("=")[0] for change in args.changes}
    given |= {key for key in ("data", "seed", "init_from") if getattr(args, key) is not None}
    for key in ("recipe", *sorted(given)):
        if config[key] != own[key]:
            raise ValueError(f"a resumed run keeps its settings: {key} is {own[key]!r} there, not {config[key]!r}")
    if args.data_dir and "data_dir" in own:
        write_json(folder / "config.json", {**own, "data_dir": config["data_dir"]})


def run_settings(args):
    print(listed(configured(args.recipe) if args.recipe else None))


def run_sample(args):
    if args.n is not None and args.n < 1:
        raise ValueError(f"--n must be at least 1, got {args.n}")
    place, name = Path(args.folder), f"samples-{args.steps}.png"
    out = Path(args.out or (place.with_name(f"{place.stem}-{name}") if place.is_file() else place / name))
    if out.suffix not in (".png", ".npy"):
        raise ValueError(f"--out takes FILE.png or FILE.npy, got {out}")
    model = load(args.folder, device_of(args.device))
    about = model.saved["data"]
    n = args.n or (5000 if len(about["shape"]) == 1 else 64)
    condition_of(model.own, n, args.cond)
    if args.vae and "scale" not in about:
        raise ValueError("--vae decodes latents, and this run makes none")
    vae = autoencoder(args.vae, args.device) if args.vae else None
    if "scale" in about and vae is None and out.suffix == ".png":
        raise ValueError("this run makes latents: --vae DIR decodes them, --out FILE.npy keeps them as they are")
    x = model.draw(n, args.steps, args.cond, args.seed, args.mode)
    if vae is not None:
        x = decode(x, vae, about["scale"], about["shift"])
    if about.get("mean") is not None and (out.suffix == ".npy" or len(about["shape"]) == 1):
        x = in_units(x, about | {"units": ("numpy", "float64")})
    x = np.asarray(x)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npy":
        with aside(out) as file:
            np.save(file, x)
    else:
        pictures.draw_one(out, x, f"{method_of(model.config)}, {args.steps} NFE, mode {args.mode}")
    print(out)


def run_encode(args):
    folder = Folder(args.images, args.size)
    if not folder.classes:
        raise ValueError(f"{args.images}: needs a folder for each class with images in it")
    encode(folder, autoencoder(args.vae, device_of(args.device)), args.out)
    print(f"{len(folder)} images, {folder.classes} classes: {args.out}")


def run_evaluate(args):
    if Path(args.folder).is_file():
        raise ValueError(f"{args.folder}: evaluate takes a run folder; of a file, ttf.load(FILE).evaluate() does so")
    device = device_of(args.device)
    show(args.folder, *evaluate(trained(args.folder, device), device=device))


def run_play(args):
    device = device_of(args.device)
    print(play(trained(args.folder, device), args.out, device=device))


def run_compare(args):
    numbers = [("--seeds", args.seeds), ("--jobs", args.jobs), ("--adapters", args.adapters)]
    for name, value in (*numbers, *(("--steps", steps) for steps in args.steps or ())):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.source is None and (args.steps or args.adapters):
        raise ValueError("--steps and --adapters are for --from RUN; --set steps=N is the length of other comparisons")
    if args.source is not None and args.data:
        raise ValueError("--from takes the data of its run: leave --data out")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    methods = args.methods or (compared_methods() if args.source is None else pays.COMPARED)
    methods = list(dict.fromkeys(" ".join(method.split()) for method in methods))
    out = Path(args.out or ("runs/compare" if args.source is None else "runs/pays"))
    if args.source is None:
        compare.compare(args.data or compare.COMPARED_SETS, methods, seeds, args.changes, out, args.jobs)
    else:
        steps = sorted(set(args.steps or pays.LENGTHS))
        pays.compare_from(args.source, steps, methods, seeds, args.changes, out, args.jobs, args.adapters or 0)


def is_backbone(name, others):
    """Whether a net is a backbone. Raises ValueError if it is neither that nor begins as one of the others do."""
    if name not in published_names() and not name.startswith(others):
        known = [f"{other}s-2 ... {other}xl-8" if other == "dit-" else other for other in others]
        raise ValueError(f"unknown net {name!r}: choose from {', '.join((*known, *published_names()))}")
    return name in published_names()


def run_memory(args):
    on_backbone = is_backbone(args.net, ("dit-",))
    rows = (1 if on_backbone else 64) if args.batch_size is None else args.batch_size
    if rows < 1:
        raise ValueError(f"--batch-size must be at least 1, got {rows}")
    methods = dict.fromkeys(
        ["flow matching", *(args.methods or (plan.ON_BACKBONES if on_backbone else compared_methods()))]
    )
    if not on_backbone:
        losses = {method: loss_of(entry(method)) for method in methods}
        print(f"{args.net}, 32 x 32 x 4 latents, batch {rows}, bf16 autocast, float32 weights, GiB\n")
        print(memory.memory_table(memory.costs_of_dit(losses, args.net, rows)))
        return
    losses = {method: speed_backbone.loss_for(method, "float32") for method in methods}
    figures = plan.print_needs(args.net, losses, rows)
    if "twinflow" in losses:
        plan.print_few_bits(args.net, losses["twinflow"], rows)
        plan.print_spread(args.net, losses["twinflow"], rows, figures["twinflow", "float32"])


def run_embed(args):
    words, pairs = [record["prompt"] for record in captions.read_prompts(args.prompts)], None
    if args.size is None and args.buckets != 1:
        raise ValueError("--buckets are of images: --size S encodes them too")
    if args.size is not None:
        sides = captions.bucket_sides(args.size, args.buckets, prompts.picture_unit(args.pipeline))
        pairs = captions.Pairs(args.prompts, args.size, sides)
        words = pairs.prompts
        for (width, height), rows in pairs.buckets.items():
            print(f"{len(rows)} images of {width} x {height} pixels")
    texts.embed(words, prompts.load_pipeline(args.pipeline, device_of(args.device)), args.out, pairs, args.tokens)
    pictures = {"images": pairs.paths, "sources": pairs.sources} if pairs else {}
    kinds = ["prompts", *(name for name, there in pictures.items() if there)]
    print(f"{len(words)} {' and '.join(kinds)}: {args.out}")


def run_paint(args):
    records = captions.read_prompts(args.prompts)
    own_model, shape, source = painter(args.folder)
    pipeline = prompts.load_pipeline(args.pipeline, device_of(args.device), whole=True, backbone=not own_model)
    attach(pipeline, args.folder, args.mode)
    unit = prompts.unit_of(pipeline, pipeline.transformer.config, args.pipeline)
    size = args.size or (shape[-1] * prompts.pixels_of_latent(pipeline) if shape else 1024)
    if size < unit or size % unit:
        raise ValueError(f"--size must be a multiple of {unit} for this pipeline, got {size}")
    painting.write_pictures(
        pipeline, records, args.out, size, source, args.layout, args.n, args.steps, args.seed, args.tokens,
        args.batch_size,
    )  # fmt: skip
    print(args.out)


def run_export(args):
    if (args.pipeline is None) != (args.prompts is None):
        raise ValueError("samples need both --pipeline and --prompts")
    refuse_out(args.out, args.pipeline is not None)
    records = captions.read_prompts(args.prompts) if args.prompts else []
    pipeline = None
    if args.pipeline:
        backbone = not painter(args.folder)[0]
        pipeline = prompts.load_pipeline(args.pipeline, device_of(args.device), whole=True, backbone=backbone)
    export(args.folder, args.out, pipeline, [record["prompt"] for record in records])
    print(args.out)


def run_families(args):
    print(checked.table_of_families())
    print("\n" + "\n".join(f"- {name}: {meaning}" for name, meaning in checked.CHECKS.items()))


def run_bench(args):
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.compile not in (None, *COMPILE):
        raise ValueError(f"--compile must be one of {', '.join(COMPILE)}, got {args.compile!r}")
    of_backbone, compile = is_backbone(args.net, ("mlp", "dit-")), args.compile or "none"
    for name in () if of_backbone else ("training", "methods"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is not for {args.net}")
    if of_backbone and compile == "graphs":
        raise ValueError("--compile graphs is for small networks: choose default")
    refuse_graphs(compile, args.device)
    device = device_of(args.device)
    if args.batch_size == speed_backbone.LARGEST and not of_backbone:
        raise ValueError(f"--batch-size {speed_backbone.LARGEST} is not for {args.net}")
    if of_backbone:
        training, methods = args.training or "adapters", args.methods or ["twinflow"]
        for method in methods:
            speed_backbone.loss_for(method, training)  # all are known before the first takes its time
        for method in methods:
            speed_backbone.bench_backbone(args.net, training, args.batch_size or 1, device, method, compile)
    else:
        speed.bench_steps(device, args.net, args.batch_size, compile=compile)


def run_report(args):
    report.report(device_of(args.device), args.minutes, args.out)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["toy", *argv]
    args = parser().parse_args(argv)
    try:
        globals()[f"run_{args.command}"](args)
    except (ValueError, OSError) as error:
        print(f"tinytwinflow: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        words = ("allocate memory", "Storage size calculation overflowed")  # of torch, without a class, on a CPU
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(w in str(error) for w in words):
            raise
        print(f"tinytwinflow: out of memory ({reason(error)})", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"tinytwinflow: training stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "tinytwinflow: stopped; `train ... --resume` or the same `compare` or `report` goes on from here",
            file=sys.stderr,
        )
        return 130
    return 0
