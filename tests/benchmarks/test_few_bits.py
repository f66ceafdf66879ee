"""Adapters on quantised weights: what is counted without the packages is what a real step on their layers holds."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tinytwinflow.backbones import states
from tinytwinflow.backbones.quantised import TORCHAO
from tinytwinflow.backbones.velocity_files import load_velocity
from tinytwinflow.benchmarks import calls
from tinytwinflow.benchmarks.calls import Call
from tinytwinflow.benchmarks.few_bits import keep_in
from tinytwinflow.benchmarks.memory import LiveBytes
from tinytwinflow.training.distributed import forget

diffusers = pytest.importorskip("diffusers")
from test_plan import ABOUT, real_step, tiny, tiny_one  # noqa: E402, F401
from test_quantised import KINDS, cpu, needs  # noqa: E402, F401


def test_all_linear_layers_but_those_of_the_time_hold_few_bits(tiny):  # noqa: F811
    net = tiny.to("meta")
    shapes = {name: layer.weight.shape for name, layer in net.model.named_modules() if isinstance(layer, nn.Linear)}
    keep_in(net, "int8")
    for name, (rows, columns) in shapes.items():
        weight = net.model.get_submodule(name).weight
        bits = 16 if name.startswith("time_text_embed.timestep_embedder.") else 8
        assert weight.nbytes == rows * columns * bits / 8 + (5 * rows if bits == 8 else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_for_one_row(kind):
    """Where the weight is nearly all that there is: the most that a product holds, and its backward pass."""
    needs(kind)
    real, counts = nn.Linear(512, 1024, device="cpu", dtype=torch.bfloat16), []
    if kind == "nf4":
        from bitsandbytes.nn import Linear4bit, Params4bit

        plain, real = real, Linear4bit(512, 1024, compute_dtype=torch.bfloat16, quant_type="nf4", device="cpu")
        real.weight, real.bias = Params4bit(plain.weight.data, False, quant_type="nf4").to("cpu"), plain.bias
        real.support_avx512bf16_for_cpu = False
    else:
        from torchao import quantization

        quantization.quantize_(real, getattr(quantization, TORCHAO[kind])())
    real.requires_grad_(False)
    counted = nn.Sequential(nn.Linear(512, 1024, device="meta", dtype=torch.bfloat16)).requires_grad_(False)
    keep_in(SimpleNamespace(model=counted, family=SimpleNamespace(embedder="time")), kind)
    for layer, device in ((real, "cpu"), (counted, "meta")):
        inside = layer.weight.__tensor_flatten__()[0] if kind != "nf4" and device == "cpu" else ()
        x, counter = torch.ones(1, 512, dtype=torch.bfloat16, device=device).requires_grad_(), LiveBytes()
        counter.hold([*layer.parameters(), *(getattr(layer.weight, name) for name in inside)])
        start = counter.now
        with counter:
            layer(x).sum().backward()
        counts.append((counter.peak - start) / (512 * 1024))
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_step_on_quantised_layers(kind, monkeypatch, tmp_path, cpu):  # noqa: F811
    """The blocks recomputed or not, to within 4 %: torchao keeps each weight, made whole, for the backward pass,
    bitsandbytes makes it twice, so without recomputing the two differ."""
    needs(kind)
    wide = {"attention_head_dim": 64, "num_attention_heads": 2, "axes_dims_rope": (16, 24, 24)}
    for again in (True, False):
        tiny_one(monkeypatch, "qwen-image", **wide).model.save_pretrained(tmp_path / f"{again}")
        real = load_velocity(tmp_path / f"{again}", torch.bfloat16, kind, True)
        net = calls.named_structure("tiny")[0].to("meta", torch.bfloat16)
        keep_in(net, kind)
        for network in (real, net):
            for block in network.blocks() if again else ():
                forget(block)
            states.adapt(network, 2)
        some = [Call("teacher", 2, False), Call("net", 4, True), Call("net", 3, False)]
        counted = calls.bytes_of_calls(net, ABOUT, some)
        assert counted == pytest.approx(real_step(real, some, False, False), rel=0.04)
