"""The peers on the tensors of `public.json`, against what the authors' code, where there is any, said of the same.

There the network is the field tanh(1.3 x + 0.7 t - 0.4 r) + 0.2 x t, and noise and times are fixed. Papers and codes
take sums over the elements of a sample where we take means, and divide by d + another small number; here that is put in
the place of ours, and what is compared is the gradient in the network's answers, a row a sample.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from tinytwinflow import peers
from tinytwinflow.nets import PredictsData
from tinytwinflow.peers import (
    alpha_flow,
    common,
    drifting,
    euler_mean_flow,
    freeflow,
    improved_meanflow,
    meanflow,
    self_distillation,
    soflow,
)
from tinytwinflow.peers.common import weighed

PUBLIC = json.loads((Path(__file__).parent / "public.json").read_text())
close = partial(torch.testing.assert_close, atol=2e-7, rtol=2e-7)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


class Toy(torch.nn.Module):
    """The field of the file; `free` is added to each answer that has a gradient, so that it can be read off."""

    classes = 0

    def __init__(self, rows):
        super().__init__()
        self.free = torch.nn.Parameter(torch.zeros(rows, 2, dtype=torch.float64))

    def forward(self, x, t, r, cond=None):
        y = torch.tanh(1.3 * x + 0.7 * t[:, None] - 0.4 * r[:, None]) + 0.2 * x * t[:, None]
        return y + self.free[: len(y)] if torch.is_grad_enabled() else y


def gradient(monkeypatch, room, loss, points, floor=None, wrap=lambda net: net, n=0, **more):
    """Of the loss in the answers of the field, with the noise and the times of the file; the first n are flow rows."""
    x, z, t, r = points
    parts, x_t = (n / len(x), 1 - n / len(x)), t[:, None] * z + (1 - t[:, None]) * x
    rows = common.Lines(x, None, x_t, z - x, t, torch.cat([t[:n], r[n:]]), n, parts, (n, len(x) - n))
    monkeypatch.setattr(room, "lines", lambda *_: rows)
    if floor is not None:
        monkeypatch.setattr(room, "weighed", partial(weighed, floor=floor))
    net = Toy(len(x))
    loss(wrap(net), x, **more).total.backward()
    return net.free.grad


POINTS = [tensor(PUBLIC["points"][name]) for name in "xztr"]


def test_meanflow(monkeypatch):
    public = PUBLIC["meanflow"]
    close(2 * gradient(monkeypatch, meanflow, peers.MeanFlow(power=0.0), POINTS), tensor(public["grad_F_undivided"]))
    found = 2**0.25 * gradient(monkeypatch, meanflow, peers.MeanFlow(power=0.75), POINTS, floor=5e-4)
    close(found, tensor(public["grad_F"]))


def test_improved_meanflow(monkeypatch):
    public, (x, z, _, _) = PUBLIC["improved meanflow"], POINTS
    found = gradient(monkeypatch, improved_meanflow, peers.ImprovedMeanFlow(power=0.0), POINTS)
    close(5 * found, tensor(public["V"]) - (z - x))
    close(gradient(monkeypatch, improved_meanflow, peers.ImprovedMeanFlow(), POINTS, 5e-3), tensor(public["grad_F"]))


def test_pixel_meanflow(monkeypatch):
    """In the answer X of the wrapped network; the last row is at t = 0.03, below the floor."""
    public, (x, z, t, _) = PUBLIC["pixel meanflow"], POINTS
    x_t, c = t[:, None] * z + (1 - t[:, None]) * x, t.clamp(min=0.05)[:, None]
    found = gradient(monkeypatch, improved_meanflow, peers.PixelMeanFlow(power=0.0), POINTS, wrap=PredictsData)
    close(5 * found, -(tensor(public["V"]) - (x_t - x) / c) / c)
    found = gradient(monkeypatch, improved_meanflow, peers.PixelMeanFlow(), POINTS, 5e-3, wrap=PredictsData)
    close(found, tensor(public["grad_X"]))


@pytest.mark.parametrize("a", ["1.0", "0.5", "0.1", "0.005", "0.0"])
def test_alpha_flow(monkeypatch, a):
    public, (_, _, t, r) = PUBLIC["alpha-flow"], POINTS
    monkeypatch.setattr(peers.AlphaFlow, "part", lambda self, progress: float(a))
    floor = torch.where(t > r, 1e-3 / (float(a) or 1.0) ** 2, 1e-3)  # theirs does not go with a^2
    found = 5 * gradient(monkeypatch, alpha_flow, peers.AlphaFlow(), POINTS, floor, n=1)
    close(found, tensor(public["grad_F_of_sum"][a]), atol=1e-6)


def test_the_schedule_of_alpha_flow():
    for step, a in PUBLIC["alpha-flow"]["schedule of 400000"].items():
        assert peers.AlphaFlow().part(int(step) / 400000) == pytest.approx(a, abs=1e-9)


def test_soflow(monkeypatch):
    """Its times are those of the file in the rows that are no flow rows, the first one is."""
    public, rows = PUBLIC["soflow"], [values[1:] for values in POINTS]
    found = gradient(monkeypatch, soflow, peers.SoFlow(), POINTS, 0.01, n=5)
    close(found, tensor(public["flow"]))
    loss = peers.SoFlow()
    close(gradient(monkeypatch, soflow, loss, rows, 0.01, progress=0.0), tensor(public["images, at first"]))
    loss = peers.SoFlow(first=1.0, last=0.0003125, power=0.75)
    close(gradient(monkeypatch, soflow, loss, rows, 1e-3, progress=0.5), tensor(public["CIFAR, half-way"]))


def test_euler_mean_flow(monkeypatch):
    public = PUBLIC["euler mean flow"]
    points, delta = [tensor(public[name]) for name in "xztr"], public["delta"]
    found = gradient(monkeypatch, euler_mean_flow, peers.EulerMeanFlow(dt=delta, power=0.0), points)
    x, z, t, r = points
    F = Toy(4)(t[:, None] * z + (1 - t[:, None]) * x, t, r).detach()
    close(4 * found, F - tensor(public["target"]), atol=2e-6)  # of which the file has eight digits


def test_drifting(monkeypatch):
    public = PUBLIC["drifting"]
    z, y = tensor(public["z"]), tensor(public["data"])
    x = z - Toy(5)(z, torch.ones(5), torch.zeros(5)).detach()
    itself = torch.eye(5, 11, dtype=torch.bool)
    for temperature, V in public["V"].items():
        close(drifting.force(x, y, float(temperature), itself), tensor(V), atol=1e-6)
    monkeypatch.setattr(drifting, "normal", lambda *_: z)
    net, images = Toy(5), public["images, 0.5 and 1"]
    out = peers.Drifting(temperatures=(0.5, 1.0))(net, y)
    out.total.backward()
    assert out.total.item() == pytest.approx(images["loss"], rel=1e-3)  # which has a floor under small weights
    close(net.free.grad, -tensor(images["grad_x"]), atol=2e-3)


def test_freeflow(monkeypatch):
    """All four rows in both terms. The correction's length is alpha |D_G| / |D_N|, |D_G| as it is before its weight."""
    public = PUBLIC["freeflow"]
    z, n, r, t = (tensor(public[name]) for name in "znrt")
    net, D_N = Toy(4), tensor(public["D_N"])
    original = lambda x, t, r, cond: 0.7 * torch.tanh(x - 0.5 * t[:, None]) + 0.1 * x  # noqa: E731
    fake = lambda x, t, r, cond: 0.5 * torch.tanh(1.1 * x + 0.3 * t[:, None]) - 0.05 * x  # noqa: E731
    monkeypatch.setattr(freeflow, "normal", lambda x, *_: z[: len(x)])
    monkeypatch.setattr(freeflow, "uniform", lambda *_: r)
    monkeypatch.setattr(
        freeflow, "renoise", lambda x, s, *_: ((1 - s[:, None]) * x + s[:, None] * n[: len(x)], n[: len(x)] - x)
    )
    close(freeflow.along_target(net, original, z, torch.ones_like(r), r), tensor(public["D_G"]))
    monkeypatch.setattr(freeflow, "both_parts", lambda *_: (slice(0, 4), slice(0, 4)))
    monkeypatch.setattr(torch, "randn", lambda rows, **_: (t / (1 - t)).log()[:rows] - 0.8)
    out = peers.FreeFlow()(net, torch.zeros(4, 2).double(), original, fake)
    expected = tensor(public["weight"])[:, None] * tensor(public["D_G"])
    close(torch.autograd.grad(out.prediction, net.free, retain_graph=True)[0], expected / 8, atol=1e-6)
    found = torch.autograd.grad(out.correction, net.free)[0]
    close(found, public["lambda"] * D_N / 8, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(freeflow, "both_parts", lambda *_: (slice(0, 4), slice(0, 2)))
    out = peers.FreeFlow(alpha=0.5)(net, torch.zeros(4, 2).double(), original, fake)
    scale = 0.5 * tensor(public["D_G"]).norm(dim=1).mean() / D_N[:2].norm(dim=1).mean()
    found = torch.autograd.grad(out.correction, net.free)[0]
    close(found[:2], scale * D_N[:2] / 4, atol=1e-4, rtol=1e-4)


def test_adversarial_self_distillation(monkeypatch):
    """The generator's term has a noise for each sample, the critic's the same one for both, so it is called twice."""
    public = PUBLIC["adversarial self-distillation"]
    x_n, better, tau = (tensor(public[name]) for name in ("x_n", "x_np1", "tau"))
    x_n.requires_grad_()
    critic = lambda x, t, r, cond: (  # noqa: E731
        torch.tanh(0.9 * x + 0.3 * t[:, None]) @ tensor([[1.0], [-0.5]])
    )
    field = lambda x, t, r, cond: torch.tanh(x)  # noqa: E731
    monkeypatch.setattr(self_distillation, "few_steps", lambda *_: x_n)
    monkeypatch.setattr(self_distillation, "sample", lambda *_, **__: better)
    monkeypatch.setattr(self_distillation, "uniform", lambda *_: tau)

    def out_of(first, second, penalty=0.0):
        noises = iter([tensor(public[name]) for name in (first, first, second)])  # the first is of the fakes' velocity
        draws = iter([x_n, x_n, tensor(public["r2_eps"]), tensor(public["r1_eps"])])
        monkeypatch.setattr(
            self_distillation, "renoise", lambda x, t, _: (common.interpolate(x, z := next(noises), t), z - x)
        )
        monkeypatch.setattr(self_distillation, "normal", lambda *_: next(draws))
        loss = peers.SelfDistillation(gan=0.3, critic_weight=0.7, penalty=penalty)
        return loss(field, x_n.detach(), field, field, critic)

    out = out_of("gen_noise_n", "gen_noise_np1")
    close(out.adversarial.item(), 0.3 * public["adversarial"], atol=1e-7)
    close(torch.autograd.grad(out.adversarial, x_n)[0], 0.3 * tensor(public["grad_x_n"]), atol=1e-7)
    shared = ("critic_shared_noise", "critic_shared_noise")
    close(out_of(*shared).critic.item(), 0.7 * public["critic"], atol=1e-7)
    both = public["R1"] + public["R2"]
    close(out_of(*shared, 1.0).critic.item(), 0.7 * (public["critic"] + both / 2), atol=1e-7)


def test_apex_as_printed():
    public = PUBLIC["apex"]
    x, z, t, c = (tensor(public[name]) for name in "xztc")
    free = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)

    def field(x, t, r, cond):
        shifted = bool(torch.signbit(t).any())
        cond = public["a"] * cond + public["b"] if shifted else cond
        y = torch.tanh(1.3 * x + 0.3 * t.abs()[:, None] + 0.5 * cond) + 0.2 * x * t.abs()[:, None]
        return y if shifted else y + free

    parts = peers.APEX(mixing=public["lam"]).as_printed(field, x, z, t, torch.zeros_like(t), c)
    for name in ("fake", "mixed"):  # sums over the elements of a sample
        close(2 * parts[name], tensor(public[name]).mean(), atol=1e-7)
        found = torch.autograd.grad(parts[name], free, retain_graph=True)[0]
        close(8 * found, tensor(public[f"grad_{name}"]), atol=1e-7)
