"""Plans: what is counted without weights is what a real step holds, computes and sends."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from tinytwinflow import TwinFlowLoss, peers
from tinytwinflow.backbones import lora
from tinytwinflow.backbones import states as large
from tinytwinflow.backbones.families import FAMILIES, published_backbone
from tinytwinflow.backbones.family import Configuration
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.benchmarks import calls, plan
from tinytwinflow.benchmarks.calls import Call
from tinytwinflow.benchmarks.memory import LiveBytes
from tinytwinflow.benchmarks.speed_backbone import loss_for
from tinytwinflow.cli.commands import main
from tinytwinflow.training import loop as train
from tinytwinflow.training.distributed import forget
from tinytwinflow.training.in_backward import in_backward

diffusers = pytest.importorskip("diffusers")
from test_distributed import LOSS, placed_state, small_net, together  # noqa: E402
from test_velocity import LATENTS, TINY  # noqa: E402

ABOUT = Configuration({}, (4, 8, 8), tokens=6)


def tiny_one(monkeypatch, name, **more):
    """A tiny model of the class of a backbone, which is among the backbones as "tiny" from now on."""
    kind, _ = published_backbone(name)
    latents = ABOUT.latents if len(LATENTS[kind]) == 3 else LATENTS[kind]
    monkeypatch.setitem(
        FAMILIES[kind].published, "tiny", replace(ABOUT, settings={**TINY[kind], **more}, latents=latents)
    )
    torch.manual_seed(0)
    return Velocity(getattr(diffusers, kind)(**{**TINY[kind], **more}))


@pytest.fixture
def tiny(monkeypatch):
    return tiny_one(monkeypatch, "qwen-image").bfloat16()


def test_calls_are_those_that_the_loss_makes():
    """TwinFlow on twelve rows: fakes, guidance on both conditions, one call with gradient, two of the teacher for
    order 2, and the gap's two velocities. Flow matching makes one call, DMD2 three networks' with gradient."""
    assert calls.calls_of(TwinFlowLoss.paper(flow_share=0.5, guidance=0.5, share=0.5), 12) == [
        Call("teacher", 12, False), Call("net", 3, False), Call("net", 12, True),
        Call("teacher", 3, False), Call("teacher", 3, False), Call("net", 6, False),
    ]  # fmt: skip
    assert calls.calls_of(TwinFlowLoss(order=0, share=0.0), 5) == [Call("net", 5, True)]
    dmd2 = calls.calls_of(peers.PEERS["dmd2"](every=1), 2)
    assert [call.network for call in dmd2 if call.gradient] == ["net", "critic", "critic", "fake", "critic"]
    assert [call.network for call in dmd2 if not call.gradient] == ["original", "fake"]


def test_calls_of_other_methods_are_theirs():
    """The twin on MeanFlow calls F along the path at its jumps, twice, being in forward mode, then F of all; FreeFlow's
    derivative, in the target time, counts twice, too; alpha-flow is one method before its end and another there."""
    assert calls.calls_of(TwinFlowLoss(base=peers.MeanFlow()), 12) == [
        Call("net", 2, False), Call("net", 2, False), Call("net", 8, True),
        Call("net", 2, False), Call("net", 4, True), Call("net", 4, False),
    ]  # fmt: skip
    assert calls.calls_of(peers.FreeFlow(), 12)[:4] == [
        Call("net", 9, True), Call("net", 9, False), Call("net", 9, False), Call("original", 9, False),
    ]  # fmt: skip
    for loss in (peers.AlphaFlow(), TwinFlowLoss(base=peers.AlphaFlow(), share=0.0)):
        first, last = (calls.calls_of(loss, 4, steps=steps) for steps in (1, 50))
        assert first == [Call("net", 4, True), Call("net", 2, False)]
        assert last[0] == last[1] == Call("net", 4, True) and last[-3:] == [Call("net", 4, True), *2 * [first[1]]]
    assert calls.calls_of(peers.Drifting(), 5) == calls.calls_of(peers.Drifting(), 5, labels=False)
    assert calls.calls_of(peers.Drifting(), 5) == [Call("net", 5, True)], "features are no call of a network"


def test_a_backbone_is_asked_for_no_loss_that_needs_another_network():
    for name in ("apex", "pixel meanflow", "drifting"):
        with pytest.raises(ValueError, match=f"^{name} is for networks and classifiers made here") as refused:
            loss_for(name, "float32")
        assert len(str(refused.value).splitlines()) == 1
    assert loss_for("twin on meanflow", "adapters").base == peers.MeanFlow(power=0.5)
    assert loss_for("twin alone", "in backward").share == 1.0
    with pytest.raises(ValueError, match="freeflow needs networks beside the one that learns: take --training float32"):
        loss_for("freeflow", "adapters")


def real_step(net, made, free, autocast):
    """The most that real calls and their backward pass hold beyond the weights, counted while they run."""
    counter, graphs, (_, about) = LiveBytes(), [], published_backbone("tiny")
    for value in (*net.parameters(), *net.buffers()):
        inside = value.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(value) else ()
        counter.hold([getattr(value, name) for name in inside] or [value])
    start = counter.now
    hooks = [p.register_post_accumulate_grad_hook(calls._free) for p in net.parameters() if free and p.requires_grad]
    with counter:
        for call in made:
            x, t = torch.randn(call.rows, *about.latents), torch.rand(call.rows)
            with torch.set_grad_enabled(call.gradient), train.autocast("cpu", "bf16" if autocast else "float32"):
                y = net(x, t, t, calls.condition_for(net, call.rows, 6, torch.ones, "cpu"))
            graphs += [y] if call.gradient else []
            del y
        while graphs:
            y = graphs.pop()
            y.backward(torch.ones_like(y))
            del y
    for hook in hooks:
        hook.remove()
    for parameter in net.parameters():
        parameter.grad = None
    return counter.peak - start


@pytest.mark.parametrize("training", plan.TRAININGS)
@pytest.mark.parametrize("name", [next(iter(family.published)) for family in FAMILIES.values() if family.published])
def test_what_is_counted_without_weights_is_what_a_real_step_holds(name, training, monkeypatch):
    """Bytes of a step of a tiny backbone of each class on the meta device, and of the same one with weights, to within
    3 %: its attention keeps other tensors. The step has a call that leaves a graph, and calls without one before
    and after. On a CPU autocast casts what it does on a GPU, but for norms, which are cast here by hand."""
    autocast = training == "float32"
    dtype = torch.float32 if autocast else torch.bfloat16
    real = tiny_one(monkeypatch, name).to(dtype)
    net = calls.named_structure("tiny")[0].to("meta", dtype)
    for network in (real, net):
        for block in network.blocks():
            forget(block)
        if training == "adapters":
            large.adapt(network, 2)
    for norm in ("layer_norm", "rms_norm") if autocast else ():
        cast = partial(calls._cast, getattr(torch.nn.functional, norm), torch.float32)
        monkeypatch.setattr(torch.nn.functional, norm, cast)
    some = [Call("teacher", 8, False), Call("net", 16, True), Call("teacher", 9, False), Call("net", 12, False)]
    for free in (True, False):
        counted = calls.bytes_of_calls(net, published_backbone("tiny")[1], some, free, autocast)
        assert counted == pytest.approx(real_step(real, some, free, autocast), rel=0.03)


def test_gradients_are_counted_network_by_network(monkeypatch):
    """Held until the optimiser's step they are those of every network that learns; let go at once, of none."""
    net = tiny_one(monkeypatch, "sd3.5-large").to("meta")
    both, gradients = [Call("net", 1, True), Call("fake", 1, True)], calls.bytes_of(net.parameters())
    alone = calls.bytes_of_calls(net, ABOUT, both)
    two = calls.bytes_of_calls(net, ABOUT, both, others={"fake": copy.deepcopy(net)})
    assert two >= 2 * gradients and 2 * gradients > alone > gradients
    assert calls.bytes_of_calls(net, ABOUT, both, True, others={"fake": copy.deepcopy(net)}) < alone


