"""Pretrained models: at r = t > 0 the very function that diffusers computes, elsewhere the terms of r and of the twin.

The oracles call the models by hand, as their pipelines do, and the pipelines' own functions pack the latents.
"""

import copy
import json
from functools import cache, partial

import pytest
import tiny_first
import tiny_images
import tiny_more_images
import tiny_videos
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss, generate, sample
from tinytwinflow.backbones import states, video_families
from tinytwinflow.backbones.families import FAMILIES
from tinytwinflow.backbones.family import pack, unpack
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import EXTRA, load_structure, load_velocity, save_velocity
from tinytwinflow.method.path import expand
from tinytwinflow.runs.recipes import configured
from tinytwinflow.training.distributed import MOST_GRAPHS, prepare
from tinytwinflow.training.loop import train

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
close = torch.testing.assert_close

# modules for some families each: tiny settings, inputs, and the calls of their pipelines
FAMILY_TESTS = (tiny_first, tiny_images, tiny_more_images, tiny_videos)
TINY, LATENTS, COND, HAND, FIRST, SECOND, PUBLISHED = (
    {kind: value for module in FAMILY_TESTS for kind, value in getattr(module, name).items()}
    for name in ("TINY", "LATENTS", "COND", "HAND", "FIRST", "SECOND", "PUBLISHED")
)
OPTIONAL = {kind: make for module in FAMILY_TESTS for kind, make in getattr(module, "OPTIONAL", {}).items()}
kinds = pytest.mark.parametrize("kind", [kind for kind in TINY if hasattr(diffusers, kind)])
READ = {kind for module in FAMILY_TESTS for kind in getattr(module, "READ", ())}
first_kinds = pytest.mark.parametrize("kind", list(tiny_first.TINY))
times = st.floats(0.001, 1).map(lambda a: round(a, 4))
signed = st.floats(-1, 1).map(lambda a: round(a, 4))


def model_of(kind, std=0.2, **config):
    """A tiny model with all weights random, those too that diffusers begins at zero."""
    torch.manual_seed(0)
    model = getattr(diffusers, kind).from_config({**TINY[kind], **config})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def velocity_of(kind):
    """A Velocity whose extra embedders are random too."""
    net = Velocity(model_of(kind))
    for embedder in (net.r_embedder, net.twin_embedder):
        for parameter in embedder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return net


@cache
def net_of(kind):
    """The one network of each kind that no test may change."""
    return velocity_of(kind)


def given_cond(net, n, seed=0):
    """Random conditions; the first row has a shorter prompt."""
    return COND[kind_of(net)](net.model.config, n, torch.Generator().manual_seed(seed))


def kind_of(net):
    return type(net.model).__name__


def latents(net, n, seed=1):
    return torch.randn(n, *LATENTS[kind_of(net)], generator=torch.Generator().manual_seed(seed))


def by_hand(model, x, t, c):
    """The velocity noise - data as the model's pipeline computes it, t = sigma."""
    return HAND[type(model).__name__](model, x, t, c)


def bare(embedder):
    """An embedder as it is without hooks."""
    embedder = copy.deepcopy(embedder)
    embedder._forward_hooks.clear(), embedder._forward_pre_hooks.clear()
    return embedder


def layers_of(embedder):
    return [layer for layer in embedder.modules() if isinstance(layer, torch.nn.Linear)]


def spy(net):
    """What the model's embedder hands on, seen after the hooks of the network."""
    seen = []
    embedder = net.model.get_submodule(net.family.embedder)
    return seen, embedder.register_forward_hook(lambda module, args, out: seen.append(out.detach()))


@kinds
@settings(max_examples=6)
@given(t=st.lists(times, min_size=1, max_size=3), masked=st.booleans())
def test_at_r_equal_to_t_it_is_the_pretrained_velocity(kind, t, masked):
    """Bit for bit, whatever the extra embedders hold; called directly, the model is what it was."""
    net, t = net_of(kind), torch.tensor(t)
    x, cond = latents(net, len(t)), given_cond(net, len(t))
    if not masked:
        cond |= {name: torch.ones_like(value).bool() for name, value in cond.items() if name.endswith("mask")}
    with torch.no_grad():
        v = by_hand(model_of(kind), x, t, cond)
        assert torch.equal(net(x, t, t, cond), v) and v.std() > 0.1
        assert torch.equal(by_hand(net.model, x, t, cond), v)


