"""A network is a velocity field: right shapes, both signs of time told apart, null label like any other."""

import copy
import dataclasses
import math
import types

import pytest
import torch
from conftest import arrays, inside, seeds
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as f

import tinytwinflow as ttf
from tinytwinflow.method.draws import draw_for
from tinytwinflow.nets import MLP, DiT, PredictsData, Shifted, UNet, dit, load_published
from tinytwinflow.nets.dit import from_epsilon, positions
from tinytwinflow.nets.shifted import Shift
from tinytwinflow.training.distributed import blocks_of, compile_as, prepare
from tinytwinflow.training.loop import autocast

close = torch.testing.assert_close


def awake(net, seed=0):
    """The network with every parameter at random: a new one is zero, and its twin equal to the real field."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(1, p[0].numel()) ** 0.5
    return net.requires_grad_(False)


KINDS = {
    "mlp": (lambda classes=0: MLP(2, 32, 3, classes), (2,)),
    "sharp mlp": (lambda classes=0: MLP(2, 32, 3, classes, sharp=True), (2,)),
    "dit": (lambda classes=0: DiT(4, 3, classes, 16, 2, 2, 2), (3, 4, 4)),
    "unet": (lambda classes=0: UNet(4, 3, classes, (8, 8), 1), (3, 4, 4)),
}
kinds = st.sampled_from(sorted(KINDS))


def batch(kind, B, seed=0):
    return torch.randn(B, *KINDS[kind][1], generator=torch.Generator().manual_seed(seed))


@given(kinds, st.integers(1, 5))
def test_a_new_network_is_zero_in_the_shape_of_x(kind, B):
    x, t = batch(kind, B), torch.rand(B)
    for sign in (1, -1):
        F = KINDS[kind][0]()(x, sign * t, sign * t)
        assert F.shape == x.shape and not F.any()


@given(kinds, seeds, st.one_of(inside, st.just(1.0)))
def test_the_sign_of_time_is_seen_at_every_time(kind, seed, t):
    """t = 1 included."""
    net, x, t = awake(KINDS[kind][0](), seed), batch(kind, 1), torch.tensor([t])
    assert (net(x, t, t) - net(x, -t, -t)).abs().max() > 1e-6


@given(kinds, seeds, inside, inside)
def test_the_target_time_is_seen(kind, seed, t, r):
    assume(abs(t - r) > 0.01)
    net, x, t, r = awake(KINDS[kind][0](), seed), batch(kind, 1), torch.tensor([t]), torch.tensor([r])
    assert (net(x, t, r) - net(x, t, t)).abs().max() > 1e-6


@given(kinds, seeds)
def test_rows_do_not_see_each_other(kind, seed):
    net, x, t, r = awake(KINDS[kind][0](3), seed), batch(kind, 4), torch.rand(4), torch.rand(4)
    c = torch.arange(4)
    together, alone = net(x, t, r, c), [net(x[[i]], t[[i]], r[[i]], c[[i]]) for i in range(4)]
    close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


@given(kinds, seeds)
def test_every_label_matters_the_null_label_too(kind, seed):
    net, x, t = awake(KINDS[kind][0](3), seed), batch(kind, 1).expand(4, *KINDS[kind][1]), torch.full((4,), 0.5)
    F = net(x, t, t, torch.arange(4))
    assert all((F[i] - F[j]).abs().max() > 1e-6 for i in range(4) for j in range(i))


TWINS = {
    "mlp": lambda net: (net.twin_in, net.twin_out),
    "sharp mlp": lambda net: (net.twin_in, net.twin_out),
    "dit": lambda net: (net.times.twin.mlp[2],),
    "unet": lambda net: (net.times.twin.mlp[2],),
}


@given(kinds, seeds, inside)
def test_the_twin_is_born_equal_to_the_real_field(kind, seed, t):
    """Whatever the real field has learnt: until the twin's own layers move, the gap is zero."""
    fresh, net = KINDS[kind][0](), awake(KINDS[kind][0](), seed)
    for new, layer in zip(TWINS[kind](fresh), TWINS[kind](net)):
        layer.load_state_dict(new.state_dict())
    x, t = batch(kind, 1), torch.tensor([t])
    assert torch.equal(net(x, t, t), net(x, -t, -t))


@given(st.sampled_from(["dit", "unet"]), seeds, inside, inside)
def test_a_new_jump_starts_as_the_velocity(kind, seed, t, r):
    """Until the embedding of r moves, F(x, t, r) = F(x, t, t): training begins at the flow model."""
    fresh, net = KINDS[kind][0](), awake(KINDS[kind][0](), seed)
    net.times.r.mlp[2].load_state_dict(fresh.times.r.mlp[2].state_dict())
    x, t, r = batch(kind, 1), torch.tensor([t]), torch.tensor([r])
    assert torch.equal(net(x, t, r), net(x, t, t))