def test_autocast_holds_what_its_rules_say(tiny):
    """A linear layer's answer is in bfloat16, a norm's in float32, whatever they are given."""
    seen = []
    with calls.as_on_gpu(autocast=True):
        for layer in (torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Conv2d(4, 4, 1)):
            layer, shape = layer.to("meta"), (2, 4, 1, 1) if isinstance(layer, torch.nn.Conv2d) else (2, 4)
            seen += [layer(torch.empty(shape, dtype=d, device="meta")).dtype for d in (torch.float32, torch.bfloat16)]
    assert seen == 2 * [torch.bfloat16] + 2 * [torch.float32] + 2 * [torch.bfloat16]
    assert torch.nn.functional.linear is torch._C._nn.linear, "outside all is as it was"


def test_the_heaviest_step_is_found_whatever_its_seed(tiny, monkeypatch):
    """Of two steps with equal rows the one whose large call comes on top of a graph needs more, drawn late as it is."""
    before = [Call("teacher", 64, False), Call("net", 32, True)]
    after = [Call("net", 32, True), Call("teacher", 64, False)]
    peaks = []
    for late in (before, after):
        monkeypatch.setattr(plan, "calls_of", lambda loss, rows, seed, late=late: late if seed == 90 else before)
        peaks.append(plan.needs_of_step("tiny", TwinFlowLoss(), 1, "adapters")["passing"])
    assert peaks[0] < peaks[1]


