"""The training loop: a generator that takes one step each time it is asked, and never loses a run.

    state = new_state(net, lr=2e-3)
    for record in train(state, loss, batch, steps=4000):
        print(record["step"], record["total"])

`state` is all that training knows: stopped at any step, saved, loaded and continued, it goes on
bit for bit as if it had never stopped.
"""

import dataclasses
import math
from contextlib import contextmanager
from itertools import islice

import torch

from ..method.conditions import apart, as_null, as_pair, check_rows, move, place, replace, take, take_null
from ..method.draws import turns_of
from ..method.losses import TwinFlowLoss
from ..ranges import plain, setting

PRECISIONS = ("float32", "tf32", "bf16")
OPTIONS = {  # of `train`, and settings of a run
    "steps": setting(2000, "training steps", "[1, inf)", unit="steps"),
    "warmup_steps": setting(500, "steps of flow matching alone, at first", "[0, inf)", unit="steps"),
    "base_steps": setting(700, "steps of the base without the twin, after those", "[0, inf)", unit="steps"),
    "ema": setting(0.999, "decay of the moving average that samples", "[0, 1)"),
    "teacher_ema": setting(0.99, "decay of the moving average that teaches, F^-", "[0, 1)"),
    "label_dropout": setting(0.1, "share of the conditions that are dropped", "[0, 1)"),
    "accumulate": setting(1, "parts in which a batch is worked through", "[1, inf)"),
    "clip_norm": setting(None, "longest gradient", "(0, inf)", kind=float, none=True),
    "precision": setting(
        "float32",
        "what networks compute in; bf16: autocast; tf32: only products of matrices, on cuda",
        choices=PRECISIONS,
    ),
}
ASTRAY = 1e5  # no healthy run of a recipe or peer comes near: SiD's spikes reach 5e3, all others stay below 50


@contextmanager
def matrix_units(device, precision):
    """With "tf32" products of float32 matrices run on a GPU's matrix units, on 10 bits of the mantissa in place of 23.

    Forward and backward pass alike. Other precisions, and devices other than cuda, compute as they did.
    """
    if precision != "tf32" or torch.device(device).type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def autocast(device, precision):
    """The context that networks run in: "bf16" computes in bfloat16 what can be, "tf32": see `matrix_units`."""
    # no cache: older torch reuses casts made without gradient, and those weights would get none
    cast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with matrix_units(device, precision), cast:
        yield