@settings(max_examples=10)
@given(st.sampled_from(["dit", "unet"]), seeds, inside)
def test_times_keep_full_precision_in_bfloat16(kind, seed, t):
    """d/dt of the embedding survives weights and autocast in bfloat16, which cannot tell 0.99 from 0.992."""
    net, t = awake(KINDS[kind][0](), seed), torch.tensor([t, t + 0.002])
    exact = net.times(t, 0.3 * t)
    half = copy.deepcopy(net).bfloat16()
    net.times.load_state_dict(half.times.state_dict())
    exact = net.times(t, 0.3 * t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.times(t, 0.3 * t), exact)
        assert torch.equal(net.times(t, 0.3 * t), exact)
    assert (exact[0] - exact[1]).abs().max() > 0


@settings(max_examples=10)
@given(st.sampled_from(["dit", "unet"]), seeds)
def test_bfloat16_stays_close_to_float32(kind, seed):
    net, x, t, r = awake(KINDS[kind][0](3), seed), batch(kind, 4), torch.rand(4), torch.rand(4)
    exact = net(x, t, r, torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        auto = net(x, t, r, torch.arange(4))
    for F in (auto, net.bfloat16()(x, t, r, torch.arange(4))):
        assert F.dtype == torch.float32 and F.isfinite().all()
        assert (F - exact).norm() < 0.05 * exact.norm()


def gradients_of(net, kind):
    """Value and gradients of the whole loss of a batch with labels."""
    x, label, loss = batch(kind, 6), torch.arange(6) % 3, ttf.TwinFlowLoss(share=1 / 3, guidance=0.5)
    net.zero_grad()
    total = loss(net, x, label, null=torch.tensor([3]), generator=torch.Generator().manual_seed(0)).total
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in net.parameters())]


class Backend:
    """Stands in for inductor, which writes and builds code for minutes: the traced graphs run as they are."""

    def __init__(self, monkeypatch):
        self.modes, self.graphs, self.compile = [], 0, torch.compile
        monkeypatch.setattr(torch, "compile", self)

    def __call__(self, model, mode=None):
        self.modes.append(mode)
        return self.compile(model, backend=aot_autograd(fw_compiler=self.keep))

    def keep(self, graph, inputs):
        self.graphs += 1
        return make_boxed_func(graph.forward)


@pytest.mark.parametrize("kind, how", [("dit", "default"), ("unet", "graphs")])
def test_compiled_equals_eager(kind, how, monkeypatch):
    """Value and gradient of the whole loss, traced by torch.compile; "graphs" asks for CUDA graphs."""
    net = awake(KINDS[kind][0](3)).requires_grad_(True)
    eager, backend = gradients_of(net, kind), Backend(monkeypatch)
    compile_as(net, how)
    for a, b in zip(gradients_of(net, kind), eager):
        close(a, b, atol=1e-4, rtol=1e-3)
    assert backend.modes == (["reduce-overhead"] if how == "graphs" else [None] * 2) and backend.graphs >= 2
    made = len(backend.modes)
    compile_as(net, "none")
    assert len(backend.modes) == made


@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_one_kind_are_compiled_once(recompute, graphs):
    """As many graphs for twelve blocks as for two: with gradient, without, and without on the teacher, whose weights
    want none. A U-Net has no more than those for each kind and size of its layers."""

    def made(net, kind):
        before, teacher = len(graphs), copy.deepcopy(net).requires_grad_(False)
        for each in (net, teacher):
            prepare(each, recompute=recompute, compile="default")
        x, label, loss = batch(kind, 12), torch.arange(12) % 3, ttf.TwinFlowLoss()
        for _ in range(2):
            loss(net, x, label, teacher).total.backward()
        return len(graphs) - before

    few, many = (made(DiT(4, 3, 3, 16, depth, 2, 2), "dit") for depth in (2, 12))
    assert few == 3 and many == 0, (few, many)
    net = UNet(4, 3, 3, (8, 8), 2)
    kinds_of_layer = {str(layer) for layer in net.blocks()}
    assert made(net, "unet") < 3 * 2 * len(kinds_of_layer) < 3 * len(net.blocks())  # of two sizes
    names = [type(layer).__name__ for layer in net.blocks()]
    assert names == ["Residual"] * 5 + ["Middle"] + ["Residual"] * 7


