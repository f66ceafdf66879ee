"""The training loop: a generator that takes one step each time it is asked, and never loses a run.

    state = new_state(net, lr=2e-3)
    for record in train(state, loss, batch, steps=4000):
        print(record["step"], record["total"])

`state` is all that training knows: stopped at any step, saved, loaded and continued, it goes on
bit for bit as if it had never stopped.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch

from .ema import average_of, update, warmed_up
from .files import aside
from .losses import Losses
from .twin import take

PRECISIONS = ("float32", "bf16")
COMPILE = ("none", "default")


@dataclass
class State:
    """A network in training: net, two moving averages of it, the optimiser, the noise generator, steps done.

    `average`, the slow one, is the model to sample from; `teacher`, the fast one, is F^-.
    """

    net: torch.nn.Module
    average: torch.nn.Module
    teacher: torch.nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    step: int = 0

    def state_dict(self):
        return {
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
        }

    def load_state_dict(self, saved):
        self.net.load_state_dict(saved["net"])
        self.average.load_state_dict(saved["average"])
        self.teacher.load_state_dict(saved["teacher"])
        self.optimizer.load_state_dict(saved["optimizer"])
        try:
            self.generator.set_state(saved["generator"].cpu())
        except RuntimeError:
            raise ValueError("the run was trained on another kind of device: go on with it there") from None
        self.step = saved["step"]


def adamw(net, lr, betas=(0.9, 0.99)):
    """AdamW without weight decay (Table 6), for all weights in a few kernels."""
    how = {"fused": True} if next(net.parameters()).device.type == "cuda" else {"foreach": True}
    return torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=0.0, **how)


def new_state(net, lr=1e-3, betas=(0.9, 0.99), seed=0):
    """Start of training: AdamW, the averages equal to the network."""
    optimizer = adamw(net, lr, betas)
    optimizer.param_groups[0]["initial_lr"] = lr
    generator = torch.Generator(next(net.parameters()).device).manual_seed(seed)
    return State(net, average_of(net), average_of(net), optimizer, generator)


def autocast(device, precision):
    """The context that networks run in: "bf16" computes in bfloat16 what can be, "float32" changes nothing."""
    # no cache: older torch reuses casts made without gradient, and those weights would get none
    on = precision == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=on, cache_enabled=False)


def learning_rate(step, steps, warm_up=100):
    """Factor on the learning rate: a linear rise over the first steps, then a cosine to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    state, loss, batch, steps, ema=0.999, teacher_ema=0.99, warmup_steps=0, base_steps=0, null=None, label_dropout=0.0,
    accumulate=1, clip_norm=None, precision="float32",
):  # fmt: skip
    """Take training steps up to `steps`, yielding after each a record: step, lr and the loss terms.

    loss: a TwinFlowLoss. For `warmup_steps` only its flow part is trained, which is flow matching; for
    the next `base_steps` the whole base without the twin parts; then all of it.
    batch(i) gives data and condition (None without) of step i. null: label that stands for no
    condition; it replaces a share `label_dropout` of the labels. ema and teacher_ema are the decays
    of the two averages (Table 6: 0.99 for the teacher). accumulate: the batch is worked through in so
    many equal parts. clip_norm: longest gradient, or None. precision "bf16": the networks run under autocast.
    Raises FloatingPointError, before the weights are touched, if a loss term is not finite.
    """
    flow_matching = dataclasses.replace(loss, order=0, share=0.0)
    base = dataclasses.replace(loss, share=0.0)
    device = next(state.net.parameters()).device
    null = None if null is None else torch.tensor([null], device=device)
    while state.step < steps:
        i = state.step
        x, cond = batch(i)
        if null is not None and label_dropout:
            drop = torch.rand(len(x), generator=state.generator, device=device) < label_dropout
            cond = torch.where(drop, null, cond)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate(i, steps)
        current = flow_matching if i < warmup_steps else base if i < warmup_steps + base_steps else loss
        if len(x) % accumulate:
            raise ValueError(f"a batch of {len(x)} does not divide into {accumulate} equal parts")
        state.optimizer.zero_grad()
        terms = torch.zeros(len(Losses._fields), device=device)
        for part in torch.arange(len(x), device=device).chunk(accumulate):
            with autocast(device, precision):
                out = current(state.net, x[part], take(cond, part), state.teacher, null, generator=state.generator)
            (out.total / accumulate).backward()
            terms += torch.stack(out).detach() / accumulate
        record = dict(zip(Losses._fields, terms.tolist()))
        for name, value in record.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"step {i + 1}: the {name} loss is {value}; lower lr or rectify_weight")
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(state.net.parameters(), clip_norm, foreach=True)
        state.optimizer.step()
        update(state.average, state.net, warmed_up(ema, i))
        update(state.teacher, state.net, warmed_up(teacher_ema, i))
        state.step += 1
        yield {"step": state.step, "lr": state.optimizer.param_groups[0]["lr"], **record}


def save(path, content):
    """Write a checkpoint so that a crash at any moment leaves the old file or the new one, whole.

    Raises FloatingPointError, writing nothing, if a weight is not finite.
    """
    for name, value in (*content["net"].items(), *content["average"].items()):
        if not value.isfinite().all():
            raise FloatingPointError(f"step {content['step']}: weight {name} is not finite; the last checkpoint stays")
    with aside(path) as file:
        torch.save(content, file)
