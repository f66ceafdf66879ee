"""What a training step and a sample of a large backbone really cost on this machine, its weights random."""

import gc
import re
from functools import partial
from itertools import islice

import torch

from ..backbones import states
from ..backbones.families import FAMILIES, published_backbone
from ..method.draws import normal
from ..method.samplers import sample
from ..runs.methods import FLOW_MATCHING, RCGM, entry, named
from ..runs.recipes import configured
from ..runs.settings import loss_of
from ..training.distributed import prepare
from ..training.loop import autocast, train
from ..training.state import WEIGHT_DTYPES
from .calls import condition_for, named_structure
from .plan import TRAININGS
from .speed import on_gpu, peak_memory, seconds_a_call, settle

LARGEST = "largest"  # in place of a batch size


def with_random_weights(net, dtype, device):
    """Give a network without weights some: matrices of small numbers, vectors of ones."""
    net._apply(lambda p: torch.empty(p.shape, dtype=dtype, device=device) if p.is_meta else p.to(device))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    return net


def loss_for(method, training):
    """The loss of a method: TwinFlow's and its parts' as recipe text has them, a peer's as `compare` has it.

    Raises ValueError for an unknown method or training, and for two that do not go together.
    """
    if training not in TRAININGS:
        raise ValueError(f"training must be one of {', '.join(TRAININGS)}, got {training!r}")
    own = {"twinflow": {}, "rcgm": RCGM, "flow matching": {**FLOW_MATCHING, "guidance": 0.0}}
    if method in own:
        return loss_of(configured("text", TRAININGS[training][1]) | own[method])
    if named(method)[0] in own:
        raise ValueError(f"{method!r}: of {', '.join(own)} the settings are those of recipe text, and no others")
    loss = loss_of(entry(method))
    kinds = set(getattr(loss, "helpers", {}).values())
    if hasattr(loss, "needs") or "features" in kinds:
        raise ValueError(f"{method} is for networks and classifiers made here, a backbone has neither: choose another")
    if training != "float32" and kinds - {"average"}:
        raise ValueError(f"{method} needs networks beside the one that learns: take --training float32")
    return loss


def largest_that_fits(fits):
    """The most rows for which fits(rows) is true, found by doubling, then halving; 0 if a single one is too many."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def backbone_in_training(name, training, device, method, compile="none"):
    """A backbone in training.  -> State, settings, batch: rows -> x, cond, and steps: rows -> records without end."""
    loss = loss_for(method, training)
    config = configured("text", TRAININGS[training][1])
    small = {} if on_gpu(device) else FAMILIES[published_backbone(name)[0]].small
    net, about = named_structure(name, **small)
    shape = about.latents if on_gpu(device) else tuple({"C": by, "T": 2}.get(axis, 16) for axis, by in net.axes.items())
    with_random_weights(net, WEIGHT_DTYPES[config["weights"]], device)
    if config["lora_rank"]:
        states.adapt(net, config["lora_rank"])
    place = partial(prepare, recompute=True, compile=compile)
    state = states.backbone_state(net, config, place, getattr(loss, "helpers", None))

    def batch(rows):
        x = normal(torch.empty(rows, *shape, device=device), torch.Generator(device).manual_seed(0))
        return x, condition_for(net, rows, about.tokens, torch.ones, device)

    def steps(rows):
        some = batch(rows)
        null = {key: value[:1] for key, value in some[1].items()}
        options = {key: config[key] for key in ("ema", "teacher_ema", "precision")}
        return train(state, loss, lambda step: some, 10**6, null=null, **options)

    return state, config, batch, steps


def release_memory():
    """Give back what only cycles hold, as networks and their hooks are held, and what the allocator keeps of it."""
    gc.collect()
    torch.cuda.empty_cache()


def fits_in_memory(steps, rows):
    """Whether some steps of so many rows find the memory that they need; many of few, which have not all parts."""
    release_memory()
    try:
        for _ in islice(steps(rows), 24 if rows < 4 else 3):
            pass
    except torch.OutOfMemoryError:
        return False
    return True


def measure_backbone(
    name, training="adapters", batch_size=1, device="cpu", method="twinflow", nfes=(1, 2, 100), compile="none"
):
    """Train a backbone of its real configuration for some steps, and sample from it at some numbers of calls.

    method: as in `compare`; a peer that needs networks beside the one that learns is for training "float32".
    batch_size: rows, or "largest": as many as the GPU's memory holds. compile: see `compile_as`. On a CPU one layer of
    two heads stands for the backbone, on latents of 16 x 16. -> dict: rows, shape of a latent; step: seconds of each;
    memory: bytes; sampling: seconds by NFE; parameters: those that learn. Raises ValueError for an unknown backbone,
    training or method, for what does not go together, and if the memory does not suffice.
    """
    published_backbone(name)
    if batch_size == LARGEST and not on_gpu(device):
        raise ValueError(f"the largest batch is looked for on a GPU, not on {device}: give --batch-size a number")
    release_memory()
    rows = batch_size
    try:
        state, config, batch, steps = backbone_in_training(name, training, device, method, compile)
        if batch_size == LARGEST:
            rows = max(1, largest_that_fits(partial(fits_in_memory, steps)))
        release_memory()
        records, times, (x, cond) = steps(rows), [], batch(rows)
        few = rows < 4  # such steps have not all parts, the rarest 1 in 6
        settle(partial(next, records), device, quiet=1 if compile == "none" else 24 if few else 3)
        some = 3 if not on_gpu(device) else 24 if few else 6
        memory = peak_memory(
            lambda: times.extend(seconds_a_call(partial(next, records), device) for _ in range(some)), device
        )
        with autocast(device, config["precision"]):
            draw = partial(sample, state.average, x, cond=cond)
            draw(1)
            sampling = {calls: seconds_a_call(partial(draw, calls), device) for calls in nfes}
        if training == "in backward":
            state.optimizer.stop()
    except torch.OutOfMemoryError as error:
        asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        smaller = "" if rows in (1, LARGEST) else "a smaller --batch-size, or "
        raise ValueError(
            f"{device} has no memory left for {name}, {training}, {method}, batch {rows} "
            f"({asked[1] if asked else 'more'} was asked for): "
            f"try {smaller}--training {' or '.join(other for other in TRAININGS if other != training)}"
        ) from None
    count = sum(p.numel() for group in state.optimizer.param_groups for p in group["params"])
    figures = {"rows": rows, "shape": tuple(x.shape[1:]), "step": times, "memory": memory, "sampling": sampling}
    return figures | {"parameters": count}


def bench_backbone(name, training="adapters", batch_size=1, device="cpu", method="twinflow", compile="none"):
    """Measure as `measure_backbone` does, and print. Returns its figures."""
    found = measure_backbone(name, training, batch_size, device, method, compile=compile)
    times = found["step"]
    what = name if on_gpu(device) else f"one layer of two heads (on a CPU in place of {name})"
    print(f"{what}, {training}, {method}: {found['parameters'] / 1e6:,.1f} M parameters learn, ", end="")
    shape = " x ".join(map(str, found["shape"]))
    print(f"latents {shape}, batch {found['rows']}, {device}, torch {torch.__version__}, compile {compile}")
    print(f"training step: mean {sum(times) / len(times):.3f} s of {len(times)}, longest {max(times):.3f} s, ", end="")
    print(f"peak memory {found['memory'] / 2**30:.1f} GiB{'' if on_gpu(device) else ' of the whole process'}")
    print("sampling: " + ", ".join(f"{calls} NFE {value:.3f} s" for calls, value in found["sampling"].items()))
    return found