@pytest.mark.parametrize("kind, rows, loss", [
    ("sharp mlp", 24, {"jump_c": 0.12}), ("dit", 24, {"guidance": 0.5, "guidance_range": (0.2, 0.6)}),
    ("dit", 7, {"data_free": True}), ("unet", 7, {}),
])  # fmt: skip
def test_nothing_is_compiled_after_the_fifth_step_of_a_phase(kind, rows, loss, graphs):
    """Over 200 steps, with parts that are no whole share of the batch and parts of one row, whatever is sampled."""
    net = UNet(4, 3, 3, (8,), 1) if kind == "unet" else KINDS[kind][0](3)
    state = ttf.training.new_state(net, lr=1e-3, place=lambda net: prepare(net, compile="default"))
    x, label, found = batch(kind, rows), torch.arange(rows) % 3, []
    options = {"warmup_steps": 40, "base_steps": 40, "null": 3, "label_dropout": 0.5}
    for record in ttf.training.train(state, ttf.TwinFlowLoss(**loss), lambda i: (x, label), 200, **options):
        found.append(len(graphs))
        if record["step"] % 50 == 0:
            with autocast("cpu", "float32"):
                ttf.sample(state.average, batch(kind, 5), 4, cond=torch.zeros(5).long())
    assert found[4] == found[39] and found[44] == found[79] and found[84] == found[199] and 0 < found[199], found


def test_a_time_that_is_given_twice_is_no_other_code(graphs):
    """As velocity, r is t, one tensor; as jump it is another. A part of a tensor is as good as one of its own."""
    net, x, t = awake(KINDS["mlp"][0](3)), batch("mlp", 9), torch.linspace(0.1, 1, 9)
    wanted = [net(x[:n], t[:n], r[:n], torch.zeros(n).long()) for n, r in ((9, t), (9, t / 2), (4, t), (5, t / 2))]
    compile_as(net, "default")
    found = [net(x, t, t, torch.zeros(9).long()), net(x, t, t / 2, torch.zeros(9).long())]
    found.append(net(x[:4], t[:4], t[:4], torch.zeros(4).long()))
    found.append(net(x[:5], t[:5], t[:5] / 2, torch.zeros(5).long()))
    for a, b in zip(found, wanted):
        close(a, b)
    assert len(graphs) == 1


def test_a_compiled_network_is_kept_whole_and_read_as_it_was(graphs, tmp_path):
    """torch.save of the network itself, not of its weights: read again it is the same function, not compiled."""
    net, x, t = awake(KINDS["dit"][0](3)), batch("dit", 4), torch.rand(4)
    prepare(net, compile="default")
    same = net(x, t, t, torch.zeros(4).long())
    torch.save(net, tmp_path / "net.pt")
    again = torch.load(tmp_path / "net.pt", weights_only=False)
    made = len(graphs)
    close(again(x, t, t, torch.zeros(4).long()), same)
    assert len(graphs) == made


def test_a_forward_that_is_no_method_is_not_passed_by():
    """One that somebody put on a network is compiled if it is a method of it, and refused if not."""
    net = KINDS["mlp"][0]()
    net.forward = types.MethodType(lambda self, x, t, r, cond=None: 7 * x, net)
    compile_as(net, "default")
    assert torch.equal(net(torch.ones(3, 2), torch.ones(3), torch.ones(3)), torch.full((3, 2), 7.0))
    net.forward = lambda x, t, r, cond=None: 7 * x
    with pytest.raises(ValueError, match="MLP.forward is no method of its own: choose compile none"):
        compile_as(net, "default")


def test_a_copy_of_a_compiled_network_has_weights_of_its_own(graphs):
    net, x, t = awake(KINDS["dit"][0](3)), batch("dit", 4), torch.rand(4)
    prepare(net, recompute=True, compile="default")
    other = copy.deepcopy(net)
    same = net(x, t, t, torch.zeros(4).long())
    for p in other.blocks.parameters():
        p.data.mul_(2)
    assert torch.equal(net(x, t, t, torch.zeros(4).long()), same)
    assert not torch.equal(other(x, t, t, torch.zeros(4).long()), same)


