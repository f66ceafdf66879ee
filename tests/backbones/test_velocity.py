"""Pretrained models: at r = t > 0 the very function that diffusers computes, elsewhere the terms of r and of the twin.

The oracles call the models by hand, as their pipelines do, and the pipelines' own functions pack the latents.
"""

import copy
import inspect
import json
import math
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss, generate, sample
from tinytwinflow.backbones import states
from tinytwinflow.backbones.families import FAMILIES, pack, unpack
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import EXTRA, load_structure, load_velocity, save_velocity
from tinytwinflow.runs.recipes import configured
from tinytwinflow.training.distributed import MOST_GRAPHS, prepare
from tinytwinflow.training.loop import train

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
close = torch.testing.assert_close

TINY = {
    "SD3Transformer2DModel": dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    ),
    "SanaTransformer2DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, caption_channels=12,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=8,
        timestep_scale=0.5,
    ),
    "FluxTransformer2DModel": dict(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    "QwenImageTransformer2DModel": dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=12, axes_dims_rope=(4, 6, 6),
    ),
    "ZImageTransformer2DModel": dict(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, cap_feat_dim=12,
        axes_dims=[4, 6, 6], axes_lens=[64, 16, 16],
    ),
}  # fmt: skip
PACKED = {"FluxTransformer2DModel": "FluxPipeline", "QwenImageTransformer2DModel": "QwenImagePipeline"}
MASKED = ("SanaTransformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel")
PUBLISHED = {
    "SD3Transformer2DModel": "time_text_embed_2.timestep_embedder.linear_",
    "SanaTransformer2DModel": "time_embed_2.emb.timestep_embedder.linear_",
    "FluxTransformer2DModel": "time_text_embed_2.timestep_embedder.linear_",
    "QwenImageTransformer2DModel": "time_text_embed_2.timestep_embedder.linear_",
    "ZImageTransformer2DModel": "t_embedder_2.mlp.",
}
kinds = pytest.mark.parametrize("kind", [kind for kind in TINY if hasattr(diffusers, kind)])
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


def given_cond(net, n, length=5, seed=0):
    """Random conditions; the first row has a shorter prompt."""
    draw, config = torch.Generator().manual_seed(seed), net.model.config
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, 3:] = 0
    cond = {"prompt_mask": mask, "guidance": 1 + 4 * torch.rand(n, generator=draw)}
    for name, key in net.cond.items():
        if name == "prompt_embeds":
            cond[name] = torch.randn(n, length, config[key], generator=draw)
        if name == "pooled":
            cond[name] = torch.randn(n, config[key], generator=draw)
    return {name: cond[name] for name in net.cond}


def latents(n, height=8, width=6, seed=1):
    return torch.randn(n, 4, height, width, generator=torch.Generator().manual_seed(seed))