@kinds
@settings(max_examples=4)
@given(t=times, r=signed)
def test_at_birth_jumps_and_the_twin_are_the_pretrained_velocity(kind, t, r):
    net = copy.deepcopy(net_of(kind))
    for new in (net.r_embedder, net.twin_embedder):
        torch.nn.init.normal_(layers_of(new)[0].weight)
    birth = Velocity(model_of(kind))
    x, cond, t, r = latents(net, 2), given_cond(net, 2), torch.full((2,), t), torch.full((2,), r)
    with torch.no_grad():
        v = by_hand(birth.model, x, t, cond)
        assert torch.equal(birth(x, t, r, cond), v) and torch.equal(birth(x, -t, -t, cond), v)
        assert not torch.equal(net(x, -t, -t, cond), v)


@kinds
@settings(max_examples=10)
@given(t=st.lists(signed, min_size=3, max_size=3), r=st.lists(signed, min_size=3, max_size=3))
def test_the_embedding_is_the_sum_of_three_terms(kind, t, r):
    """emb(|t|) + (t - r) emb_r + [t < 0] emb_twin(|t|), by hand; emb_r is shown r, and by Z-Image t - r."""
    net, t, r = net_of(kind), torch.tensor(t), torch.tensor(r)
    seen, handle = spy(net)
    with torch.no_grad():
        net(latents(net, 3), t, r, given_cond(net, 3))
        handle.remove()
        embedder, clock = bare(net.model.get_submodule(net.family.embedder)), FIRST[kind](t.abs())
        emb_r, emb_twin = net.r_embedder(SECOND[kind](t, r)), net.twin_embedder(clock)
        wanted = embedder(clock) + expand(t - r, emb_r) * emb_r + expand(torch.signbit(t), emb_r) * emb_twin
        rest = embedder(FIRST[kind](torch.zeros(len(seen[0]) - 3)))  # the model's own, of conditions at time 0
    assert len(seen) == 1
    close(seen[0], torch.cat([wanted, rest]), rtol=1e-3, atol=1e-3)


@kinds
def test_times_are_not_rounded_by_a_model_in_bfloat16(kind):
    """The embedding is that of the sinusoids of the float32 time, whose steps of 0.0005 bfloat16 does not see."""
    net = copy.deepcopy(net_of(kind)).bfloat16()
    t = torch.tensor([0.899, 0.8995])
    assert t.bfloat16().unique().numel() == 1
    seen, handle = spy(net)
    cond = {name: torch.cat([value, value]) for name, value in given_cond(net, 1).items()}
    with torch.no_grad():
        y = net(torch.cat([latents(net, 1)] * 2), t, t, cond)
        handle.remove()
        clock = FIRST[kind](t)
        wanted = bare(net.model.get_submodule(net.family.embedder))(clock if clock.ndim == 1 else clock.bfloat16())
    close(seen[0][:2], wanted, rtol=0.02, atol=0.02)
    same = kind == "Lumina2Transformer2DModel"  # whose sinusoids of times up to 1 change less than bfloat16 sees
    assert torch.equal(wanted[0], wanted[1]) == same and torch.equal(y[0], y[1]) == same


@kinds
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_any_precision_of_x(kind):
    """Weights in bfloat16 take float32 latents and give them back, as does autocast."""
    net, x, t, cond = net_of(kind), latents(net_of(kind), 2), torch.tensor([0.3, 0.8]), given_cond(net_of(kind), 2)
    if "guidance" in cond:
        cond["guidance"] = torch.tensor([1.0, 4.0])  # 1000 times which diffusers rounds to bfloat16
        cond["guidance"] = (cond["guidance"] * 1000).bfloat16().float() / 1000
    with torch.no_grad():
        v, low = net(x, t, 0 * t, cond), copy.deepcopy(net_of(kind)).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(x, t, 0 * t, cond)
        for y in (low(x, t, 0 * t, cond), mixed):
            assert y.dtype == torch.float32 and (y - v).std() < 0.3 * v.std()
        assert low(x.bfloat16(), t, t, cond).dtype == torch.bfloat16