def test_what_inductor_builds_equals_eager():
    """Value and gradient of one call of the smallest network, by the code that users run."""
    net, x, t = awake(KINDS["mlp"][0](3)).requires_grad_(True), batch("mlp", 6), torch.linspace(0.1, 1, 6)

    def found():
        value = net(x, t, -t, torch.arange(6) % 4)
        return [value.detach(), *torch.autograd.grad(value.square().sum(), list(net.parameters()))]

    eager = found()
    compile_as(net, "default")
    for a, b in zip(found(), eager):
        close(a, b, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["inductor"], "inductor was at work"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are recorded on a GPU alone")
def test_cuda_graphs_train_as_eager_does():
    """All phases of training, replayed often enough that every graph has been recorded, and sampling after them."""

    def trained(how):
        torch.manual_seed(0)
        state = ttf.training.new_state(KINDS["dit"][0](3).cuda(), lr=0.02, place=lambda net: compile_as(net, how))
        x, label = batch("dit", 9).cuda(), (torch.arange(9) % 3).cuda()
        loss = ttf.TwinFlowLoss(guidance=0.5)
        for _ in ttf.training.train(state, loss, lambda i: (x, label), 24, warmup_steps=6, base_steps=6, null=3):
            pass
        samples = [ttf.sample(state.average, x, 4, "multi", order, cond=label) for order in (1, 2, 2, 2)]
        shortcut = ttf.peers.PEERS["shortcut"]()
        for _ in ttf.training.train(state, shortcut, lambda i: (x, label), 40, null=3):
            pass
        return [*state.net.parameters(), *state.average.parameters(), *samples]

    for a, b in zip(trained("graphs"), trained("none")):
        close(a, b, atol=1e-4, rtol=1e-3)


def test_an_answer_of_a_graph_outlives_the_next_call(monkeypatch):
    """As a CUDA graph does, what stands in for it here writes each answer into the same memory."""
    net, x, label = awake(KINDS["dit"][0](3)), batch("dit", 9), torch.arange(9) % 3
    wanted = ttf.sample(net, x, 4, "multi", 2, cond=label)

    def recorded(forward, mode=None):
        memory = torch.empty_like(x)
        return lambda *given: memory.copy_(forward(*given))

    monkeypatch.setattr(torch, "compile", recorded)
    compile_as(net, "graphs")
    assert torch.equal(ttf.sample(net, x, 4, "multi", 2, cond=label), wanted)


# Published weights. The oracle is their network written out from its parameter names, in float64.


def published(size, patch, channels, classes, width, depth, twice, seed):
    """Random weights with the names and shapes of a DiT or SiT checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "pos_embed": (1, (size // patch) ** 2, width),
        "final_layer.linear.weight": (patch**2 * channels * (2 if twice else 1), width),
        "final_layer.linear.bias": (patch**2 * channels * (2 if twice else 1),),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for i in range(depth):
        for name, (o, n) in {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": (o, n), f"blocks.{i}.{name}.bias": (o,)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run_published(w, x, t, y, patch, depth, heads):
    """The network of the checkpoint's authors: t as they count it, the first half of a doubled output."""
    w = {name: value.double() for name, value in w.items()}

    def linear(name, h):
        return f.linear(h, w[name + ".weight"], w[name + ".bias"])

    B, C, H, _ = x.shape
    k = torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    c = torch.cat([(t[:, None] * k).cos(), (t[:, None] * k).sin()], 1)
    c = linear("t_embedder.mlp.2", f.silu(linear("t_embedder.mlp.0", c))) + w["y_embedder.embedding_table.weight"][y]
    h = f.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch).flatten(2).mT + w["pos_embed"]
    norm = lambda h: f.layer_norm(h, h.shape[-1:], eps=1e-6)  # noqa: E731
    for i in range(depth):
        m = linear(f"blocks.{i}.adaLN_modulation.1", f.silu(c))[:, None].chunk(6, -1)
        q, key, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + m[1]) + m[0]).chunk(3, -1)
        q, key, v = (a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, key, v))
        weights = (q @ key.mT / q.shape[-1] ** 0.5).softmax(-1)
        h = h + m[2] * linear(f"blocks.{i}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = f.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]), approximate="tanh")
        h = h + m[5] * linear(f"blocks.{i}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", f.silu(c))[:, None].chunk(2, -1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    side, out = H // patch, h.shape[-1] // patch**2
    return torch.einsum("nhwpqc->nchpwq", h.view(B, side, side, patch, patch, out)).reshape(B, out, H, H)[:, :C]


SIZE = {"size": 8, "patch": 2, "channels": 3, "classes": 5, "width": 16, "depth": 2}


def loaded(tmp_path, kind, twice, seed, wrap=lambda w: w):
    w = published(**SIZE, twice=twice, seed=seed)
    torch.save(wrap(w), tmp_path / "published.pt")
    net = DiT(8, 3, 5, 16, 2, 2, 2, epsilon=kind == "dit")
    load_published(net, tmp_path / "published.pt", kind)
    return w, net.requires_grad_(False)


@settings(max_examples=10)
@given(seeds, st.booleans(), st.booleans(), inside)
def test_sit_weights_give_the_same_function_with_time_and_velocity_turned(tmp_path_factory, seed, twice, ema, t):
    """SiT flows from noise at 0 to data at 1: F(x, t, t) = -SiT(x, 1 - t), for every label, null included."""
    wrap = (lambda w: {"ema": w}) if ema else lambda w: w
    w, net = loaded(tmp_path_factory.mktemp("sit"), "sit", twice, seed, wrap)
    x, y, t = torch.randn(6, 3, 8, 8), torch.arange(6), torch.full((6,), t)
    expected = -run_published(w, x.double(), 1 - t.double(), y, 2, 2, 2)
    close(net(x, t, t, y).double(), expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


@settings(max_examples=10)
@given(seeds, st.integers(1, 998))
def test_dit_weights_give_the_velocity_of_their_noise_prediction(tmp_path_factory, seed, step):
    """At step s of DDPM, x_s = sqrt(a) x + sqrt(1 - a) e. On the straight path the same point is x_t at
    t = sqrt(1 - a) / (sqrt(a) + sqrt(1 - a)), shrunk by their sum, and v = e - x."""
    w, net = loaded(tmp_path_factory.mktemp("dit"), "dit", True, seed)
    a = (1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0)[step]
    x_s, y = torch.randn(6, 3, 8, 8).double(), torch.arange(6)
    e = run_published(w, x_s, torch.full((6,), float(step)).double(), y, 2, 2, 2)
    clean = (x_s - (1 - a).sqrt() * e) / a.sqrt()
    total = a.sqrt() + (1 - a).sqrt()
    t = ((1 - a).sqrt() / total).expand(6)
    F = net((x_s / total).float(), t.float(), t.float(), y).double()
    error = (F - (e - clean)).abs().max() / (e - clean).abs().max()
    assert error < 2e-3 / min(1, (1 - t[0]) * 20)


def test_a_translated_noise_prediction_is_exact_for_a_gaussian():
    """Data N(0, s^2): the best noise prediction is linear, and so is the velocity it must become."""
    s, t = 0.7, torch.linspace(0.02, 0.98, 25)
    x = torch.randn(25, 1, 2, 2)

    def predict(x, step):
        alpha = (1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0)
        log_snr, low = (alpha / (1 - alpha)).log(), step.long().clamp(max=998)
        between = log_snr[low] + (log_snr[low + 1] - log_snr[low]) * (step - low)
        a = between.sigmoid().float().view(-1, 1, 1, 1)
        return (1 - a).sqrt() / (a * s**2 + 1 - a) * x

    T = t.view(-1, 1, 1, 1)
    exact = (T - (1 - T) * s**2) / (T**2 + (1 - T) ** 2 * s**2) * x
    close(from_epsilon(predict, x, t), exact, atol=2e-3, rtol=2e-3)


def test_a_file_that_is_not_the_checkpoint_is_refused(tmp_path):
    w, net = loaded(tmp_path, "sit", True, 0)
    path = tmp_path / "other.pt"

    def refused(content, match, net=net, kind="sit"):
        torch.save(content, path)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        with pytest.raises(ValueError, match=match) as error:
            load_published(net, path, kind)
        assert len(str(error.value).splitlines()) == 1
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    refused({**w, "head.weight": torch.zeros(3)}, r"head.weight is \(3,\) there, None here")
    refused({name: v for name, v in w.items() if name != "pos_embed"}, r"pos_embed is not there\)")
    refused({**w, "y_embedder.embedding_table.weight": torch.zeros(5, 16)}, r"label.weight is \(5, 16\) there")
    refused([1, 2], "holds a list, and weights neither there nor under average, ema, model, state_dict, net")
    refused(w, r"kind is 'sit', for a net with epsilon=False", kind="dit")
    refused(w, "x_embedder.weight is|blocks", net=DiT(8, 3, 5, 32, 2, 2, 2))
    for content in (b"PK", b"\x80", b"\x80\x02X\x05", b"\x80\x02h\x07.", b"\x80\x02X\x01\0\0\0\xff."):
        path.write_bytes(content)  # each makes the reader raise another kind of error
        with pytest.raises(ValueError, match="cut short or is no checkpoint") as error:
            load_published(net, path, "sit")
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="no such checkpoint"):
        load_published(net, tmp_path / "nowhere.pt", "sit")


def test_published_sizes_have_their_published_numbers_of_parameters():
    """33, 130, 458 and 675 million at patch 2 (arXiv 2212.09748, Table 1), without the embeddings of r and the twin
    and the learned variance."""
    for name, millions in {"s-2": 33, "b-2": 130, "l-2": 458, "xl-2": 675}.items():
        with torch.device("meta"):
            net = dit(name)
        own = sum(p.numel() for n, p in net.named_parameters() if not n.startswith(("times.r", "times.twin")))
        assert abs(own / 1e6 - millions) < 1
    with pytest.raises(ValueError, match="unknown DiT 'm-2': choose from s-2, s-4"):
        dit("m-2")


def test_positions_are_sines_and_cosines_of_column_then_row():
    """As in MAE and DiT: element by element for a grid of 3 x 3, width 8."""
    table = positions(8, 3)[0]
    for i, (row, column) in enumerate((row, column) for row in range(3) for column in range(3)):
        expected = [g(a * k) for a in (column, row) for g in (math.sin, math.cos) for k in (1, 0.01)]
        close(table[i], torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_mlp_in_another_type_takes_and_gives_the_type_of_x(dtype):
    torch.manual_seed(0)
    net, x, t = MLP(2, 32, 2, classes=2), torch.randn(50, 2), torch.rand(50)
    torch.nn.init.normal_(net.out.weight, std=0.3)
    exact, other = net(x, t, 0.5 * t, torch.arange(50) % 2), copy.deepcopy(net).to(dtype)
    for answered in (x, x.to(dtype)):
        found = other(answered, t, 0.5 * t, torch.arange(50) % 2)
        assert found.dtype == answered.dtype
        close(found.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int32, torch.bool])
def test_labels_may_be_of_any_whole_kind(kind):
    x, t, label = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 1, 0])
    net = MLP(2, 8, 1, classes=2)
    torch.nn.init.normal_(net.out.weight)
    assert torch.equal(net(x, t, t, label.to(kind)), net(x, t, t, label))


