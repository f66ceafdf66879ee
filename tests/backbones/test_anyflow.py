"""AnyFlow's models as diffusers has them, against what is read of their folders; its pipeline against our sampler."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_velocity import bare, given_cond, latents, spy
from test_videos import WAN_VAE
from tiny_first import sinusoids
from tiny_videos import TINY, WAN

from tinytwinflow import TwinFlowLoss, attach, sample
from tinytwinflow.backbones import lora, lora_files, states
from tinytwinflow.backbones.first_adapters import begin_at
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import EXTRA, kind_of_model, load_structure, load_velocity, save_velocity
from tinytwinflow.cli.commands import main
from tinytwinflow.runs.folder import backbone_of

diffusers = pytest.importorskip("diffusers", minversion="0.40")
safetensors = pytest.importorskip("safetensors.torch")
close = torch.testing.assert_close
VARIANTS = {"r": 0.25, "t-r": 0.3}  # deltatime_type -> gate_value
variants = pytest.mark.parametrize("variant", VARIANTS)
# in 64ths, so that a thousand of them, and their differences, are not rounded
times = st.lists(st.integers(0, 64).map(lambda k: k / 64), min_size=3, max_size=3).map(torch.tensor)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """deltatime_type -> a tiny AnyFlow of diffusers with random weights, and its folder."""
    found = {}
    for variant, gate in VARIANTS.items():
        torch.manual_seed(0)
        model = diffusers.AnyFlowTransformer3DModel(**TINY[WAN], gate_value=gate, deltatime_type=variant)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp("anyflow") / "transformer"
        model.eval().save_pretrained(folder)
        found[variant] = model, folder
    return found


def theirs(model, x, t, r, cond):
    """As AnyFlow's pipeline calls its model: frames before channels, a time in thousandths for each frame."""
    t, r = (1000 * time[:, None].expand(-1, x.shape[2]) for time in (t, r))
    return model(x.movedim(2, 1), t, r, cond["prompt_embeds"], return_dict=False)[0].movedim(1, 2)


def inputs(net, n=3):
    return latents(net, n), given_cond(net, n)


def random_(module, std=0.3):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


def changed(folder, out, tensors=(), **config):
    """A copy of a folder with other settings and weights; None takes one away."""
    shutil.copytree(folder, out)
    about = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    if tensors:
        safetensors.save_file(tensors, out / WEIGHTS, {"format": "pt"})
    return out


@variants
@settings(max_examples=10)
@given(t=times, r=times)
def test_it_is_the_function_of_diffusers_at_all_times(variant, made, t, r):
    """At r > t too; before it is trained, the twin of a jump is that jump."""
    model, folder = made[variant]
    net = load_velocity(folder)
    x, cond = inputs(net)
    with torch.no_grad():
        y = net(x, t, r, cond)
        close(y, theirs(model, x, t, r, cond), atol=1e-5, rtol=1e-5)
        assert torch.equal(net(x, -t, -r, cond), y) and y.std() > 0.1


@variants
def test_the_sum_of_the_embeddings(variant, made):
    """By hand: (1 - g) emb(|t|) + g emb_r(|r|), or of |t| - |r|, and the term of the twin; in bfloat16 as well."""
    gate, t, r = VARIANTS[variant], torch.tensor([0.75, -0.5, -0.25]), torch.tensor([0.25, -0.5, -0.125])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        net = load_velocity(made[variant][1], dtype)
        random_(net.twin_embedder)
        seen, _ = spy(net)
        x, cond = inputs(net)
        with torch.no_grad():
            net(x, t, r, cond)
            emb, delta = bare(net.model.condition_embedder.time_embedder), made[variant][0].condition_embedder
            second = r.abs() if variant == "r" else t.abs() - r.abs()
            first = emb(sinusoids(1000 * t.abs())), net.twin_embedder(sinusoids(1000 * t.abs()))
            wanted = (1 - gate) * first[0] + gate * delta.delta_embedder(sinusoids(1000 * second))
            wanted[1:] += first[1][1:]
        close(seen[0].float(), wanted, atol=tolerance, rtol=tolerance)