@kinds
def test_a_deep_copy_is_a_network_of_its_own(kind):
    """Its hooks are its own: its r terms come from its weights, and changing them leaves the first as it was."""
    net, twin = net_of(kind), copy.deepcopy(net_of(kind))
    x, t, r, cond = latents(net, 2), torch.tensor([0.9, -0.4]), torch.tensor([0.1, 0.3]), given_cond(net, 2)
    with torch.no_grad():
        before = net(x, t, r, cond)
        assert torch.equal(twin(x, t, r, cond), before)
        layers_of(twin.r_embedder)[-1].weight.mul_(2)
        after = twin(x, t, r, cond)
        assert not torch.allclose(after, before) and torch.equal(net(x, t, r, cond), before)


@kinds
def test_after_a_failed_call_the_model_is_free_of_its_times(kind):
    net, x, t, cond = (
        copy.deepcopy(net_of(kind)),
        latents(net_of(kind), 2),
        torch.tensor([0.4, 0.7]),
        given_cond(net_of(kind), 2),
    )

    def fail(*_):
        raise RuntimeError("out of memory")

    with torch.no_grad():
        before = by_hand(net.model, x, t, cond)
        handle = net.blocks()[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            net(x, -t, 0 * t, cond)
        handle.remove()
        assert torch.equal(by_hand(net.model, x, t, cond), before)


@kinds
def test_gradients_reach_the_extra_embedders(kind):
    """emb_r's from rows with r != t alone, emb_twin's from rows with t < 0 alone."""
    net, cond = copy.deepcopy(net_of(kind)), given_cond(net_of(kind), 2)
    for t, r, of_r, of_twin in [(0.6, 0.2, True, False), (-0.6, -0.6, False, True), (0.6, 0.6, False, False)]:
        net.zero_grad()
        net(latents(net, 2), torch.full((2,), t), torch.full((2,), r), cond).square().mean().backward()
        for embedder, wanted in ((net.r_embedder, of_r), (net.twin_embedder, of_twin)):
            assert all(bool(p.grad.any()) == wanted for p in embedder.parameters())
    frozen = Velocity(model_of(kind).requires_grad_(False))
    assert {n.split(".")[0] for n, p in frozen.named_parameters() if p.requires_grad} == {"r_embedder", "twin_embedder"}


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_packing_is_that_of_the_pipelines(n, channels, rows, columns):
    x = torch.arange(n * channels * rows * columns * 4.0).view(n, channels, 2 * rows, 2 * columns)
    for pipeline in (diffusers.FluxPipeline, diffusers.QwenImagePipeline):
        assert torch.equal(pack(x), pipeline._pack_latents(x, *x.shape))
    assert torch.equal(unpack(pack(x), x), x)


@kinds
def test_rows_do_not_see_each_other_nor_masked_words(kind):
    net, x, cond = net_of(kind), latents(net_of(kind), 3), given_cond(net_of(kind), 3)
    t, r = torch.tensor([0.9, -0.5, 0.3]), torch.tensor([0.0, -0.2, 0.3])
    with torch.no_grad():
        y, turned = net(x, t, r, cond), {name: value.flip(0) for name, value in cond.items()}
        close(net(x.flip(0), t.flip(0), r.flip(0), turned).flip(0), y, rtol=1e-4, atol=1e-4)
        other = {**cond, "prompt_embeds": cond["prompt_embeds"].clone()}
        other["prompt_embeds"][0, 3:] += 1
        same = torch.allclose(net(x, t, r, other), y, rtol=1e-4, atol=1e-4)
        assert same == ("prompt_mask" in cond and kind not in tiny_images.SEEN)
        other["prompt_embeds"][0, :3] += 1
        assert not torch.allclose(net(x, t, r, other)[0], y[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [kind for kind in OPTIONAL if hasattr(diffusers, kind)])
def test_a_condition_that_may_be_absent_is_seen_as_the_pipeline_shows_it(kind):
    net, x, t = net_of(kind), latents(net_of(kind), 3), torch.tensor([0.9, 0.5, 0.3])
    cond = {**given_cond(net, 3), **OPTIONAL[kind](3, torch.Generator().manual_seed(2))}
    with torch.no_grad():
        y = net(x, t, t, cond)
        assert torch.equal(y, by_hand(model_of(kind), x, t, cond))
        for name in net.family.optional:
            other = {**cond, name: torch.cat([cond[name][:2], cond[name][2:] + 1])}
            assert torch.equal(net(x, t, t, other)[:2], y[:2]) and not torch.allclose(net(x, t, t, other)[2], y[2])
            with pytest.raises(ValueError, match=f"{name} must be .* of shape"):
                net(x, t, t, {**cond, name: cond[name][:, :-1]})


@kinds
def test_blocks_are_all_blocks_in_the_order_of_use(kind):
    net, used = copy.deepcopy(net_of(kind)), []
    kept = net.model._no_split_modules or net.model._repeated_blocks
    names = {name for name in kept if name.endswith("Block")}
    inner = {id(getattr(block, "block", block)) for block in net.blocks()}  # HiDream wraps each of its blocks
    assert {id(m) for m in net.model.modules() if type(m).__name__ in names} == inner
    for i, block in enumerate(net.blocks()):
        block.register_forward_pre_hook(lambda *_, i=i: used.append(i))
    net(latents(net, 1), torch.ones(1), torch.ones(1), given_cond(net, 1))
    assert used == list(range(len(net.blocks())))


def test_blocks_of_a_backbone_are_compiled_once_whatever_their_adapters_are_switched_to(graphs):
    """Student, average and original, with and without gradient, recomputed, data-free: 60 steps as without compiling,
    and nothing is compiled after the fifth."""

    def trained(how):
        net = copy.deepcopy(net_of("QwenImageTransformer2DModel"))
        config = configured("text", ["lora_rank=2", "weights=float32"])
        states.adapt(net, 2)
        state = states.backbone_state(net, config, partial(prepare, recompute=True, compile=how))
        x, cond, loss = latents(net, 8), given_cond(net, 8), TwinFlowLoss.paper(guidance=0.5, data_free=True)
        null = {name: value[:1] for name, value in cond.items()}
        return [(r["total"], len(graphs)) for r in train(state, loss, lambda i: (x, cond), 60, null=null)]

    eager, compiled = trained("none"), trained("default")
    assert [total for total, _ in compiled] == pytest.approx([total for total, _ in eager], rel=1e-4)
    assert 0 < compiled[4][1] == compiled[-1][1] < MOST_GRAPHS


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind not in READ])
def test_without_memory(kind):
    """On the meta device a network can be made, counted and run."""
    with torch.device("meta"):
        net = Velocity(getattr(diffusers, kind).from_config(TINY[kind]))
        cond = {name: value.to("meta") for name, value in given_cond(net, 2).items()}
        y = net(torch.empty(2, *LATENTS[kind]), torch.empty(2), torch.empty(2), cond)
    assert y.is_meta and y.shape == (2, *LATENTS[kind]) and all(p.is_meta for p in net.parameters())