def test_wrong_use_says_what_is_allowed():
    x, t = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="labels must be a tensor of 3 whole numbers, got list"):
        MLP(2, classes=2)(x, t, t, [0, 1, 1])
    with pytest.raises(ValueError, match=r"takes \(B, 2\)"):
        MLP(2)(torch.zeros(3, 4), t, t)
    with pytest.raises(ValueError, match=r"t and r must have shape \(3,\)"):
        MLP(2)(x, torch.zeros(2), t)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\], got 0 to 5"):
        MLP(2, classes=2)(x, t, t, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="labels must be 3 whole numbers"):
        MLP(2, classes=2)(x, t, t, torch.zeros(3))
    with pytest.raises(ValueError, match="this network is conditional"):
        MLP(2, classes=2)(x, t, t)
    with pytest.raises(ValueError, match="takes no cond"):
        MLP(2)(x, t, t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"t must lie in \[-1, 1\]"):
        MLP(2)(x, t - 1.5, t)
    for kind in ("dit", "unet"):
        net = KINDS[kind][0](3)
        for shape in ((3, 3, 5, 5), (3, 1, 4, 4), (3, 48)):
            with pytest.raises(ValueError, match=r"this network takes \(B, 3, 4, 4\)"):
                net(torch.zeros(shape), t, t)
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\], got 0 to 4"):
            net(batch(kind, 3), t, t, torch.tensor([0, 4, 1]))
    with pytest.raises(ValueError, match="size 9 must be a multiple of patch 2"):
        DiT(9)
    with pytest.raises(ValueError, match="size 18 must halve 2 times"):
        UNet(18)