def test_at_r_equal_to_t_it_is_anyflows_own_velocity(made):
    model, folder = made["r"]
    net, t = load_velocity(folder), torch.tensor([1.0, 0.5, 0.25])
    (x, cond), wan = inputs(net), Velocity(diffusers.WanTransformer3DModel(**TINY[WAN]))
    wan.model.load_state_dict(net.model.state_dict())
    with torch.no_grad():
        v = net(x, t, t, cond)
        close(v, theirs(model, x, t, t, cond), atol=1e-5, rtol=1e-5)
        assert (v - wan(x, t, t, cond)).std() > 0.1 * v.std()


def test_around_a_model_without_weights_of_r_it_begins_as_anyflow_does(made):
    """With a copy of the embedder of t, so at r = t it is the model that it was made of."""
    wan = diffusers.WanTransformer3DModel(**TINY[WAN])
    random_(wan, 0.2)
    net = Velocity(copy.deepcopy(wan))
    wan.register_to_config(gate_value=0.25, deltatime_type="r")
    other, t = Velocity(wan), torch.tensor([1.0, 0.5, 0.25])
    x, cond = inputs(net)
    with torch.no_grad():
        close(other(x, t, t, cond), net(x, t, t, cond), atol=1e-5, rtol=1e-5)
        assert (other(x, t, 0 * t, cond) - net(x, t, t, cond)).std() > 0.1


