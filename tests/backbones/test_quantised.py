"""Quantised backbones: a frozen network of few bits, on which adapters are what they are on any other.

They run where bitsandbytes and torchao are installed, on a CPU, too: there diffusers refuses NF4, though bitsandbytes
computes it, so the tests take that refusal out.
"""

import importlib.util
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_first import SD3, TINY
from torch import nn

from tinytwinflow import TwinFlowLoss
from tinytwinflow.backbones import lora, lora_files, pipelines, quantised, states
from tinytwinflow.backbones.velocity_files import load_velocity
from tinytwinflow.training.optimizers import optimizer_of

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
from test_states import command, folders, numbers, run, stopped  # noqa: E402, F401
from test_velocity import given_cond, latents, model_of  # noqa: E402

KINDS = list(quantised.PACKAGES)


def needs(kind):
    """Skip unless the package of a kind is here; without a GPU diffusers is told that there is one."""
    package = quantised.PACKAGES[kind]
    pytest.importorskip(package, reason=f"{kind} needs {package}: pip install 'tinytwinflow[quantized]'")


@pytest.fixture
def cpu(monkeypatch):
    """Let diffusers load NF4 onto a CPU."""
    if importlib.util.find_spec("bitsandbytes"):
        from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer as Quantizer

        monkeypatch.setattr(Quantizer, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(Quantizer, "update_device_map", lambda *_: {"": "cpu"})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each class as diffusers saves it."""
    root = tmp_path_factory.mktemp("plain")
    for kind in TINY:
        model_of(kind, std=0.1).save_pretrained(root / kind)
    return root


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def table_of_nf4():
    """The 16 numbers of NF4 as its paper prints them (arXiv 2305.14314, appendix E)."""
    below = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    below += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
    above = [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023]
    return torch.tensor([*below, *above, 1.0])


def rounded(weight, kind):
    """A matrix as a kind keeps it, by its definition, and how far a number may be off for the rounding of scales."""
    if kind == "nf4":
        blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / scale)[..., None].sub(table_of_nf4()).abs().argmin(-1)
        return (table_of_nf4()[nearest] * scale).flatten()[: weight.numel()].view_as(weight), 0.02
    scale = weight.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)
    if kind == "int8":
        return (weight / scale).round() * scale, 0.008
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale, 0.008


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", TINY)
def test_it_is_the_model_with_rounded_weights(model, kind, models, cpu):
    """Its velocity is that of the plain model whose linear layers, all but the time's, hold the numbers that the kind
    has for them; the time's MLP, and so what is new, is as it was, in ordinary floats."""
    needs(kind)
    net, plain = load_velocity(models / model, torch.float32, kind, True), load_velocity(models / model)
    embedder, seen = plain.family.embedder, 0
    for name, layer in layers_of(plain.model).items():
        there = net.model.get_submodule(name)
        if name.startswith(f"{embedder}."):
            assert type(there.weight) is nn.Parameter and torch.equal(there.weight, layer.weight)
            continue
        wanted, off = rounded(layer.weight.detach(), kind)
        found, seen = quantised._floats(there.weight, torch.float32), seen + 1
        if kind != "nf4" or layer.in_features % 64 == 0:  # of other widths bitsandbytes 0.50 on a CPU mixes up blocks
            errors = [(each - layer.weight).abs() for each in (found, wanted)]
            assert (errors[0] - errors[1]).max() <= off * layer.weight.abs().max(), "as near as the nearest"
        layer.weight.data = found
    x, cond = latents(net, 3), given_cond(net, 3)
    t = torch.tensor([0.2, 0.7, -0.5])
    wanted = plain(x, t, t / 2, cond)
    torch.testing.assert_close(net(x, t, t / 2, cond), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert seen > 10 and all(
        type(p) is nn.Parameter and p.dtype == torch.float32
        for module in (net.r_embedder, net.twin_embedder)
        for p in module.parameters()
    )


def adapted(folder, kind, dtype=torch.bfloat16, rank=3):
    net = load_velocity(folder, dtype, kind, True)
    states.adapt(net, rank)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_at_birth_change_nothing_and_their_switch_works(kind, models, cpu):
    """Student, average and original are the quantised network bit for bit; once the adapters are something, the
    original still is, and a layer's answer is W x + B A x with the rounded W."""
    needs(kind)
    net, plain = adapted(models / SD3, kind), load_velocity(models / SD3, torch.bfloat16, kind, True)
    x, t, cond = latents(net, 3), torch.tensor([0.2, 0.7, -0.5]), given_cond(net, 3)
    fields = net, lora.average(net), lora.original(net)
    with torch.no_grad():
        before = plain(x, t, t / 2, cond)
        assert all(torch.equal(field(x, t, t / 2, cond), before) for field in fields)
        for value in lora.adapter_state(net).values():
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        student, average, original = (field(x, t, t / 2, cond) for field in fields)
        layer = net.model.get_submodule("transformer_blocks.1.ff.net.2")
        h, A, B = torch.randn(5, 64).bfloat16(), layer.lora_A.weight, layer.lora_B.weight
        W = quantised._floats(layer.weight, torch.float32) + B @ A
        torch.testing.assert_close(layer(h).float(), h.float() @ W.T + layer.bias.float(), rtol=0.03, atol=0.03)
    assert A.dtype == torch.float32 and torch.equal(original, before)
    assert min((student - before).norm(), (average - before).norm()) > 0.01 * before.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_adapters_and_not_the_base(kind, models, cpu):
    """Also after calls without gradient, which bitsandbytes may make with other weights; and they are those of the
    plain model with the rounded weights."""
    needs(kind)
    net, plain = adapted(models / SD3, kind, torch.float32), load_velocity(models / SD3)
    for name, layer in layers_of(plain.model).items():
        there = net.model.get_submodule(name)
        layer.weight.data = quantised._floats(there.weight, torch.float32) if "lora" not in name else layer.weight.data
    states.adapt(plain, 3)
    x, t, cond = latents(net, 3), torch.tensor([0.2, 0.7, -0.5]), given_cond(net, 3)
    draw = torch.Generator().manual_seed(1)
    for pair in zip(lora.parameters(net), lora.parameters(plain)):
        noise = 0.1 * torch.randn(pair[0].shape, generator=draw)
        for parameter in pair:
            parameter.data += noise
    for each in (net, plain):
        lora.average(each)(x, t, t / 2, cond)
        each(x, t, t / 2, cond).square().mean().backward()
    for p, q in zip(lora.parameters(net), lora.parameters(plain)):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.01, atol=1e-3 * q.grad.abs().max().item())
    assert sum(p.grad.abs().max() > 0 for p in lora.parameters(net)) > 50
    own = {id(p) for p in lora.parameters(net)}
    assert all(p.grad is None and not p.requires_grad for p in net.parameters() if id(p) not in own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_twinflow_loss_falls(kind, models, cpu):
    """The average as teacher, the quantised network as original; its weights do not move."""
    needs(kind)
    net = load_velocity(models / SD3, torch.bfloat16, kind, True)
    last = "model.norm_out.linear"  # a random last layer hides from the adapters what they are to say
    lora.add(net, states.linear_layers(net) + [last], 4, dtype=torch.float32, also=("r_embedder", "twin_embedder"))
    x, cond = latents(net, 8) * 0.1 + 1, given_cond(net, 8)
    loss, optimizer = TwinFlowLoss(order=1, share=0.5, one_step_share=0.5), optimizer_of([net], 1e-2)
    base = [
        quantised._floats(layer.weight, torch.float32)
        for layer in layers_of(net.model).values()
        if hasattr(layer, "lora")
    ]

    def now():
        with torch.no_grad():
            return loss(net, x, cond, generator=torch.Generator().manual_seed(7)).total

    before, draws = now(), torch.Generator().manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        loss(net, x, cond, lora.average(net), original=lora.original(net), generator=draws).total.backward()
        optimizer.step()
        lora.move_average(net, 0.5)
    assert now() < 0.9 * before
    after = [
        quantised._floats(layer.weight, torch.float32)
        for layer in layers_of(net.model).values()
        if hasattr(layer, "lora")
    ]
    assert all(map(torch.equal, base, after))


def test_in_what_adapters_are_kept_if_nothing_is_said(models, cpu):
    needs("nf4")
    net = load_velocity(models / SD3, torch.bfloat16, "nf4", True)
    lora.add(net, ["attn.to_q"], 2)
    assert {p.dtype for p in lora.parameters(net)} == {torch.bfloat16}
    assert net.model.proj_out.weight.quant_state.dtype == torch.bfloat16, "what a weight is made whole in"


def whole_quantised(kind, folder, out, dtype=torch.float32):
    """A folder quantised as its users do it: every linear layer, the time's, too."""
    how = quantised.quantisation(kind, "nothing", dtype)
    model = getattr(diffusers, SD3).from_pretrained(folder, quantization_config=how, torch_dtype=dtype)
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_quantised_already_is_the_model_it_holds(kind, models, tmp_path, cpu):
    """Its velocity at r = t is what diffusers computes of the folder; the time's MLP is made of floats again, so that
    what is new can learn, and at birth adds nothing."""
    needs(kind)
    folder = whole_quantised(kind, models / SD3, tmp_path / kind)
    net = load_velocity(folder, frozen=True)
    model = getattr(diffusers, SD3).from_pretrained(folder, torch_dtype=torch.float32)
    model.train()  # in eval mode bitsandbytes packs weights for a CPU, which are too small here
    x, cond = latents(net, 3), given_cond(net, 3)
    t, clean = torch.tensor([0.2, 0.7, 0.5]), torch.zeros(3)
    with torch.no_grad():
        wanted = model(x, cond["prompt_embeds"], cond["pooled"], 1000 * t, return_dict=False)[0]
        for r in (t, clean):
            torch.testing.assert_close(net(x, t, r, cond), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    inside = net.model.get_submodule(net.family.embedder)
    for layer in (*layers_of(inside).values(), *layers_of(net.r_embedder).values()):
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
    states.adapt(net, 2)
    net(x, t, clean, cond).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for name, p in net.r_embedder.named_parameters() if name == "linear_2.weight")
    kept = quantised._is_quantised(net.model.proj_out.weight)
    assert kept, "the rest stays quantised"


@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_of_a_pipeline_may_be_quantised(kind, models, tmp_path, cpu):
    """Adapters that were trained on a quantised folder, put on it by diffusers' loader, give the same bits."""
    needs(kind)
    folder = whole_quantised(kind, models / SD3, tmp_path / kind, torch.bfloat16)
    net = load_velocity(folder, torch.bfloat16, frozen=True)
    states.adapt(net, 3)
    for value in lora.adapter_state(net).values():
        value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    model = getattr(diffusers, SD3).from_pretrained(folder, torch_dtype=torch.bfloat16)
    model.train()  # as above
    other = pipelines._with_adapters(model, lora_files.adapter_file(net))
    x, t, cond = latents(net, 3), torch.tensor([0.2, 0.7, 0.5]), given_cond(net, 3)
    with torch.no_grad():
        wanted = lora.average(net)(x, t, 0 * t, cond)
        assert torch.equal(other(x, t, 0 * t, cond), wanted)
        assert (lora.original(net)(x, t, 0 * t, cond) - wanted).norm() > 0.01 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_are_found(kind, models, tmp_path, cpu):
    """One NaN in a weight, which quantising would spread over a block or a row."""
    needs(kind)
    model = model_of(SD3, std=0.1)
    model.transformer_blocks[1].ff.net[2].weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="weight transformer_blocks.1.ff.net.2.weight holds NaN or infinity"):
        load_velocity(tmp_path / "m", torch.bfloat16, kind, True)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_that_are_no_numbers_are_found(kind, models, tmp_path, cpu):
    """One scale of a folder that is quantised already."""
    from safetensors import safe_open

    needs(kind)
    path = whole_quantised(kind, models / SD3, tmp_path / kind) / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in tensors if "proj_out" in name and name.endswith(("nested_absmax", "scale")))
    tensors[name].view(-1)[0] = torch.nan
    safetensors.save_file(tensors, path, about)
    with pytest.raises(ValueError, match="weight proj_out.weight.* holds NaN or infinity"):
        load_velocity(path.parent, frozen=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_resumes_bit_for_bit(kind, folders, tmp_path, monkeypatch, cpu, capsys):  # noqa: F811
    """A run of four steps = one stopped in its fourth, resumed from its second; the checkpoint holds adapters alone,
    and what is exported is what diffusers puts on the plain model."""
    needs(kind)
    quiet, hurt, how = tmp_path / "quiet", tmp_path / "hurt", (f"quantize={kind}",)
    assert run(*command(folders, quiet, *how)) == 0
    with monkeypatch.context() as patch:
        stopped(patch, 3)
        assert run(*command(folders, hurt, *how)) == 130
    assert run("train", "text", "--out", hurt, "--resume", "--data", folders / "texts") == 0
    a, b = numbers(quiet), numbers(hurt)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(value.dtype == torch.float32 for value in a.values())
    assert not any(name.endswith(("to_q.weight", "absmax", "qdata")) for name in a)
    assert run("export", quiet, "--out", tmp_path / "adapters.safetensors") == 0
    plain = getattr(diffusers, SD3).from_pretrained(folders / "model")
    plain.load_lora_adapter(tmp_path / "adapters.safetensors")


WRONG = {
    "quantize=nf3": "quantize must be one of none, nf4, int8, float8",
    "quantize=nf4 lora_rank=0 weights=float32": "quantised weights do not learn and stay whole: --set lora_rank=64",
    "quantize=int8 parallel=fsdp": "quantised weights do not learn and stay whole: --set lora_rank=64 parallel=ddp",
}


@pytest.mark.parametrize("changes", WRONG)
def test_wrong_settings_end_in_one_line(changes, folders, tmp_path, capsys):  # noqa: F811
    assert run(*command(folders, tmp_path / "run", *changes.split())) == 2
    error = capsys.readouterr().err
    assert WRONG[changes] in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_one_line_says_what_to_install(kind, folders, tmp_path, capsys, monkeypatch):  # noqa: F811
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name in ("bitsandbytes", "torchao") else find(name, *more),
    )
    assert run(*command(folders, tmp_path / "run", f"quantize={kind}")) == 2
    error = capsys.readouterr().err
    wanted = f"weights in {kind} need {quantised.PACKAGES[kind]}: pip install 'tinytwinflow[quantized]'"
    assert wanted in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