@given(seeds, inside)
def test_a_sharp_network_is_linear_between_its_kinks_and_sees_x_twice_as_large(seed, t):
    """F(x + h) - 2 F(x) + F(x - h) is zero at nearly every x, as it is not for a smooth one."""

    def curvature(sharp):
        net = awake(MLP(2, 32, 3, sharp=sharp).double(), seed)
        x, h, times = batch("mlp", 128, seed).double(), torch.full((128, 2), 1e-3).double(), torch.full((128,), t)
        bend = net(x + h, times, times) - 2 * net(x, times, times) + net(x - h, times, times)
        return bend.norm(dim=1).median()

    assert curvature(True) < 1e-12 < curvature(False)
    net, x, seen = awake(MLP(2, 32, 3, sharp=True), seed), batch("mlp", 3, seed), []
    net.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(x, torch.full((3,), t), torch.full((3,), t))
    assert torch.equal(seen[0][:, :2], 2 * x)


@settings(max_examples=10)
@given(st.sampled_from(["dit", "unet"]), seeds)
def test_the_loss_and_one_step_samples_survive_bfloat16(kind, seed):
    """Weights in bfloat16, data in bfloat16, autocast: every term stays near its float32 value, small dt and all."""
    net, x, label = awake(KINDS[kind][0](3), seed), batch(kind, 12), torch.arange(12) % 3
    loss = ttf.TwinFlowLoss(order=4, gain=4.0, clip=10.0, guidance=0.5)
    half = copy.deepcopy(net).bfloat16()
    net.load_state_dict({name: value.float() for name, value in half.state_dict().items()})

    def value(net, x):
        return torch.stack(loss(net, x, label, null=torch.tensor([3]), generator=torch.Generator().manual_seed(seed)))

    def gradients(net, x):
        total = loss(net, x, label, null=torch.tensor([3]), generator=torch.Generator().manual_seed(seed)).total
        return torch.autograd.grad(total, net.parameters())

    net.requires_grad_(True)
    wanted = torch.cat([g.flatten() for g in gradients(net, x)])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = torch.cat([g.flatten() for g in gradients(net, x)])
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.98
    net.requires_grad_(False)
    exact = value(net, x)
    with torch.autocast("cpu", torch.bfloat16):
        close(value(net, x), exact, atol=0.02, rtol=0.1)
    close(value(half, x), exact, atol=0.02, rtol=0.1)
    # all in bfloat16 but the times: what is drawn for such data, the loss of it, and what is sampled from such noise
    coarse = x.bfloat16()
    draws = draw_for(loss, coarse, torch.Generator().manual_seed(seed))
    assert draws.t.dtype == torch.float32 and draws.z.dtype == torch.bfloat16
    wide = dataclasses.replace(draws, z=draws.z.float(), z_new=draws.z_new.float())
    found, wanted = (
        torch.stack(loss.evaluate(own, one, data, label, null=torch.tensor([3]))).float()
        for own, one, data in ((draws, half, coarse), (wide, net, coarse.float()))
    )
    assert wanted.isfinite().all() and wanted.min() > 0
    close(found, wanted, atol=0.02, rtol=0.1)
    for steps in (1, 2):
        found, wanted = ttf.sample(half, coarse, steps, cond=label), ttf.sample(net, coarse.float(), steps, cond=label)
        close(found.float(), wanted, atol=0.2, rtol=0.1)