@kinds
def test_the_whole_loss_falls(kind, monkeypatch):
    """All parts of TwinFlowLoss, with guidance, conditions in a dict and a null one of one row."""
    monkeypatch.setattr(video_families, "PICTURE_WORDS", 1)  # all are masked and cost half a minute
    net = Velocity(model_of(kind, std=0.05))
    x, cond, null = latents(net, 16) * 0.1 + 1, given_cond(net, 16), given_cond(net, 1, seed=5)
    loss = TwinFlowLoss(order=1, guidance=0.3, share=1 / 2, one_step_share=1 / 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def now():
        many = torch.cat([x] * 8), {name: torch.cat([value] * 8) for name, value in cond.items()}
        with torch.no_grad():
            return loss(net, *many, null=null, generator=torch.Generator().manual_seed(7))

    before, draws = now(), torch.Generator().manual_seed(0)
    for _ in range(50):
        optimizer.zero_grad()
        loss(net, x, cond, null=null, generator=draws).total.backward()
        optimizer.step()
    after = now()
    assert after.base < 0.7 * before.base and after.total < 0.87 * before.total
    assert layers_of(net.twin_embedder)[-1].weight.any() and layers_of(net.r_embedder)[-1].weight.any()


def test_one_step_of_sampling_is_one_jump():
    net, z = net_of("SD3Transformer2DModel"), latents(net_of("SD3Transformer2DModel"), 2)
    cond = given_cond(net, 2)
    with torch.no_grad():
        close(sample(net, z, steps=1, cond=cond), z - net(z, torch.ones(2), torch.zeros(2), cond))
        close(generate(net, z, cond), sample(net, z, steps=1, cond=cond))


@kinds
def test_what_is_saved_is_loaded_bit_for_bit(kind, tmp_path):
    net, x, cond = net_of(kind), latents(net_of(kind), 2), given_cond(net_of(kind), 2)
    t, r = torch.tensor([0.9, -0.5]), torch.tensor([0.2, 0.1])
    save_velocity(net, tmp_path / "transformer")
    for again in (load_velocity(tmp_path / "transformer"), load_velocity(tmp_path)):
        assert not again.training
        with torch.no_grad():
            assert torch.equal(again(x, t, r, cond), net(x, t, r, cond))
    plain = getattr(diffusers, kind).from_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        assert torch.equal(by_hand(plain, x, t.abs(), cond), by_hand(net.model, x, t.abs(), cond))
    low = load_velocity(tmp_path, dtype=torch.bfloat16)
    embedders = (low.model.get_submodule(low.family.embedder), low.r_embedder)
    assert len({p.dtype for embedder in embedders for p in embedder.parameters()}) == 1
    with torch.no_grad():
        assert low.model.dtype == torch.bfloat16 and low(x, t, r, cond).isfinite().all()
    with pytest.raises(ValueError, match="already exists"):
        save_velocity(net, tmp_path / "transformer")
    roots = {PUBLISHED[kind].split(".")[0], PUBLISHED[kind].split(".")[0].replace("_2", "_twin")}
    assert {name.split(".")[0] for name in safetensors.load_file(tmp_path / "transformer" / EXTRA)} == roots


@kinds
def test_the_structure_is_what_is_loaded_but_for_its_values(kind, tmp_path):
    save_velocity(net_of(kind), tmp_path / "transformer")
    empty, whole = load_structure(tmp_path, torch.bfloat16), load_velocity(tmp_path, torch.bfloat16)
    about = [{n: (v.shape, v.dtype) for n, v in net.state_dict().items()} for net in (empty, whole)]
    assert about[0] == about[1]
    empty.load_state_dict(whole.state_dict())
    x, t, cond = latents(whole, 2), torch.tensor([0.9, -0.5]), given_cond(whole, 2)
    with torch.no_grad():
        assert torch.equal(empty(x, t, 0 * t, cond), whole(x, t, 0 * t, cond))


@first_kinds
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_as_the_authors_publish_them(kind, sharded, tmp_path, caplog):
    """emb_r's among the model's own, in one file or several; the twin, which they have not, begins at zero."""
    model = model_of(kind)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "1GB")
    numbers = ("0", "2") if "mlp" in PUBLISHED[kind] else ("1", "2")
    layers = dict(zip(numbers, layers_of(net_of(kind).r_embedder)))
    extra = {f"{PUBLISHED[kind]}{n}.{k}": v for n, m in layers.items() for k, v in m.state_dict().items()}
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    if sharded:
        table = json.loads(index.read_text())
        files = sorted(set(table["weight_map"].values()))
        assert len(files) > 1
        parts = dict(zip(extra, [files[0], files[-1], files[0], files[-1]]))
        table["weight_map"] |= parts
        index.write_text(json.dumps(table))
    else:
        parts = dict.fromkeys(extra, "diffusion_pytorch_model.safetensors")
    for name in set(parts.values()):
        mine = {key: extra[key] for key in extra if parts[key] == name}
        safetensors.save_file(safetensors.load_file(tmp_path / name) | mine, tmp_path / name, {"format": "pt"})
    net, x, cond = load_velocity(tmp_path), latents(net_of(kind), 2), given_cond(net_of(kind), 2)
    t, r = torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.1])
    with torch.no_grad():
        assert torch.equal(net(x, t, r, cond), net_of(kind)(x, t, r, cond))
        assert torch.equal(net(x, -t, -t, cond), net(x, t, t, cond))
    assert not caplog.records