OTHERS = {
    "8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised in a way not known here"),
    "gguf": ({"quant_method": "gguf"}, "quantised in a way not known here, which are bitsandbytes in 4 bits, or"),
    "int4": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "not known"),
    "damaged": ({"quant_method": "torchao"}, "no quantization_config of diffusers (KeyError"),
    "nothing said": ([1], "no quantization_config of diffusers"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_folders_quantised_in_other_ways_are_refused(what, models, tmp_path):
    about, message = OTHERS[what]
    config = json.loads((models / SD3 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    with pytest.raises(ValueError) as refused:
        load_velocity(tmp_path, frozen=True)
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_what_is_quantised_does_not_learn_and_is_not_quantised_again(models, tmp_path):
    config = json.loads((models / SD3 / "config.json").read_text())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    for words, message in (
        ({}, "its weights are quantised (quantization_config), and such do not learn and stay whole"),
        ({"quantize": "int8", "frozen": True}, "quantised already, as nf4: --set quantize=none"),
    ):
        with pytest.raises(ValueError) as refused:
            load_velocity(tmp_path, **words)
        assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1
    with pytest.raises(ValueError, match="quantize=nf4, and such do not learn"):
        load_velocity(models / SD3, quantize="nf4")


@settings(max_examples=12)
@given(st.sampled_from(KINDS), st.integers(1, 80), st.integers(2, 80))  # torchao takes no single column
def test_bytes_of_a_weight_are_those_of_the_package(kind, rows, columns):
    needs(kind)
    layer = nn.Linear(columns, rows, bias=False).bfloat16()
    if kind == "nf4":
        from bitsandbytes.nn import Params4bit

        weight = Params4bit(layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4").to(
            "cpu"
        )
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    else:
        from torchao import quantization

        quantization.quantize_(layer, getattr(quantization, quantised.TORCHAO[kind])())
        parts = [getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]]
    assert quantised.bytes_of_weight(kind, rows, columns) == sum(part.nbytes for part in parts)
