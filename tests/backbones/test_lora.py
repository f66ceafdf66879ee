"""Adapters: one set of weights is student, average and original, each exactly; files that diffusers reads."""

import copy
import json

import pytest
import torch
from conftest import seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tinytwinflow as ttf
from tinytwinflow.backbones import lora, lora_files

close = torch.testing.assert_close
LAYERS, ALSO = ["attn.qkv", "mlp.fc?"], ["times.r", "times.twin"]


def dit(seed=0, depth=2):
    """A small DiT with no zero weights."""
    torch.manual_seed(seed)
    net = ttf.nets.DiT(size=4, channels=1, classes=3, width=16, depth=depth, heads=2, patch=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(n=5, seed=0):
    """x, t, r, labels; among the times some of the twin, some with r < t."""
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(n, 1, 4, 4, generator=generator), torch.rand(n, generator=generator)
    t = torch.where(torch.arange(n) % 2 == 1, -t, t)
    return x, t, torch.where(torch.arange(n) % 3 == 0, t * 0.5, t), torch.randint(0, 4, (n,), generator=generator)


def adapted(net=None, also=ALSO, **how):
    net = dit() if net is None else net
    lora.add(net, how.pop("layers", LAYERS), rank=how.pop("rank", 3), also=also, **how)
    return net


def stir(net, seed=1):
    """Give all that is trained, and its average, other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in lora.adapter_state(net).values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return net


def by_hand(net, plain, which):
    """The plain network with W + alpha / rank B A as weights, and with the full modules of the student or average."""
    first = {"student": "lora", "average": "average"}[which]
    with torch.no_grad():
        for name in net.lora.layers:
            layer = net.get_submodule(name)
            A, B = (getattr(layer, f"{first}_{part}").weight for part in "AB")
            plain.get_submodule(name).weight += net.lora.alpha / net.lora.rank * B @ A
        for i, name in enumerate(net.lora.also):
            source = net.get_submodule(name) if which == "student" else net.get_submodule(f"lora_also.average.{i}")
            plain.get_submodule(name).load_state_dict(source.state_dict())
    return plain


@settings(max_examples=10)
@given(seeds, st.integers(1, 6), st.sampled_from([None, 0.5, 8.0]))
def test_the_formula_of_one_layer(seed, rank, alpha):
    """W x + b + (alpha / rank) B A x, and at birth W x + b bit for bit."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({"one": nn.Linear(5, 4)}).double()
    W, b, x = net["one"].weight.detach().clone(), net["one"].bias.detach().clone(), torch.randn(3, 5).double()
    lora.add(net, ["one"], rank, alpha, seed=seed)
    A, B = net["one"].lora_A.weight, net["one"].lora_B.weight
    assert A.shape == (rank, 5) and B.shape == (4, rank) and A.dtype == torch.float64
    assert torch.equal(net["one"](x), nn.functional.linear(x, W, b))
    nn.init.normal_(B)
    close(net["one"](x), x @ W.T + b + (alpha or rank) / rank * x @ A.T @ B.T)


@settings(max_examples=10)
@given(seeds)
def test_birth_changes_nothing(seed):
    plain, here = dit(seed), inputs(seed=seed)
    net = adapted(copy.deepcopy(plain))
    for field in (net, lora.average(net), lora.original(net)):
        assert torch.equal(field(*here), plain(*here))


def test_the_seed_decides_A_alone():
    """The same on every machine, without a draw from the global generator; A of student and average are equal."""
    a, b, other = adapted(seed=1), adapted(seed=1), adapted(seed=2)
    layer = "blocks.1.mlp.fc1"
    A = [net.get_submodule(layer).lora_A.weight for net in (a, b, other)]
    assert torch.equal(A[0], A[1]) and not torch.equal(A[0], A[2])
    assert torch.equal(A[0], a.get_submodule(layer).average_A.weight)
    assert not torch.equal(A[0], a.get_submodule("blocks.0.mlp.fc1").lora_A.weight)
    wide = nn.ModuleDict({"one": nn.Linear(400, 2)})
    lora.add(wide, ["one"], rank=50)
    A, bound = wide["one"].lora_A.weight, 400**-0.5
    assert 0.99 * bound < A.abs().max() <= bound and abs(A.std() / bound - 3**-0.5) < 0.02, "uniform"
    net = dit()
    state = torch.get_rng_state()
    adapted(net)
    assert torch.equal(state, torch.get_rng_state())


@settings(max_examples=5)
@given(seeds)
def test_views_are_the_networks_they_stand_for(seed):
    """Student and average: the plain network with other weights; original: an untouched copy, bit for bit."""
    plain, here = dit(seed), inputs(seed=seed)
    net = stir(adapted(copy.deepcopy(plain), alpha=5.0), seed)
    for which, field in (("student", net), ("average", lora.average(net))):
        wanted = by_hand(net, copy.deepcopy(plain), which)(*here)
        close(field(*here), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert torch.equal(lora.original(net)(*here), plain(*here))
    student, average = net(*here), lora.average(net)(*here)
    assert min((student - average).abs().max(), (average - plain(*here)).abs().max()) > 1e-2 * average.abs().max()
    here[0].requires_grad_()
    assert net(*here).requires_grad
    assert not lora.average(net)(*here).requires_grad and not lora.original(net)(*here).requires_grad


def test_gradient_reaches_adapters_and_also_alone():
    net = stir(adapted())
    (net(*inputs()).square().mean() + lora.average(net)(*inputs()).mean()).backward()
    with_gradient = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {f"{layer}.lora_{part}.weight" for layer in net.lora.layers for part in "AB"}
    trained |= {name for name, _ in net.named_parameters() if name.startswith(tuple(f"{also}." for also in ALSO))}
    assert with_gradient == trained == {name for name, p in net.named_parameters() if p.requires_grad}
    assert {id(p) for p in lora.parameters(net)} == {id(p) for p in net.parameters() if p.requires_grad}
    assert len(net.lora.layers) == 6 and not any("average" in name or "original" in name for name in trained)


def test_the_switch_goes_back_after_an_exception():
    net = stir(adapted())
    before = net(*inputs())
    for field in (lora.average(net), lora.original(net)):
        with pytest.raises(ValueError):
            field(torch.zeros(2, 7), *inputs()[1:])
        assert net.lora.active == "student" and torch.equal(net(*inputs()), before)


@settings(max_examples=10)
@given(st.floats(0, 0.99), seeds)
def test_the_average_follows_the_student(decay, seed):
    """average <- decay * average + (1 - decay) * student, matrices and full modules alike; the student stays."""
    net = stir(adapted(dit(depth=1)), seed)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    lora.move_average(net, decay)
    for name, value in net.state_dict().items():
        student = name.replace("average_", "lora_")
        if name.startswith("lora_also.average."):
            i, rest = name.removeprefix("lora_also.average.").split(".", 1)
            student = f"{ALSO[int(i)]}.{rest}"
        close(value, decay * before[name] + (1 - decay) * before[student])
    with pytest.raises(ValueError, match="decay"):
        lora.move_average(net, 1.0)


def test_deep_copies_have_a_switch_of_their_own():
    net = stir(adapted())
    other = copy.deepcopy(net)
    here = inputs()
    assert torch.equal(other(*here), net(*here))
    assert torch.equal(lora.average(other)(*here), lora.average(net)(*here))
    other.lora.active = "original"
    assert other.blocks[0].attn.qkv.lora is other.lora is other.times.r.lora is not net.lora
    assert not torch.equal(other(*here), net(*here))
    other.lora.active = "student"
    before = net(*here)
    stir(other, 2)
    assert torch.equal(net(*here), before)
    assert not torch.equal(lora.average(other)(*here), lora.average(net)(*here))


def test_bfloat16_weights_with_float32_adapters():
    """A x and B A x are computed in bfloat16, from matrices kept in float32: output and gradients are those of float32
    arithmetic to within bfloat16's roundings, and gradients arrive in float32; full modules become float32."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 64).bfloat16()
    net = nn.ModuleDict({"one": layer, "two": nn.Linear(64, 4).bfloat16()})
    W, b = layer.weight.detach().float(), layer.bias.detach().float()
    lora.add(net, ["one"], rank=8, also=["two"], dtype=torch.float32)
    assert layer.lora_A.weight.dtype == layer.average_B.weight.dtype == net["two"].weight.dtype == torch.float32
    assert layer.weight.dtype == torch.bfloat16
    nn.init.normal_(layer.lora_B.weight, std=0.3)
    A, B = (part.weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B))
    x, weight = torch.randn(50, 96).bfloat16(), torch.randn(50, 64)
    exact, out = x.float() @ (W + B @ A).T + b, layer(x)
    assert out.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert (out.float() - exact).norm() < eps * exact.norm()
    (exact * weight).sum().backward()
    (out.float() * weight).sum().backward()
    for part, wanted in ((layer.lora_A, A), (layer.lora_B, B)):
        assert part.weight.grad.dtype == torch.float32
        assert (part.weight.grad - wanted.grad).norm() < 2 * eps * wanted.grad.norm()


def test_small_steps_of_adapters_of_bfloat16_weights_are_taken():
    """Steps too small to move a bfloat16 number add up in the float32 matrices, and then are seen in the output."""
    net = nn.ModuleDict({"one": nn.Linear(1, 1, bias=False).bfloat16()})
    lora.add(net, ["one"], rank=1, dtype=torch.float32)
    A, B = net["one"].lora_A.weight, net["one"].lora_B.weight
    with torch.no_grad():
        net["one"].weight.zero_(), A.fill_(1.0), B.fill_(1.0)
    optimizer = torch.optim.SGD([B], lr=1e-4)
    for _ in range(1000):
        optimizer.zero_grad()
        net["one"](torch.ones(1, 1).bfloat16()).sum().neg().backward()
        optimizer.step()
    assert B.item() == pytest.approx(1.1, abs=1e-3)
    assert net["one"](torch.ones(1, 1).bfloat16()).item() == pytest.approx(1.1, rel=1e-2)


def test_under_autocast_all_runs_in_bfloat16():
    net = stir(adapted())
    with torch.autocast("cpu", torch.bfloat16):
        out = net(*inputs())
    close(out, net(*inputs()), atol=0.3, rtol=0.1)
    out.square().mean().backward()
    assert all(p.grad is not None for p in lora.parameters(net))


def test_activation_checkpointing_gives_the_same_gradient():
    """Also when a view is used between forward and backward."""
    from torch.utils.checkpoint import checkpoint

    grads = []
    for again in (False, True):
        net = stir(adapted())
        if again:
            for block in net.blocks:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        loss = net(*inputs()).square().mean()
        lora.original(net)(*inputs())
        loss.backward()
        grads.append([p.grad for p in lora.parameters(net)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_sharded_blocks(tmp_path):
    """Under FSDP2, here of one process: views, gradient, average and file are those of the plain network."""
    from safetensors.torch import load_file
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain, net, here = stir(adapted()), stir(adapted()), inputs()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for module in (*net.blocks, net):
            fully_shard(module, mesh=mesh)
        for field in (lora.average, lora.original):
            close(field(net)(*here), field(plain)(*here))
        for each in (net, plain):
            each(*here).square().mean().backward()
            lora.move_average(each, 0.5)
        for a, b in zip(lora.parameters(net), lora.parameters(plain)):
            close(a.grad.full_tensor(), b.grad)
        states = lora.adapter_state(net), lora.adapter_state(plain)
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(a.full_tensor(), b) for a, b in zip(*(state.values() for state in states)))
        for each, name in ((net, "pieces"), (plain, "whole")):
            lora_files.write_adapters(lora_files.adapter_file(each), tmp_path / name)
        pieces, whole = (load_file(tmp_path / name) for name in ("pieces", "whole"))
        assert pieces.keys() == whole.keys() and all(torch.equal(pieces[name], whole[name]) for name in whole)
    finally:
        dist.destroy_process_group()


def test_compiled_the_switch_still_works():
    net, here = stir(adapted(dit(depth=1))), inputs()
    wanted = [field(*here) for field in (net, lora.average(net), lora.original(net), net)]
    net.compile(backend="eager")
    found = [field(*here) for field in (net, lora.average(net), lora.original(net), net)]
    for a, b in zip(found, wanted):
        close(a, b)


def mlp():
    torch.manual_seed(0)
    net = ttf.nets.MLP(dim=2, width=32, depth=2)
    for layer in (net.out, net.twin_in, net.twin_out):
        nn.init.normal_(layer.weight, std=0.2)
    return net


@pytest.mark.parametrize("kind", ["mlp", "dit"])
def test_a_twinflow_loss_falls(kind):
    """Teacher and original are the network itself, switched; the frozen weights do not move."""
    torch.manual_seed(0)
    if kind == "mlp":
        net, x, cond, null = mlp(), torch.randn(128, 2) * 0.1 + torch.tensor([2.0, -1.0]), None, None
        lora.add(net, ["layers.*", "out"], rank=8, also=["twin_in", "twin_out"])
        loss = ttf.TwinFlowLoss()
    else:
        net, x, cond = dit(), torch.full((32, 1, 4, 4), 1.5), torch.arange(32) % 3
        null = torch.tensor([3])
        adapted(net, layers=["attn.*", "blocks.*.mlp.*", "final_layer.linear"], rank=8)
        loss = ttf.TwinFlowLoss(guidance=0.5)
    frozen = {name: p.detach().clone() for name, p in net.named_parameters() if not p.requires_grad}
    teacher, original = lora.average(net), lora.original(net)
    optimizer, generator, totals = torch.optim.Adam(lora.parameters(net), 1e-2), torch.Generator().manual_seed(0), []
    for _ in range(80):
        out = loss(net, x, cond, teacher=teacher, original=original, null=null, generator=generator)
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        lora.move_average(net, 0.9)
        totals.append(out.base.item())
    assert sum(totals[-20:]) < 0.7 * sum(totals[:20])
    for name, value in frozen.items():
        assert "average" in name or torch.equal(net.get_parameter(name), value)


@pytest.mark.parametrize("data_free", [False, True])
def test_the_loss_is_that_of_three_networks(data_free):
    """Switching one network gives the terms of a student, an average and an original with weights of their own."""
    plain, loss, x = dit(), ttf.TwinFlowLoss(guidance=0.5, data_free=data_free), inputs(12)[0]
    net = stir(adapted(copy.deepcopy(plain)))
    student, average = (by_hand(net, copy.deepcopy(plain), which) for which in ("student", "average"))
    trios = (net, lora.average(net), lora.original(net)), (student, average, plain)
    found, wanted = (
        loss(a, x, torch.arange(12) % 3, b, torch.tensor([3]), c, torch.Generator().manual_seed(0)) for a, b, c in trios
    )
    close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_small_state_resumes():
    """adapter_state, put into a newly adapted network, gives the same three functions."""
    net, other, here = stir(adapted()), adapted(seed=5), inputs()
    state = lora.adapter_state(net)
    assert not any(name.endswith("attn.qkv.weight") or "original" in name for name in state)
    other.load_state_dict({**other.state_dict(), **state})
    for field in (lora.average, lora.original):
        assert torch.equal(field(other)(*here), field(net)(*here))
    assert torch.equal(other(*here), net(*here))


class Wrapper(nn.Module):
    """A backbone of diffusers inside a velocity field."""

    def __init__(self, model, **more):
        super().__init__()
        self.model, self.r_embedder, self.more = model, nn.Linear(2, 16), more

    def forward(self, x, t, r, cond):
        cond = {"encoder_hidden_states": cond["a"], "pooled_projections": cond["b"]}
        y = self.model(x, timestep=1000 * t, return_dict=False, **cond, **self.more)[0]
        return y + 0 * self.r_embedder(torch.stack([t, r], 1)).sum()


def backbone(kind):
    """A tiny transformer of diffusers as a velocity field, and inputs."""
    import diffusers

    torch.manual_seed(0)
    if kind == "sd3":
        model = diffusers.SD3Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=2, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=6, caption_projection_dim=16, pooled_projection_dim=5, out_channels=2,
            pos_embed_max_size=4,
        )  # fmt: skip
        x, ids = torch.randn(3, 2, 4, 4), {}
    else:
        model = diffusers.FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=6, pooled_projection_dim=5, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        x, ids = torch.randn(3, 4, 4), {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(4, 3)}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    cond = {"a": torch.randn(3, 4, 6), "b": torch.randn(3, 5)}
    return Wrapper(model, **ids), (x, torch.rand(3), torch.rand(3), cond)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_diffusers_reads_our_file(kind, tmp_path):
    """load_lora_adapter of a plain model gives the function of our average, alpha included, wrapped or not."""
    pytest.importorskip("peft")
    layers = ["attn.to_q", "to_out.0", "ff.net.*.proj"] if kind == "sd3" else ["attn.to_?", "single*.proj_out"]
    net, here = backbone(kind)
    plain, bare = copy.deepcopy(net), copy.deepcopy(net.model)
    lora.add(net, layers, rank=2, alpha=5.0, also=["r_embedder"])
    lora_files.write_adapters(lora_files.adapter_file(stir(net)), tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(lora.original(net)(*here), plain(*here))
    plain.model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    theirs = plain(*here)
    close(theirs, lora.average(net)(*here), atol=1e-5, rtol=1e-5)
    assert (theirs - lora.original(net)(*here)).abs().max() > 1e-2
    names = {name for name in names_in(tmp_path) if name.startswith("transformer.")}
    assert {name.rsplit(".", 2)[1] for name in names} == {"lora_A", "lora_B"}
    lora.add(bare, layers, rank=2, alpha=5.0)
    lora_files.write_adapters(lora_files.adapter_file(bare), tmp_path / "pytorch_lora_weights.safetensors")
    assert names_in(tmp_path) == names, "a wrapper leaves no trace in the names"


def names_in(folder):
    from safetensors import safe_open

    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
        assert about["transformer.r"] == 2 and about["transformer.lora_alpha"] == 5.0
        return set(file.keys())


def test_a_pipeline_takes_our_file(tmp_path):
    """A pipeline refuses files with names that lack "lora"; ours, modules trained in full included, it reads."""
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    net, here = backbone("sd3")
    plain = copy.deepcopy(net)
    lora.add(net, ["attn.to_q", "attn.to_v"], rank=2, alpha=5.0, also=["r_embedder"])
    lora_files.write_adapters(lora_files.adapter_file(stir(net)), tmp_path / "a.safetensors")
    parts = dict.fromkeys(["vae", "text_encoder", "text_encoder_2", "text_encoder_3"])
    parts |= dict.fromkeys(["tokenizer", "tokenizer_2", "tokenizer_3"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.StableDiffusion3Pipeline(transformer=plain.model, scheduler=scheduler, **parts)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    close(plain(*here), lora.average(net)(*here), atol=1e-5, rtol=1e-5)


def test_wrong_use():
    net = dit()
    wrong = {
        "no linear layer is called 'attn.to_q'; some there are: times.t.mlp.0, ": {"layers": ["attn.qkv", "attn.to_q"]},
        "no linear layer is called 'qk'": {"layers": ["qk"]},
        "no linear layer is called 'blocks.0'": {"layers": ["blocks.0"]},
        "layers must name at least one": {"layers": []},
        "'embedder' in also is no module": {"also": ["embedder"]},
        "'blocks' in also is no module that the network calls": {"also": ["blocks"]},
        "'blocks.0.attn.qkv' lies in 'blocks.0'": {"also": ["blocks.0"]},
        "'times.r' lies in 'times'": {"also": ["times", "times.r"]},
        "rank must be a whole number >= 1": {"rank": 0},
        "and alpha > 0, got 3 and -1": {"alpha": -1},
    }
    for message, how in wrong.items():
        with pytest.raises(ValueError) as error:
            adapted(net, **how)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert all(p.requires_grad for p in net.parameters()) and net.state_dict().keys() == dit().state_dict().keys()
    for call in (lora.parameters, lora.adapter_state, lambda net: lora.average(net)(*inputs())):
        with pytest.raises(ValueError, match="no adapters: lora.add"):
            call(net)
    with pytest.raises(ValueError, match="already"):
        adapted(adapted(net))


def test_names_are_endings_or_patterns():
    """An ending begins at a dot: "fc1" is no layer called "xfc1"; wrapped backbones are searched inside `model`."""
    net = nn.ModuleDict({"a": nn.ModuleDict({"fc1": nn.Linear(2, 2)}), "xfc1": nn.Linear(2, 2)})
    lora.add(net, ["fc1"], rank=1)
    assert net.lora.layers == ("a.fc1",)
    net = Wrapper(nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2)))
    lora.add(net, ["*"], rank=1)
    assert net.lora.layers == ("model.0", "model.2")