def test_extra_weights_that_do_not_fit_are_refused(tmp_path):
    kind = "SD3Transformer2DModel"
    net, name = Velocity(model_of(kind)), PUBLISHED[kind]
    weights = {f"{name}{n}.{k}": v for n, m in zip("12", layers_of(net.r_embedder)) for k, v in m.state_dict().items()}
    save_velocity(net, tmp_path / "transformer")
    file = tmp_path / "transformer" / EXTRA
    for bad, message in [
        ({key: weights[key] for key in list(weights)[1:]}, "linear_1"),
        (weights | {f"{name}2.bias": torch.zeros(3)}, r"linear_2.bias is \(3,\) there, \(16,\) here"),
        (weights | {"time_text_embed_2.text_embedder.linear_1.bias": torch.zeros(3)}, "text_embedder"),
        (weights | {"time_text_embed_twin.timestep_embedder.linear_1.bias": torch.zeros(16)}, "twin"),
    ]:
        safetensors.save_file(bad, file)
        with pytest.raises(ValueError, match=message) as error:
            load_velocity(tmp_path)
        assert "\n" not in str(error.value)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_velocity(tmp_path)


def test_folders_that_hold_no_flow_transformer_are_refused(tmp_path):
    save_velocity(Velocity(model_of("SD3Transformer2DModel")), tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())

    def refused(path, message):
        with pytest.raises(ValueError, match=message) as error:
            load_velocity(path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    refused(tmp_path / "nowhere", "config.json: not there")
    for kind in ("DiTTransformer2DModel", "PixArtTransformer2DModel"):
        other = tmp_path / kind
        other.mkdir()
        (other / "config.json").write_text(json.dumps({"_class_name": kind}))
        refused(other, f"{kind} is none of the known .*SD3Transformer2DModel, .*Flux")
    (other / "config.json").write_text(json.dumps(config))
    refused(other, "no SD3Transformer2DModel")
    (other / "config.json").write_text("{")
    refused(other, "no JSON")

    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    for about, message in [
        ({"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}, "DDIMScheduler with prediction_type epsilon"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "v_prediction"}, "v_prediction"),
        ({"_class_name": "SCMScheduler", "prediction_type": "trigflow"}, "trigflow"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, None),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, None),
    ]:
        scheduler.write_text(json.dumps(about))
        for path in (tmp_path, tmp_path / "transformer"):
            if message:
                refused(path, message)
            else:
                load_velocity(path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.load_file(file)
    safetensors.save_file({key: weights[key] for key in weights if key != "proj_out.bias"}, file, {"format": "pt"})
    refused(tmp_path, "proj_out.bias does not fit")
    safetensors.save_file(weights | {"strange.weight": torch.zeros(1)}, file, {"format": "pt"})
    refused(tmp_path, "strange.weight does not fit")


@pytest.mark.parametrize(
    "kind, config, message",
    [
        ("SD3Transformer2DModel", {"out_channels": 8}, "makes 8 channels of 4"),
        ("SanaTransformer2DModel", {"out_channels": 8}, "makes 8 channels of 4"),
        ("FluxTransformer2DModel", {"in_channels": 32, "out_channels": 16}, "4 channels of 8: it is shown pictures"),
        ("FluxTransformer2DModel", {"in_channels": 8, "out_channels": 16}, "makes 4 channels of 2: only a velocity"),
        ("QwenImageTransformer2DModel", {"out_channels": 8}, "makes 8 channels of 4"),
        ("QwenImageTransformer2DModel", {"guidance_embeds": True}, "guidance_embeds=True is another variant"),
        ("QwenImageTransformer2DModel", {"zero_cond_t": True}, "zero_cond_t=True is another variant"),
        ("SanaTransformer2DModel", {"guidance_embeds": True}, "guidance_embeds=True is another variant"),
        ("ZImageTransformer2DModel", {"siglip_feat_dim": 8}, "siglip_feat_dim=8 is another variant"),
    ],
)
def test_variants_of_another_meaning_are_refused(kind, config, message):
    if kind == "ZImageTransformer2DModel" and not hasattr(diffusers, kind):
        pytest.skip("diffusers too old")
    with pytest.raises(ValueError, match=message):
        Velocity(model_of(kind, **config))


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="Linear is none of the known flow transformers: " + ", ".join(FAMILIES)):
        Velocity(torch.nn.Linear(1, 1))
    net = Velocity(model_of("SD3Transformer2DModel"))
    with pytest.raises(ValueError, match="already inside a Velocity"):
        Velocity(net.model)


@first_kinds
def test_wrong_inputs_are_refused_in_one_line(kind):
    net, x, t, cond = net_of(kind), latents(net_of(kind), 2), torch.tensor([0.2, 0.9]), given_cond(net_of(kind), 2)
    first = next(iter(cond))
    wrong = [
        (x[:, :3], t, cond, r"this model takes floats \(B, 4, H, W\)"),
        (x[0], t, cond, "this model takes"),
        (x.long(), t, cond, "x is torch.int64"),
        (x, t[:1], cond, r"must have shape \(2,\)"),
        (x, 2 * t, cond, r"\[-1, 1\]"),
        (x, t, None, "cond must be a dict of prompt_embeds, .*, got none"),
        (x, t, {}, "got none"),
        (x, t, {**cond, "labels": t}, "got .*labels"),
        (x, t, {name: cond[name] for name in cond if name != first}, "cond must be a dict of"),
        (x, t, {**cond, "prompt_embeds": cond["prompt_embeds"][..., :7]}, r"prompt_embeds must be .* \(2, 5, 12\)"),
        (x, t, {**cond, "prompt_embeds": cond["prompt_embeds"][:1]}, "prompt_embeds must be"),
        (x, t, {**cond, "prompt_embeds": cond["prompt_embeds"].long()}, "prompt_embeds must be floating-point"),
    ]
    if net.axes["H"] > 1:
        wrong.append((x[:, :, :7], t, cond, "with multiples in H of 2, W of 2"))
        wrong.append((x[:, :, :, :5], t, cond, "with multiples in H of 2, W of 2"))
    if "pooled" in cond:
        wrong.append((x, t, {**cond, "pooled": cond["pooled"][:, :7]}, r"pooled must be .* \(2, 10\)"))
    if "prompt_mask" in cond:
        wrong.append((x, t, {**cond, "prompt_mask": cond["prompt_mask"].float()}, "whole numbers or bool"))
        wrong.append((x, t, {**cond, "prompt_mask": cond["prompt_mask"][:, :4]}, r"prompt_mask must be .* \(2, 5\)"))
    if "guidance" in cond:
        wrong.append((x, t, {**cond, "guidance": cond["guidance"][:1]}, r"guidance must be .* \(2,\)"))
    for x_, t_, cond_, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            net(x_, t_, t_, cond_)
        assert "\n" not in str(error.value)


def test_images_that_are_larger_than_the_places_of_aura_flow_are_refused():
    net, t = net_of("AuraFlowTransformer2DModel"), torch.ones(1)
    with torch.no_grad():
        assert net(torch.zeros(1, 4, 4, 16), t, t, given_cond(net, 1)).shape == (1, 4, 4, 16)
    with pytest.raises(
        ValueError, match=r"^x is of shape \(1, 4, 4, 18\), this model has places for H and W up to 16$"
    ):
        net(torch.zeros(1, 4, 4, 18), t, t, given_cond(net, 1))


def with_weight(folder, name, value):
    """A folder of the SD3 model with another tensor for one of its weights."""
    save_velocity(net_of("SD3Transformer2DModel"), folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    safetensors.save_file(safetensors.load_file(file) | {name: value}, file, {"format": "pt"})
    return folder


def test_weights_that_cannot_learn_are_refused_and_half_ones_are_read(tmp_path):
    """Whole numbers and numbers of 8 bits are quantised, whatever the settings say; they are not cast."""
    own, name = net_of("SD3Transformer2DModel").model.proj_out.weight.detach(), "proj_out.weight"
    for kind, dtype in {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64}.items():
        with pytest.raises(ValueError, match=f"{name} is {kind}, and weights to learn from are F16, BF16, F32, F64$"):
            load_velocity(with_weight(tmp_path / kind, name, own.to(dtype)))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        folder = with_weight(tmp_path / str(dtype), name, own.to(dtype))
        (folder / "another.fp8.safetensors").write_bytes(b"which diffusers does not read")
        assert torch.equal(load_velocity(folder).model.proj_out.weight, own.to(dtype).float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(bad, tmp_path):
    value = torch.zeros(16)
    value[3] = bad
    with pytest.raises(ValueError, match="own: weight proj_out.bias holds NaN or infinity in float32$"):
        load_velocity(with_weight(tmp_path / "own", "proj_out.bias", value))