def pipeline_of(kind, model, shift=1.0):
    """AnyFlow's pipeline, or Wan's, around a model, without what reads prompts."""
    vae = diffusers.AutoencoderKLWan(**WAN_VAE)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=shift)
    pipeline = getattr(diffusers, kind)(
        tokenizer=None, text_encoder=None, transformer=model, vae=vae, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def called(pipeline, z, cond, steps, **how):
    """The latents that a pipeline makes; those of AnyFlow's are called frames too, and come with channels first."""
    how |= {"height": 64, "width": 64, "num_frames": 5, "output_type": "latent", "guidance_scale": 1.0}
    return pipeline(**cond, latents=z, num_inference_steps=steps, **how).frames


@variants
def test_the_sampler_takes_the_steps_of_anyflows_pipeline(variant, made):
    """Also on a bent grid, and along the velocity."""
    model, folder = made[variant]
    net = load_velocity(folder)
    z, cond = inputs(net)
    pipeline = pipeline_of("AnyFlowPipeline", model)
    for steps in (1, 2, 4):
        wanted = called(pipeline, z, cond, steps)
        close(sample(net, z, steps, "any", cond=cond), wanted, atol=1e-4, rtol=1e-4)
        follow = called(pipeline, z, cond, steps, use_mean_velocity=False)
        close(sample(net, z, steps, "multi", cond=cond), follow, atol=1e-4, rtol=1e-4)
        assert (wanted - follow).std() > 0.01 * wanted.std()
    bent, x = pipeline_of("AnyFlowPipeline", model, shift=5.0), z
    wanted = called(bent, z, cond, 3)
    with torch.no_grad():
        for t, r in zip(bent.scheduler.sigmas.float(), bent.scheduler.sigmas[1:].float()):
            x = x - (t - r) * net(x, t.expand(3), r.expand(3), cond)
    close(x, wanted, atol=1e-4, rtol=1e-4)


@variants
def test_attached_to_wans_pipeline_it_makes_what_anyflows_makes(variant, made):
    model, folder = made[variant]
    plain = diffusers.WanTransformer3DModel(**TINY[WAN])
    pipeline, (z, cond) = attach(pipeline_of("WanPipeline", plain), folder), inputs(load_velocity(folder))
    for steps in (1, 2, 4):
        wanted = called(pipeline_of("AnyFlowPipeline", model), z, cond, steps)
        close(called(pipeline, z, cond, steps), wanted, atol=1e-4, rtol=1e-4)


@variants
def test_what_is_saved_is_loaded_to_the_bit_as_what_it_is(variant, made, tmp_path, caplog):
    told = diffusers.utils.logging.get_verbosity()
    net = load_velocity(made[variant][1])
    for embedder in (net.r_embedder, net.twin_embedder):
        random_(embedder)
    x, cond = inputs(net)
    t, r = torch.tensor([0.75, -0.5, 1.0]), torch.tensor([0.25, -0.5, 0.5])
    save_velocity(net, tmp_path / "transformer")
    again, empty, copied = load_velocity(tmp_path), load_structure(tmp_path), copy.deepcopy(net)
    first = load_structure(made[variant][1])
    for other in (empty, first):
        other.load_state_dict(net.state_dict())
    with torch.no_grad():
        y = net(x, t, r, cond)
        for other in (again, empty, first, copied):
            assert torch.equal(other(x, t, r, cond), y)
        random_(copied.r_embedder)
        assert not torch.equal(copied(x, t, r, cond), y) and torch.equal(net(x, t, r, cond), y)
    assert diffusers.utils.logging.get_verbosity() == told < 50
    assert not caplog.records and kind_of_model(made[variant][1])[0] == WAN


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Four prompts with latents, as `embed` writes them."""
    folder, draw = tmp_path_factory.mktemp("texts"), torch.Generator().manual_seed(0)
    tensors = {"prompt_embeds": (4, 5, 12), "latents": (4, 4, 2, 6, 4)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in tensors.items()}
    safetensors.save_file(tensors, folder / "texts-00000.safetensors")
    safetensors.save_file({"prompt_embeds": torch.zeros(1, 5, 12)}, folder / "null.safetensors")
    about = {name: ["F32", list(value.shape[1:])] for name, value in tensors.items()}
    index = {"shards": ["texts-00000.safetensors"], "sizes": [4], "tensors": about, "null": "null.safetensors"}
    (folder / "texts.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("rank", [2, 0])
def test_a_run_trains_it_and_what_is_exported_is_attached(rank, made, texts, tmp_path):
    """Adapters and all weights: the run moves away from the model that it began as, and what leaves it is it."""
    base, run = made["r"][1], tmp_path / "run"
    how = ["steps=2", "batch_size=2", "lr=0.1", "weights=float32", "precision=float32", "warmup_steps=0"]
    how += [f"lora_rank={rank}", f"model={base}", "base_steps=0"]
    assert main(["train", "text", "--data", str(texts), "--out", str(run), "--set", *how]) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    net, config, _, _ = backbone_of(run)
    net = states.view(net, config)
    z, cond = inputs(load_velocity(base))
    for source in (run, tmp_path / "out"):
        own = diffusers.WanTransformer3DModel.from_pretrained(base) if rank else None
        pipeline = attach(pipeline_of("WanPipeline", own), source)
        for steps in (1, 2):
            wanted = sample(net, z, steps, "any", cond=cond)
            close(called(pipeline, z, cond, steps), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)
            assert (wanted - sample(load_velocity(base), z, steps, "any", cond=cond)).std() > 0.01
    if rank:
        plain = pipeline_of("WanPipeline", diffusers.WanTransformer3DModel(**TINY[WAN]))
        with pytest.raises(ValueError, match=r"gate_value and deltatime_type \[0.25, 'r'\] there, \[None, None\] h"):
            attach(plain, tmp_path / "out")


def test_the_loss_falls_and_reaches_its_embedders(made):
    """At r = t too the embedder of r has a gradient, since its term is left there."""
    net = load_velocity(made["r"][1])
    x, cond = inputs(net)
    loss, optimizer = TwinFlowLoss(order=1, share=0.5, one_step_share=0.5), torch.optim.Adam(net.parameters(), lr=1e-3)

    def now():
        return loss(net, x, cond, generator=torch.Generator().manual_seed(0)).total

    before = now().item()
    for _ in range(10):
        optimizer.zero_grad()
        now().backward()
        optimizer.step()
    assert now().item() < before and all(p.grad.any() for p in net.twin_embedder.parameters())
    net.zero_grad()
    net(x, torch.full((3,), 0.5), torch.full((3,), 0.5), cond).square().mean().backward()
    assert all(p.grad.any() for p in net.r_embedder.parameters())
    states.adapt(net, 2)
    assert lora.original(net)(x, torch.ones(3), torch.zeros(3), cond).isfinite().all()


def test_folders_as_the_authors_publish_them(made, tmp_path):
    """Their class has another name and more settings, and their scheduler one of its own."""
    model, folder = made["r"]
    theirs_too = {"_class_name": "FAR_Wan_Transformer3DModel", "init_far_model": False, "init_flowmap_model": True}
    theirs_too |= {"chunk_partition": None, "compressed_patch_size": [1, 4, 4], "full_chunk_limit": 3}
    changed(folder, tmp_path / "transformer", **theirs_too)
    (tmp_path / "scheduler").mkdir()
    about = {"_class_name": "FlowMapDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5.0}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    net, (x, cond) = load_velocity(tmp_path), inputs(load_velocity(folder))
    t, r = torch.tensor([1.0, 0.5, 0.75]), torch.tensor([0.0, 0.25, 0.5])
    with torch.no_grad():
        close(net(x, t, r, cond), theirs(model, x, t, r, cond), atol=1e-5, rtol=1e-5)


def test_what_is_another_model_is_refused_in_one_line(made, tmp_path):
    folder = made["r"][1]
    own = safetensors.load_file(folder / WEIGHTS)
    without = {name: value for name, value in own.items() if "delta" not in name}
    half = {name: value for name, value in own.items() if not name.endswith("delta_embedder.linear_2.bias")}
    nan = own | {"condition_embedder.delta_embedder.linear_1.bias": torch.full((24,), torch.nan)}
    save_velocity(load_velocity(folder), tmp_path / "ours")
    (tmp_path / "ours" / EXTRA).unlink()
    for i, (message, case) in enumerate(
        {
            "AnyFlowFARTransformer3DModel is causal, shown": {"_class_name": "AnyFlowFARTransformer3DModel"},
            "FAR_Wan_Transformer3DModel is causal": {
                "_class_name": "FAR_Wan_Transformer3DModel",
                "init_far_model": True,
            },
            "deltatime_type='t', gate_value=0.25: not": {"deltatime_type": "t"},
            r"deltatime_type='r', gate_value=\[0.25\]: not": {"gate_value": [0.25]},
            "deltatime_type='r', gate_value=None: not": {"gate_value": None},
            "image_dim=8 is another variant": {"image_dim": 8},
            r"condition_embedder.delta_embedder.linear_\S+ does not fit": {"gate_value": None, "deltatime_type": None},
            "has an embedder of r, and there is none$": {"tensors": without},
            r"condition_embedder_2.time_embedder.linear_2.bias is not there\)$": {"tensors": half},
            "condition_embedder_2.time_embedder.linear_1.bias is not finite$": {"tensors": nan},
            "ours: a model with gate_value has an embedder of r, and there is none$": None,
        }.items()
    ):
        path = tmp_path / "ours" if case is None else changed(folder, tmp_path / str(i), **case)
        with pytest.raises(ValueError, match=message) as error:
            load_velocity(path)
        assert "\n" not in str(error.value)


def test_in_files_of_adapters_its_sum_is_said(made, tmp_path):
    net = load_velocity(made["t-r"][1])
    states.adapt(net, 2)
    lora_files.write_adapters(lora_files.adapter_file(net), tmp_path / "a.safetensors")
    about = lora_files.read_adapters(tmp_path / "a.safetensors").about
    assert about["gate_value"] == 0.3 and about["deltatime_type"] == "t-r"
    other = diffusers.WanTransformer3DModel.from_pretrained(made["r"][1])
    with pytest.raises(ValueError, match=r"\[0.3, 't-r'\] there, \[0.25, 'r'\] here"):
        attach(pipeline_of("WanPipeline", other), tmp_path / "a.safetensors")
    again, other = load_velocity(made["t-r"][1]), load_velocity(made["r"][1])
    states.adapt(again, 2), states.adapt(other, 2)
    begin_at(again, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"\[0.3, 't-r'\] there, \[0.25, 'r'\] here"):
        begin_at(other, tmp_path / "a.safetensors")
