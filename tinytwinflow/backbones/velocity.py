"""Velocity: a diffusers flow transformer as a velocity field, its own forward untouched.

A network of TwinFlow is shown two times, a pretrained one only knows t. Hooks on the small MLP that embeds the time
add what is new to its output (see `Velocity`); all else is the model as diffusers runs it. Of a new kind of
model a `Family` tells where that MLP is, how to call the model and how to read its answer.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from ..method.path import expand
from ..nets.times import check_times
from .families import family_of
from .family import free, sizes
from .quantised import in_floats


class Velocity(nn.Module):
    """A diffusers flow transformer as a velocity field net(x, t, r, cond).

    Its embedding of the time becomes emb(|t|) + (t - r) emb_r(r) + [t < 0] emb_twin(|t|). emb_r and emb_twin are copies
    of emb whose last layer begins at zero, so at birth, and at r = t > 0 ever after, the first term is left: the
    pretrained velocity. Times stay in float32 up to their sinusoids, though the model would round them to its
    own precision; the sum is formed in float32.

    Models of AnyFlow, which `load_velocity` reads, have an emb_r from the start and another sum, of a fixed g:
    (1 - g) emb(|t|) + g emb_r(|r|) + [t < 0] emb_twin(|t|), or |t| - |r| in place of |r|. At r = t too both terms are
    left, so there the pretrained velocity is AnyFlow's own, not Wan's.

    x (B, *D) latents as the model's pipeline scales them, of images (B, C, H, W), videos (B, C, T, H, W) or sounds
    (B, C, T), of any size that the model's patches divide; t, r (B,) in [-1, 1]; cond a dict of what the family needs,
    as prompt_embeds (B, L, D), prompt_mask (B, L) bool or whole numbers, pooled (B, P), guidance (B,).
    -> (B, *D) in the precision of x.
    Raises ValueError for a model of an unknown class or variant, and for inputs of other shapes.
    """

    def __init__(self, model):
        super().__init__()
        kind, config = type(model).__name__, getattr(model, "config", {})
        family = family_of(kind, kind)
        self.family = replace(family, **family.variant(config))
        on = [name for name in self.family.off if config.get(name) not in (None, False)]
        if on:
            raise ValueError(f"{kind} with {on[0]}={config[on[0]]!r} is another variant of the model: not supported")
        self.axes, out = self.family.axes(config), self.family.out(config)
        self.channels = self.axes["C"]
        if out < self.channels:
            raise ValueError(f"{kind} makes {out} channels of {self.channels}: it is shown pictures too, not supported")
        if out != self.channels:
            raise ValueError(f"{kind} makes {out} channels of {self.channels}: only a velocity is wanted, no sigma")
        self.cond = dict(self.family.cond, **({"guidance": ()} if config.get("guidance_embeds") else {}))
        self.model = model
        embedder = model.get_submodule(self.family.embedder)
        if any(isinstance(getattr(hook, "__self__", None), Velocity) for hook in embedder._forward_hooks.values()):
            raise ValueError(f"this {kind} is already inside a Velocity: use that one or a deep copy of it")
        in_floats(embedder)
        self.r_embedder, self.twin_embedder = (copy.deepcopy(embedder).requires_grad_() for _ in range(2))
        for new in (self.twin_embedder,) if self.family.given else (self.r_embedder, self.twin_embedder):
            last = [layer for layer in new.modules() if isinstance(layer, nn.Linear)][-1]
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
        self.train(model.training)
        # bound methods: in a deep copy of this network the hooks are those of the copy
        embedder.register_forward_pre_hook(self._show)
        embedder.register_forward_hook(self._add)
        self.now = None  # the times t, r, (B,) or one for all rows, as long as a call lasts

    def forward(self, x, t, r, cond=None):
        self.check(x, cond)
        check_times(x, t, r)
        embedder = self.model.get_submodule(self.family.embedder)  # which a model may keep in float32, and says so
        dtype = getattr(self.model, "dtype", next(embedder.parameters()).dtype)
        cond = {name: cond[name].to(dtype) if self._has_width(name) else cond[name] for name in cond}
        self.now = t.float(), r.float()
        try:
            inputs = self.family.inputs(self.model, x.to(dtype), self.family.clock(t.float().abs()), cond)
            y = self.model(**inputs, return_dict=False)[0]
        finally:
            self.now = None
        return self.family.output(y, x).to(x.dtype)

    def let_go(self):
        """Leave the model as it was before this was made of it."""
        embedder = self.model.get_submodule(self.family.embedder)
        for hooks in (embedder._forward_hooks, embedder._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]

    def blocks(self):
        """All transformer blocks, in the order of use."""
        return [block for path in self.family.blocks for block in self.model.get_submodule(path)]

    def _has_width(self, name):
        """Whether a condition is embeddings or latents, which the model takes in its own precision."""
        return bool({**self.cond, **self.family.optional}[name]) and not name.endswith("mask")

    def _sinusoids(self, time, dtype):
        time = time * self.family.unit(self.model.config)
        make = self.family.sinusoids
        if make is None:
            return time
        return (make if callable(make) else self.model.get_submodule(make))(time).to(dtype)

    def _show(self, embedder, args):
        """Before the embedder: the time in full precision in place of the one the model made."""
        if self.now is not None:
            rows = self.family.rows(self.model.config, len(args[0]))
            t = self.now[0].to(args[0].device).expand(rows)
            return torch.cat([self._sinusoids(self.family.clock(t.abs()), args[0].dtype), args[0][rows:]])

    def _add(self, embedder, args, emb):
        """After the embedder: the terms of r and of the twin."""
        if self.now is None:
            return None
        rows = self.family.rows(self.model.config, len(emb))
        t, r = (time.to(emb.device).expand(rows) for time in self.now)
        dtype = next(self.r_embedder.parameters()).dtype
        emb_r = self.r_embedder(self._sinusoids(self.family.second(t, r), dtype)).float()
        emb_twin = self.twin_embedder(self._sinusoids(self.family.clock(t.abs()), dtype)).float()
        (first, second), twin = self.family.shares(t, r), expand(torch.signbit(t), emb_r)
        whole = first * emb[:rows].float() + expand(second, emb_r) * emb_r + twin * emb_twin
        return torch.cat([whole.to(emb.dtype), emb[rows:]])

    def check(self, x, cond):
        """Raise ValueError, in one line, for inputs that the model does not take."""
        fits = x.ndim == 1 + len(self.axes) and all(
            size == by if axis == "C" else size % by == 0 for size, (axis, by) in zip(x.shape[1:], self.axes.items())
        )
        if not fits or not x.is_floating_point():
            wanted = ", ".join(str(by) if axis == "C" else axis for axis, by in self.axes.items())
            multiples = [f"{axis} of {by}" for axis, by in self.axes.items() if axis != "C" and by > 1]
            wanted = f"floats (B, {wanted})" + (f" with multiples in {', '.join(multiples)}" if multiples else "")
            raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, this model takes {wanted}")
        cond = {} if cond is None else cond
        known = {**self.cond, **self.family.optional}
        if not isinstance(cond, dict) or not self.cond.keys() <= cond.keys() <= known.keys():
            got = ", ".join(cond) or "none" if isinstance(cond, dict) else type(cond).__name__
            more = f" and perhaps {', '.join(self.family.optional)}" if self.family.optional else ""
            raise ValueError(f"cond must be a dict of {', '.join(self.cond)}{more}, got {got}")
        lengths = {}
        for name, axes in known.items():
            if name in cond:
                self._check_condition(name, axes, cond[name], len(x), lengths)

    def _check_condition(self, name, axes, value, rows, lengths):
        """Raise ValueError unless a condition has its axes; those that are free are written down in `lengths`."""
        if value.ndim == 1 + len(axes):
            for axis, size in zip(axes, value.shape[1:]):
                if free(axis) and size % self.axes.get(axis[0], 1) == 0:
                    lengths.setdefault(axis, size)
        shape, mask = (rows, *sizes(axes, self.model.config, lengths)), name.endswith("mask")
        if tuple(value.shape) != shape or value.is_floating_point() == mask:
            kind = "whole numbers or bool" if mask else "floating-point"
            wanted = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
            raise ValueError(
                f"{name} must be {kind} of shape {wanted}, got {value.dtype} of shape {tuple(value.shape)}"
            )