def test_a_step_within_another_need_not_be_counted():
    """Calls in the same order, of as many rows at most; whose calls without gradient they are does not matter."""
    large = (Call("teacher", 2, False), Call("net", 1, True), Call("teacher", 1, False))
    small = (Call("net", 1, False), Call("net", 1, True))
    after = (Call("net", 1, True), Call("net", 2, False))
    other = (Call("fake", 1, True), Call("net", 1, True))
    assert plan.heaviest_steps([small, large, after, small, other]) == [large, after, other]


def test_every_step_of_one_row_is_among_those_counted():
    """One row carries one of four parts of the loss, and each is drawn: its calls are those of Eqs. 1, 2 and 9."""
    loss = TwinFlowLoss.paper(flow_share=0.5, guidance=0.5)
    found = {tuple((call.network, call.rows) for call in step) for step in plan.calls_of_steps(loss, 1)}
    flow = (("teacher", 2), ("net", 1))
    any_step, adversarial, rectify = (*flow, *2 * [("teacher", 1)]), 2 * (("net", 1),), (("net", 1), ("net", 2))
    assert found == {flow, any_step, adversarial, rectify}


@pytest.mark.parametrize("name", ["qwen-image", "sana-1.6b"])
def test_the_state_of_adafactor_is_counted(name, monkeypatch):
    """For a tiny model of the class, whose weights are matrices, vectors and, of SANA, convolutions: the numbers that
    one step in the backward pass leaves behind."""
    net = tiny_one(monkeypatch, name).bfloat16()
    lean = in_backward(net.named_parameters(), lr=1e-5)
    sum(p.sum() for p in net.parameters()).backward()
    states = [value for one in lean.optimizers for state in one.state.values() for value in state.values()]
    held = sum(value.nbytes for value in states if value.ndim)
    assert plan.needs_of_step("tiny", TwinFlowLoss(), 4, "in backward")["optimiser"] == held
    assert held < 0.35 * calls.bytes_of(net.parameters())


def test_a_call_without_gradient_comes_on_top_of_the_graph(tiny):
    """A graph that waits for its backward pass is held while another call is made."""
    net, about = calls.meta_backbone("tiny")
    alone = calls.bytes_of_calls(net, about, [Call("net", 64, False)])
    both = calls.bytes_of_calls(net, about, [Call("net", 64, True), Call("net", 64, False)])
    other = calls.bytes_of_calls(net, about, [Call("net", 64, False), Call("net", 64, True)])
    assert both > other > alone


def test_operations_are_those_of_the_network(tiny):
    """One forward call, counted with weights and without; work: a gradient costs two or three calls more."""
    net, about = calls.meta_backbone("tiny")
    cond = {"prompt_embeds": torch.randn(1, 6, 12).bfloat16(), "prompt_mask": torch.ones(1, 6).bool()}
    # some CPUs' fused attention is not in the counter's list
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        tiny(torch.randn(1, 4, 8, 8), torch.ones(1), torch.ones(1), cond)
    assert calls.flops_of_call(net, about) == counted.get_total_flops() > 1e5
    some = [Call("teacher", 2, False), Call("net", 3, True)]
    assert (
        calls.work_of_calls(some, low_rank=True) == 2 + 3 * 3 and calls.work_of_calls(some, low_rank=False) == 2 + 3 * 4
    )