def learning_rate(step, steps, warm_up=100):
    """Factor on the learning rate: a linear rise over the first steps, then a cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    state, loss, batch, steps, ema=0.999, teacher_ema=0.99, warmup_steps=0, base_steps=0, null=None, label_dropout=0.0,
    accumulate=1, clip_norm=None, precision="float32", world=None, read_every=1,
):  # fmt: skip
    """Take training steps up to `steps`, yielding after each a record: step, lr and the loss terms.

    loss: a TwinFlowLoss, or a peer's. For `warmup_steps` only its flow part is trained, which is flow matching;
    for the next `base_steps` the whole base without the twin parts; then all of it. A peer's frozen and
    trained networks are filled from the average when flow matching ends.
    batch(i) gives of step i data and condition, or data alone, as tensors or arrays. null: label that stands for no
    condition, or such a condition of one row, see `conditions.apart`; it replaces a share `label_dropout` of them. ema
    and teacher_ema are the decays of the two averages (Table 6: 0.99 for the teacher). accumulate: the batch is worked
    through in so many equal parts. clip_norm: longest gradient, or None. precision: see PRECISIONS, `autocast`.
    world: the processes that train together, each on its part of the batch, see `distributed`.
    read_every: the terms of so many steps, and those left at the last, are read at once, for to read them is to wait
    for the device; records of other steps have none, see `read_terms`.
    Raises ValueError for an option out of its range in OPTIONS, and FloatingPointError if data or a loss term are not
    finite, or a term is so large that training plainly diverges: more than ASTRAY times 1 + the mean of x^2, what the
    square of a velocity is about. The step at which terms are read has not touched the weights then, but steps that
    were not read have, and so has one whose optimiser works inside the backward pass.
    """
    given = locals()
    for name, option in OPTIONS.items():
        option.check(name, plain(given[name]))
    if not callable(batch):
        raise ValueError(f"batch is a function of the step, got {type(batch).__name__}: data.given.Stream makes one")
    peer = not isinstance(loss, TwinFlowLoss)
    flow_matching = dataclasses.replace(TwinFlowLoss() if peer else loss, order=0, share=0.0, base=None)
    base = loss if peer else dataclasses.replace(loss, share=0.0)
    device = next(state.net.parameters()).device
    null = as_null(null, device)
    while state.step < steps:
        i = state.step
        # of noise on an accelerator the host would have to wait for what decides which parts a small batch has
        turns = world.reseed(state.generator, i) if world else turns_of(state.generator.initial_seed(), i)
        x, cond = as_pair(batch(i))
        x, cond = place(x, device), move(cond, device)
        check_rows(cond, len(x))
        cond, none = apart(cond, null)
        if none is not None and label_dropout:
            drop = torch.rand(len(x), generator=state.generator, device=device) < label_dropout
            cond = replace(cond, none, drop)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate(i, steps)
        current = flow_matching if i < warmup_steps else base if i < warmup_steps + base_steps else loss
        if len(x) % accumulate:
            raise ValueError(f"a batch of {len(x)} does not divide into {accumulate} equal parts")
        done, total = i - warmup_steps, steps - warmup_steps
        if peer and done >= 0:
            fill_helpers(state, loss, done, total)
        state.optimizer.zero_grad()
        terms = 0.0  # those of the loss, and last the mean of x^2
        for k, part in enumerate(torch.arange(len(x), device=device).chunk(accumulate)):
            if world is not None:
                world.sync(state.call or state.net, last=k == accumulate - 1)
            some, without = x[part], take_null(none, part)
            with autocast(device, precision):
                out = loss_of_batch(current, state, some, take(cond, part), without, done / max(total, 1), turns)
            with matrix_units(device, precision):
                (out.total / accumulate).backward()
            terms = terms + torch.stack([*out, some.float().square().mean()]).detach() / accumulate
        if world is not None:
            terms = world.mean(terms)
        state.unread.append((i + 1, out._fields, terms))
        record = read_terms(state) if (i + 1) % read_every == 0 or i + 1 == steps else {}
        if clip_norm is not None:
            for network in (state.net, *state.helpers.values()):
                torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm, foreach=True)
        state.optimizer.step()
        state.follow(ema, teacher_ema)
        state.step += 1
        yield {"step": state.step, "lr": state.optimizer.param_groups[0]["lr"], **record}


def read_terms(state):
    """Read the loss terms that are still on the device, and the optimiser's check.  -> those of the last step, by name

    Raises FloatingPointError for the first step with terms that are not finite or plainly astray; and again if it is
    called again, once that step has moved the weights.
    """
    unread, record = state.unread, {}
    state.unread = [taken for taken in unread if taken[0] <= state.step]
    values = iter(torch.cat([terms for *_, terms in unread]).tolist() if unread else ())
    for step, names, terms in unread:
        *own, size = islice(values, len(terms))
        record = dict(zip(names, own))
        if not math.isfinite(size):
            raise FloatingPointError(f"step {step}: the data of its batch are not finite")
        for name in sorted(record, key=lambda name: name == "total"):  # a term first, then what they sum to
            if not abs(value := record[name]) <= ASTRAY * (1 + size):
                raise FloatingPointError(
                    f"step {step}: the {name} loss is {value:.3g}; lower lr (muon_lr too) or the term's weight"
                )
    if hasattr(state.optimizer, "check"):
        state.optimizer.check()
    state.unread = []
    return record


def loss_of_batch(loss, state, x, cond=None, null=None, progress=0.0, turns=None):
    """Call a loss with the networks that it needs; progress counts from the end of flow matching."""
    networks = {"original": state.original} if isinstance(loss, TwinFlowLoss) else state.helpers
    more = {"teacher": state.teacher, "null": null, "progress": progress, "turns": turns, **networks}
    return loss(state.call or state.net, x, cond=cond, generator=state.generator, **more)


def fill_helpers(state, loss, done, total):
    """Fill a peer's networks when its part of the training begins, and its frozen one again where it asks for it."""
    again = done in [math.ceil(progress * total - 1e-6) for progress in getattr(loss, "refill", ())]
    for name, helper in state.helpers.items():
        if done == 0 and loss.helpers[name] in ("frozen", "trained"):
            helper.load_state_dict(state.average.state_dict())
        elif again and loss.helpers[name] == "frozen":
            helper.load_state_dict(state.teacher.state_dict())