def by_hand(model, x, t, c):
    """The velocity noise - data as the model's pipeline computes it, t = sigma."""
    kind, (n, channels, height, width) = type(model).__name__, x.shape
    if kind in PACKED:
        pipeline = getattr(diffusers, PACKED[kind])
        tokens, sizes = pipeline._pack_latents(x, n, channels, height, width), (8 * height, 8 * width, 8)
    if kind == "SD3Transformer2DModel":
        steps = {"timestep": 1000 * t, "pooled_projections": c["pooled"]}
        return model(hidden_states=x, encoder_hidden_states=c["prompt_embeds"], return_dict=False, **steps)[0]
    if kind == "SanaTransformer2DModel":
        text = {"encoder_hidden_states": c["prompt_embeds"], "encoder_attention_mask": c["prompt_mask"]}
        return model(x, timestep=1000 * t * model.config.timestep_scale, return_dict=False, **text)[0]
    if kind == "FluxTransformer2DModel":
        img_ids = pipeline._prepare_latent_image_ids(n, height // 2, width // 2, "cpu", torch.float32)
        y = model(
            hidden_states=tokens, timestep=t, guidance=c.get("guidance"), pooled_projections=c["pooled"],
            encoder_hidden_states=c["prompt_embeds"], txt_ids=torch.zeros(c["prompt_embeds"].shape[1], 3),
            img_ids=img_ids, return_dict=False,
        )[0]  # fmt: skip
        return pipeline._unpack_latents(y, *sizes)
    if kind == "QwenImageTransformer2DModel":
        if "max_txt_seq_len" not in inspect.signature(model.pos_embed.forward).parameters:
            pytest.skip("pipelines of this diffusers have a bug: they leave the mask out")
        y = model(
            hidden_states=tokens, timestep=t, encoder_hidden_states_mask=c["prompt_mask"],
            encoder_hidden_states=c["prompt_embeds"], img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]  # fmt: skip
        return pipeline._unpack_latents(y, *sizes)[:, :, 0]
    texts = [prompt[: mask.sum()] for prompt, mask in zip(c["prompt_embeds"], c["prompt_mask"])]
    y = model(list(x.unsqueeze(2).unbind(0)), 1 - t, texts, return_dict=False)[0]
    return -torch.stack([one.float() for one in y]).squeeze(2)


def sinusoids(time):
    """128 cosines, then 128 sines, of frequencies 10000^(-k/128)."""
    angle = time[:, None] * torch.exp(torch.arange(128) * (-math.log(10000) / 128))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def layers_of(embedder):
    return [layer for layer in embedder.modules() if isinstance(layer, torch.nn.Linear)]


def mlp(embedder, h):
    first, last = layers_of(embedder)
    return last(torch.nn.functional.silu(first(h)))


def spy(net):
    """What the model's embedder hands on, seen after the hooks of the network."""
    seen = []
    embedder = net.model.get_submodule(net.family.embedder)
    return seen, embedder.register_forward_hook(lambda module, args, out: seen.append(out.detach()))


@kinds
@settings(max_examples=6)
@given(t=st.lists(times, min_size=1, max_size=3), height=st.sampled_from([4, 8]), masked=st.booleans())
def test_at_r_equal_to_t_it_is_the_pretrained_velocity(kind, t, height, masked):
    """Bit for bit, whatever the extra embedders hold; called directly, the model is what it was."""
    net, t, x = net_of(kind), torch.tensor(t), latents(len(t), height)
    cond = given_cond(net, len(t))
    if not masked and "prompt_mask" in cond:
        cond["prompt_mask"] = torch.ones(len(t), 5, dtype=torch.bool)
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
    x, cond, t, r = latents(2), given_cond(net, 2), torch.full((2,), t), torch.full((2,), r)
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
    reverse = kind == "ZImageTransformer2DModel"
    unit = 500 if kind == "SanaTransformer2DModel" else 1000
    seen, handle = spy(net)
    with torch.no_grad():
        net(latents(3), t, r, given_cond(net, 3))
        handle.remove()
        clock = sinusoids(unit * (1 - t.abs() if reverse else t.abs()))
        emb_r = mlp(net.r_embedder, sinusoids(unit * (t - r if reverse else r)))
        wanted = mlp(net.model.get_submodule(net.family.embedder), clock) + (t - r)[:, None] * emb_r
        wanted = wanted + torch.signbit(t)[:, None] * mlp(net.twin_embedder, clock)
    assert len(seen) == 1
    close(seen[0], wanted, rtol=1e-3, atol=1e-3)


@kinds
def test_times_are_not_rounded_by_a_model_in_bfloat16(kind):
    """The embedding is that of the sinusoids of the float32 time, whose steps of 0.0005 bfloat16 does not see."""
    net = copy.deepcopy(net_of(kind)).bfloat16()
    t = torch.tensor([0.899, 0.8995])
    assert t.bfloat16().unique().numel() == 1
    clock = 1000 * (1 - t if kind == "ZImageTransformer2DModel" else t)
    clock = clock / 2 if kind == "SanaTransformer2DModel" else clock
    seen, handle = spy(net)
    cond = {name: torch.cat([value, value]) for name, value in given_cond(net, 1).items()}
    with torch.no_grad():
        y = net(latents(1).repeat(2, 1, 1, 1), t, t, cond)
        handle.remove()
        wanted = mlp(net.model.get_submodule(net.family.embedder), sinusoids(clock).bfloat16())
    close(seen[0], wanted, rtol=0.02, atol=0.02)
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(y[0], y[1])


@kinds
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_any_precision_of_x(kind):
    """Weights in bfloat16 take float32 latents and give them back, as does autocast."""
    net, x, t, cond = net_of(kind), latents(2), torch.tensor([0.3, 0.8]), given_cond(net_of(kind), 2)
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
    x, t, r, cond = latents(2), torch.tensor([0.9, -0.4]), torch.tensor([0.1, 0.3]), given_cond(net, 2)
    with torch.no_grad():
        before = net(x, t, r, cond)
        assert torch.equal(twin(x, t, r, cond), before)
        layers_of(twin.r_embedder)[-1].weight.mul_(2)
        after = twin(x, t, r, cond)
        assert not torch.allclose(after, before) and torch.equal(net(x, t, r, cond), before)


@kinds
def test_after_a_failed_call_the_model_is_free_of_its_times(kind):
    net, x, t, cond = copy.deepcopy(net_of(kind)), latents(2), torch.tensor([0.4, 0.7]), given_cond(net_of(kind), 2)

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
        net(latents(2), torch.full((2,), t), torch.full((2,), r), cond).square().mean().backward()
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
    net, x, cond = net_of(kind), latents(3), given_cond(net_of(kind), 3)
    t, r = torch.tensor([0.9, -0.5, 0.3]), torch.tensor([0.0, -0.2, 0.3])
    with torch.no_grad():
        y, turned = net(x, t, r, cond), {name: value.flip(0) for name, value in cond.items()}
        close(net(x.flip(0), t.flip(0), r.flip(0), turned).flip(0), y, rtol=1e-4, atol=1e-4)
        other = {**cond, "prompt_embeds": cond["prompt_embeds"].clone()}
        other["prompt_embeds"][0, 3:] += 1
        same = torch.allclose(net(x, t, r, other), y, rtol=1e-4, atol=1e-4)
        assert same == (kind in MASKED)
        other["prompt_embeds"][0, :3] += 1
        assert not torch.allclose(net(x, t, r, other)[0], y[0], rtol=1e-2, atol=1e-2)


@kinds
def test_blocks_are_all_blocks_in_the_order_of_use(kind):
    net, used = copy.deepcopy(net_of(kind)), []
    names = {name for name in net.model._no_split_modules if name.endswith("Block")}
    assert {id(m) for m in net.model.modules() if type(m).__name__ in names} == {id(block) for block in net.blocks()}
    for i, block in enumerate(net.blocks()):
        block.register_forward_pre_hook(lambda *_, i=i: used.append(i))
    net(latents(1), torch.ones(1), torch.ones(1), given_cond(net, 1))
    assert used == list(range(len(net.blocks())))


def test_blocks_of_a_backbone_are_compiled_once_whatever_their_adapters_are_switched_to(graphs):
    """Student, average and original, with and without gradient, recomputed, data-free: 60 steps as without compiling,
    and nothing is compiled after the fifth."""

    def trained(how):
        net = copy.deepcopy(net_of("QwenImageTransformer2DModel"))
        config = configured("text", ["lora_rank=2", "weights=float32"])
        states.adapt(net, 2)
        state = states.backbone_state(net, config, partial(prepare, recompute=True, compile=how))
        x, cond, loss = latents(8), given_cond(net, 8), TwinFlowLoss.paper(guidance=0.5, data_free=True)
        null = {name: value[:1] for name, value in cond.items()}
        return [(r["total"], len(graphs)) for r in train(state, loss, lambda i: (x, cond), 60, null=null)]

    eager, compiled = trained("none"), trained("default")
    assert [total for total, _ in compiled] == pytest.approx([total for total, _ in eager], rel=1e-4)
    assert 0 < compiled[4][1] == compiled[-1][1] < MOST_GRAPHS


@kinds
def test_without_memory(kind):
    """On the meta device a network can be made, counted and run."""
    with torch.device("meta"):
        net = Velocity(getattr(diffusers, kind).from_config(TINY[kind]))
        cond = {name: value.to("meta") for name, value in given_cond(net, 2).items()}
        y = net(torch.empty(2, 4, 8, 6), torch.empty(2), torch.empty(2), cond)
    assert y.is_meta and y.shape == (2, 4, 8, 6) and all(p.is_meta for p in net.parameters())


@kinds
def test_the_whole_loss_falls(kind):
    """All parts of TwinFlowLoss, with guidance, conditions in a dict and a null one of one row."""
    net = Velocity(model_of(kind, std=0.05))
    x, cond, null = latents(16, 4, 4) * 0.1 + 1, given_cond(net, 16), given_cond(net, 1, seed=5)
    loss = TwinFlowLoss(order=1, guidance=0.3, share=1 / 2, one_step_share=1 / 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def now():
        many = x.repeat(8, 1, 1, 1), {name: torch.cat([value] * 8) for name, value in cond.items()}
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
    net, z = net_of("SD3Transformer2DModel"), latents(2)
    cond = given_cond(net, 2)
    with torch.no_grad():
        close(sample(net, z, steps=1, cond=cond), z - net(z, torch.ones(2), torch.zeros(2), cond))
        close(generate(net, z, cond), sample(net, z, steps=1, cond=cond))


@kinds
def test_what_is_saved_is_loaded_bit_for_bit(kind, tmp_path):
    net, x, cond = net_of(kind), latents(2), given_cond(net_of(kind), 2)
    t, r = torch.tensor([0.9, -0.5]), torch.tensor([0.2, 0.1])
    save_velocity(net, tmp_path / "transformer")
    for again in (load_velocity(tmp_path / "transformer"), load_velocity(tmp_path)):
        assert not again.training
        with torch.no_grad():
            assert torch.equal(again(x, t, r, cond), net(x, t, r, cond))
    plain = getattr(diffusers, kind).from_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        assert torch.equal(by_hand(plain, x, t.abs(), cond), by_hand(net.model, x, t.abs(), cond))
    assert load_velocity(tmp_path, dtype=torch.bfloat16).r_embedder.state_dict().popitem()[1].dtype == torch.bfloat16
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
    x, t, cond = latents(2), torch.tensor([0.9, -0.5]), given_cond(whole, 2)
    with torch.no_grad():
        assert torch.equal(empty(x, t, 0 * t, cond), whole(x, t, 0 * t, cond))


@kinds
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
    net, x, cond = load_velocity(tmp_path), latents(2), given_cond(net_of(kind), 2)
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


@kinds
def test_wrong_inputs_are_refused_in_one_line(kind):
    net, x, t, cond = net_of(kind), latents(2), torch.tensor([0.2, 0.9]), given_cond(net_of(kind), 2)
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
    if net.patch > 1:
        wrong.append((latents(2, 7, 6), t, cond, "H and W multiples of 2"))
        wrong.append((latents(2, 8, 5), t, cond, "H and W multiples of 2"))
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