def test_parts_of_a_step(tiny):
    """Weights, optimisers and gradients of each training, by hand from the number of parameters."""
    count, loss = sum(p.numel() for p in tiny.parameters()), TwinFlowLoss()
    found = {training: plan.needs_of_step("tiny", loss, 4, training) for training in plan.TRAININGS}
    whole = found["float32"]
    assert whole["trained"] == count and whole["weights"] == 8 * count == whole["optimiser"]
    assert found["in backward"]["weights"] == 2 * count and found["in backward"]["optimiser"] < 2 * count
    adapted = found["adapters"]
    assert adapted["optimiser"] == 8 * adapted["trained"]
    assert adapted["weights"] > 2 * count + 2 * 4 * adapted["trained"] - 4 * adapted["trained"]
    for figures in found.values():
        assert figures["peak"] == figures["weights"] + figures["optimiser"] + figures["passing"]
    three = plan.needs_of_step("tiny", peers.PEERS["dmd2"](every=1), 4, "float32")
    some = plan.needs_of_step("tiny", peers.PEERS["dmd2"](every=3), 4, "float32")["peak"]
    assert some == pytest.approx(three["peak"], rel=0.05), "but for a table that Qwen-Image's first call leaves"
    assert three["trained"] == 3 * count and three["weights"] == 4 * 5 * count and three["optimiser"] == 3 * 8 * count


def traffic_counted(world):
    """The messages of one step of a sharded loss, and the number of calls that were made."""
    from tinytwinflow.training.loop import loss_of_batch
    from tinytwinflow.training.state import new_state

    state, made = placed_state(small_net, world, parallel="fsdp", recompute=True, make=new_state), []
    for network in (state.net, state.teacher):
        network.register_forward_hook(lambda *_: made.append(1))
    same = world.reseed(state.generator, 0)
    with CommDebugMode() as messages:
        x, label = torch.randn(6, 1, 4, 4), torch.arange(6) % 3
        loss_of_batch(LOSS, state, x, label, torch.tensor([3]), 0.0, same).total.backward()
    return {
        "messages": {str(name): n for name, n in messages.get_comm_counts().items()},
        "calls": len(made),
        "pieces": 3,
    }


def test_each_call_gathers_the_weights_once_and_the_backward_pass_once_more(tmp_path):
    """The law behind `traffic`, from the collectives of a real sharded step with recomputed blocks."""
    world = together(2, traffic_counted, tmp_path)[0]
    gathered = sum(n for name, n in world["messages"].items() if "allgather" in name)
    handed = sum(n for name, n in world["messages"].items() if "reduce_scatter" in name)
    assert world["calls"] == 6
    assert gathered == world["pieces"] * (world["calls"] + 1) and handed == world["pieces"]


def test_traffic_of_a_step(tiny):
    """On one machine nothing comes from others; hsdp brings gradients alone, there and back."""
    count, some = sum(p.numel() for p in tiny.parameters()), [Call("net", 1, True), Call("net", 2, False)]
    within, between = plan.traffic_of_step(tiny, some)
    assert within == (2 * count * 3 + 4 * count) * 7 / 8 and between == 0
    assert plan.traffic_of_step(tiny, some, 4, "hsdp")[1] == 2 * 4 * count * 3 / 4
    assert plan.traffic_of_step(tiny, some, 4, "fsdp")[1] == (2 * count * 3 + 4 * count) * 3 / 4


def test_the_command_prints_the_tables(tiny, capsys):
    assert main(["memory", "--net", "tiny", "--methods", "twinflow"]) == 0
    out = capsys.readouterr().out
    assert "tiny: 0.00 B parameters" in out and "| 1000 | hsdp |" in out
    assert out.count("| flow matching |") == 3 == out.count("| twinflow |")
    assert [out.count(f"| {kind} |") for kind in ("nf4", "int8", "float8")] == [1, 1, 1] and "rows on 24 GB" in out
    assert main(["memory", "--net", "tinier"]) == 2
    assert "unknown net 'tinier'" in capsys.readouterr().err


def test_qwen_image_is_what_is_published():
    """The real configuration: 60 blocks, 20.43 billion parameters; adapters of rank 64 on attention and MLPs 425
    million; a forward call at 1024 x 1024 costs what a count by hand gives."""
    net, about = calls.meta_backbone("qwen-image")
    assert sum(p.numel() for p in net.model.parameters()) == 20_430_401_088 and len(net.blocks()) == 60
    layers = 60 * 2 * (4 * 3072**2 + 2 * 3072 * 12288)
    by_hand = 2 * layers / 2 * (4096 + 512) + 60 * 4 * 4608**2 * 3072
    assert calls.flops_of_call(net, about) == pytest.approx(by_hand, rel=0.01)
    lora.add(net, large.linear_layers(net), 64)
    assert sum(
        p.numel() for name, p in net.named_parameters() if name.endswith(("lora_A.weight", "lora_B.weight"))
    ) == (60 * 2 * 64 * (4 * 2 * 3072 + 2 * (3072 + 12288)))