def gaussian_clean(x, t, mean=0.7, spread=0.5):
    """E[x | x_t] of data N(mean, spread^2), from their joint law with x_t = t z + (1 - t) x."""
    return mean + (1 - t) * spread**2 / (t**2 + (1 - t) ** 2 * spread**2) * (x - (1 - t) * mean)


class Answers(torch.nn.Module):
    """A network that answers with the clean sample of a Gaussian, and keeps what it is asked."""

    classes, blocks = 5, ("a block",)

    def forward(self, x, t, r, cond=None):
        self.asked = x, t, r, cond
        return gaussian_clean(x, t[:, None].abs())


@given(arrays((4, 2)), arrays(4, st.floats(-1, 1)), st.floats(0.01, 0.5))
def test_a_clean_sample_is_a_velocity(x, t, floor):
    """Of a Gaussian E[z | x_t] = t / var(x_t) (x_t - mean of x_t), so the velocity is known; below the floor it is
    shorter by |t| / floor. The sign of time, the target time and the condition reach the network as they are."""
    net, r, label = Answers(), t / 2, torch.arange(4)
    field, T = PredictsData(net, floor), t[:, None].abs()
    assert PredictsData(net).floor == 0.05
    noise = T / (T**2 + 0.25 * (1 - T) ** 2) * (x - 0.7 * (1 - T))
    v = noise - gaussian_clean(x, T)
    close(field(x, t, r, label), v * (T / floor).clamp(max=1))
    assert all(map(torch.equal, net.asked, (x, t, r, label))) and (field.classes, field.blocks) == (5, ("a block",))
    one, nothing = torch.ones(4).double(), torch.zeros(4).double()
    found = ttf.sample(field, x, 1, cond=label)
    assert all(map(torch.equal, net.asked, (x, one, nothing, label)))
    close(found, net(x, one, nothing))


def shifted(kind, classes, seed=0):
    """A network with shifted conditions, all else at random, and its shift, new."""
    net = Shifted(KINDS[kind][0], classes)
    shift = net.net.label.shift
    new = copy.deepcopy(shift.state_dict())
    awake(net, seed)
    shift.load_state_dict(new)
    return net, shift


def asked(net, x, t, cond, shift):
    return net(x, t, t / 2, {"cond": cond, "shift": torch.full((len(x),), shift)})


@given(kinds, seeds, st.sampled_from([0, 3]), inside)
def test_shifted_branches_are_born_equal_and_a_shift_moves_one_of_them(kind, seed, classes, t):
    """For every label, the null label too, and where there are none; the plain branch is also what it is without."""
    (net, shift), x, t = shifted(kind, classes, seed), batch(kind, 4, seed), torch.full((4,), t)
    label = torch.arange(4) if classes else None
    plain = net(x, t, t / 2, label)
    assert torch.equal(asked(net, x, t, label, 0), plain) and net.classes == classes
    close(asked(net, x, t, label, 1), plain, atol=1e-5, rtol=1e-4)
    shift.bias += 1.0
    assert torch.equal(asked(net, x, t, label, 0), plain) and torch.equal(net(x, t, t / 2, label), plain)
    assert ((asked(net, x, t, label, 1) - plain).flatten(1).abs().amax(1) > 1e-6).all()


