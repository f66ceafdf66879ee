"""Adapters on quantised weights: what is counted without the packages is what a real step on their layers holds."""

import pytest
import torch

from tinytwinflow.backbones import states
from tinytwinflow.backbones.velocity_files import load_velocity
from tinytwinflow.benchmarks import calls
from tinytwinflow.benchmarks.calls import Call
from tinytwinflow.benchmarks.few_bits import keep_in
from tinytwinflow.training.distributed import forget

diffusers = pytest.importorskip("diffusers")
from test_plan import ABOUT, real_step, tiny, tiny_one  # noqa: E402, F401
from test_quantised import KINDS, cpu, needs  # noqa: E402, F401


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