@given(kinds, seeds, st.sampled_from([0, 3]))
def test_the_plain_branch_is_the_network_itself(kind, seed, classes):
    """With the same weights; without labels, where the embedding of its one condition is zero."""
    (net, _), x, t, own = shifted(kind, classes, seed), batch(kind, 4, seed), torch.rand(4), KINDS[kind][0](classes)
    label, weights = torch.arange(4) if classes else None, net.net.state_dict()
    e = weights.pop("label.plain.weight")
    weights = {name: weight for name, weight in weights.items() if "label." not in name}
    own.load_state_dict(weights | ({"label.weight": e} if classes else {}))
    net.net.label.plain.weight *= classes > 0
    close(net(x, t, t / 2, label), own(x, t, t / 2, label), atol=1e-6, rtol=1e-5)


def test_a_shifted_label_is_embedded_by_a_matrix_and_a_vector_of_its_own():
    """By hand: e(c) is (c, 1), A swaps and doubles, b = (10, 20); n = 3 labels, the last of which says "no class"."""
    table = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]), freeze=False)
    shift = Shift(table)
    assert torch.equal(shift(torch.arange(6)), shift(torch.arange(3)).repeat(2, 1)), "a new one"
    shift.shift.weight.data = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    shift.shift.bias.data = torch.tensor([10.0, 20.0])
    found = shift(torch.tensor([0, 2, 3, 4, 5]))
    assert found.tolist() == [[0, 1], [2, 1], [12, 20], [12, 22], [12, 24]]
    for rows, seen in (((0, 1, 2), False), ((3,), True)):
        shift.zero_grad()
        shift(torch.tensor(rows)).sum().backward()
        assert all((p.grad is not None and bool(p.grad.any())) == seen for p in shift.shift.parameters())
        assert table.weight.grad.any(1).tolist() == [i in {row % 3 for row in rows} for i in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shifted_network_begins_as_its_own_kind_does(kind):
    """A DiT's labels begin small, and A = 1, b = 0 whatever it draws."""
    torch.manual_seed(0)
    own, net = KINDS[kind][0](199), Shifted(KINDS[kind][0], 199)
    e, wanted = net.net.label.plain.weight, own.label.weight.std().item()
    assert e.std().item() == pytest.approx(wanted, rel=0.1) and len(e) == 200
    assert e.untyped_storage().nbytes() == e.nbytes, "no rows are kept, and saved, that nobody reads"
    A, b = net.net.label.shift.parameters()
    assert torch.equal(A, torch.eye(len(A))) and not b.any()
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in own.parameters()) + A.numel() + b.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_that_would_be_a_shifted_one_is_refused(kind):
    net, free = (Shifted(KINDS[kind][0], classes) for classes in (3, 0))
    x, t, shift = batch(kind, 2), torch.full((2,), 0.5), torch.tensor([0, 1])
    for wrong, message in [
        (torch.tensor([0, 4]), r"labels must lie in \[0, 3\], got 0 to 4"),
        (torch.tensor([-1, 3]), r"labels must lie in \[0, 3\], got -1 to 3"),
        (torch.zeros(2), "labels must be 2 whole numbers"),
        (None, r"conditional: cond must hold labels in \[0, 3\]"),
    ]:
        for cond in (wrong, {"cond": wrong, "shift": shift}):
            with pytest.raises(ValueError, match=message):
                net(x, t, t, cond)
    for cond in (shift, {"cond": shift, "shift": shift}):
        with pytest.raises(ValueError, match="unconditional: it takes no cond"):
            free(x, t, t, cond)
    assert torch.equal(net(x, t, t, torch.tensor([0, 3]).byte()), net(x, t, t, torch.tensor([0, 3])))


def test_blocks_are_recomputed_and_compiled_through_what_is_around_them(graphs):
    """As many graphs as for the bare DiT, and its gradients; an MLP has no blocks, whatever is around it."""
    net = PredictsData(Shifted(KINDS["dit"][0], 3))
    awake(net).requires_grad_(True)
    eager = gradients_of(net, "dit")
    prepare(net, recompute=True, compile="default")
    for a, b in zip(gradients_of(net, "dit"), eager):
        close(a, b, atol=1e-4, rtol=1e-3)
    assert len(graphs) == 3, "as many as of a bare one"
    assert len(blocks_of(PredictsData(Shifted(KINDS["unet"][0], 3)))) == len(KINDS["unet"][0](3).blocks())
    with pytest.raises(ValueError, match="recompute needs a network with blocks, PredictsData has none"):
        prepare(PredictsData(Shifted(KINDS["mlp"][0])), recompute=True)
