"""Pipelines of diffusers that were shown the second time, against our sampler, and against themselves as they were."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from test_painting import attached, pipeline_of
from test_prompts import FLUX, PROMPTS, QWEN, SANA, SD3, TOKENS, kinds

from tinytwinflow import attach, sample
from tinytwinflow.backbones import lora, lora_files, states
from tinytwinflow.backbones.prompts import encode_text
from tinytwinflow.backbones.prompts import pipeline_of as about_of
from tinytwinflow.backbones.scheduler import JumpScheduler
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import save_velocity

diffusers = pytest.importorskip("diffusers")
close = torch.testing.assert_close
SHAPE, WORDS = (4, 16, 16), PROMPTS[:2]


def trained(pipeline, seed=1):
    """A copy of a pipeline's transformer with adapters and embedders as if trained: all random."""
    net, draw = Velocity(copy.deepcopy(pipeline.transformer)), torch.Generator().manual_seed(seed)
    states.adapt(net, 2)
    for parameter in lora.parameters(net):
        torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    lora.move_average(net, 0.0)
    return net


def written(net, path):
    lora_files.write_adapters(lora_files.adapter_file(net), path)
    return path


def noise(n=2):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))


def packed(pipeline, z):
    return pipeline._pack_latents(z, *z.shape) if hasattr(pipeline, "_pack_latents") else z


def called(pipeline, prompts, z=None, steps=1, output="latent", **how):
    """What a pipeline makes of prompts without guidance, its length of prompts that of the tests."""
    kind, side = type(pipeline).__name__, SHAPE[1] * pipeline.vae_scale_factor
    how = {"height": side, "width": side, "max_sequence_length": TOKENS[kind], **about_of(kind).plain, **how}
    pipeline.set_progress_bar_config(disable=True)
    if z is not None:
        how["latents"] = packed(pipeline, z.to(pipeline.dtype))
    # some pipelines write into the list they are given
    return pipeline(list(prompts), num_inference_steps=steps, output_type=output, **how).images


def sampled(net, pipeline, z, steps=1, mode="any"):
    cond = encode_text(pipeline, WORDS, TOKENS[type(pipeline).__name__])
    return packed(pipeline, sample(lora.average(net) if hasattr(net, "lora") else net, z, steps, mode, cond=cond))


@kinds
def test_an_attached_pipeline_makes_what_the_sampler_makes(kind, tmp_path):
    """Adapters are put in by PEFT here and by our own hooks there. In one step, where both subtract the network's
    answer once, to the bit, unless attention is given its mask in another form."""
    pipeline, z = pipeline_of(kind, tmp_path), noise()
    net, plain = trained(pipeline), called(pipeline, WORDS, z)
    assert attach(pipeline, written(net, tmp_path / "a.safetensors")) is pipeline
    one = called(pipeline, WORDS, z)
    assert (one - plain).std() > 0.1 * plain.std()
    assert torch.equal(one, sampled(net, pipeline, z)) or kind not in (SD3, SANA, FLUX)
    for steps in (1, 2, 4):
        wanted = sampled(net, pipeline, z, steps)
        close(called(pipeline, WORDS, z, steps), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
        assert steps == 1 or (wanted - one).std() > 1e-2 * one.std()
    assert called(pipeline, WORDS, z, output="pil")[0].size == (SHAPE[1] * pipeline.vae_scale_factor,) * 2


@kinds
def test_at_r_equal_to_t_it_is_the_pipeline_as_it_was(kind, tmp_path):
    """In mode multi, whatever the embedders of r hold, on the same times."""
    pipeline, z = pipeline_of(kind, tmp_path), noise()
    # Z-Image's pipeline says the times of its steps itself
    grid = {"sigmas": [1.0, 0.5]} if "sigmas" in inspect.signature(type(pipeline).__call__).parameters else {}
    plain = called(pipeline, WORDS, z, 2, **grid)
    again = attached(kind, tmp_path, std=1.0, mode="multi")
    wanted = called(again, WORDS, z, 2)
    close(wanted, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)
    assert (called(attached(kind, tmp_path, std=1.0), WORDS, z, 2) - plain).abs().max() > 1e-2


def test_a_run_of_all_weights_and_a_folder_are_attached_alike(tmp_path):
    """A Velocity, the folder it was saved to, with and without a transformer in the pipeline, embedders among the
    model's own weights as the authors publish them."""
    first = attached(SD3, tmp_path)
    net = Velocity(pipeline_of(SD3, tmp_path).transformer)
    torch.manual_seed(5)
    for parameter in net.r_embedder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_velocity(net, tmp_path / "own")
    wanted = called(attach(pipeline_of(SD3, tmp_path), copy.deepcopy(net)), WORDS, noise())
    assert torch.equal(called(attach(pipeline_of(SD3, tmp_path), tmp_path / "own"), WORDS, noise()), wanted)
    free = pipeline_of(SD3, tmp_path)
    free.transformer = None
    attach(free, tmp_path / "own")
    assert torch.equal(called(free, WORDS, noise()), wanted)
    free.transformer.save_pretrained(tmp_path / "published")
    again = attach(pipeline_of(SD3, tmp_path), tmp_path / "published")
    assert torch.equal(called(again, WORDS, noise()), wanted)
    assert not torch.equal(called(first, WORDS, noise()), wanted)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A pipeline with adapters, which no test may change."""
    folder = tmp_path_factory.mktemp("adapted")
    pipeline = pipeline_of(SD3, folder)
    return attach(pipeline, written(trained(pipeline), folder / "a.safetensors"))


def test_callbacks_generators_batches_and_pictures_a_prompt_keep_working(adapted):
    seen = []

    def callback(pipeline, step, time, tensors):
        seen.append((step, pipeline.scheduler.step_index, round(float(time))))
        return tensors

    def seeds():
        return [torch.Generator().manual_seed(i) for i in range(4)]

    many = called(adapted, WORDS, None, 4, num_images_per_prompt=2, generator=seeds(), callback_on_step_end=callback)
    assert seen == [(0, 1, 1000), (1, 2, 750), (2, 3, 500), (3, 4, 250)]
    for i, generator in enumerate(seeds()):
        one = called(adapted, [WORDS[i // 2]], None, 4, generator=generator)
        close(one[0], many[i], atol=1e-4, rtol=1e-4)


def test_guidance_and_another_lora_keep_working(adapted, tmp_path):
    """Both halves of a guided batch are shown r; the adapters can be switched off and scaled as diffusers does it."""
    pipeline, z = copy.deepcopy(adapted), noise()
    one, guided = called(pipeline, WORDS, z), called(pipeline, WORDS, z, guidance_scale=3.0)
    empty = called(pipeline, ["", ""], z)
    close(guided, empty + 3 * (one - empty), atol=1e-3, rtol=1e-3)
    pipeline.disable_lora()
    assert not torch.equal(called(pipeline, WORDS, z), one)
    pipeline.enable_lora()
    assert torch.equal(called(pipeline, WORDS, z), one)
    assert pipeline.get_active_adapters() == ["twinflow"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_another_lora_stays_on_and_what_is_gone_is_said(adapted, tmp_path):
    """A style that was there before is on after attach, with ours, and what one unloads stops the pipeline."""
    styled, style = pipeline_of(SD3, tmp_path), tmp_path / "style"
    both = copy.deepcopy(styled)
    style.mkdir()
    written(trained(styled, seed=2), style / "pytorch_lora_weights.safetensors")
    styled.load_lora_weights(style, adapter_name="style")
    attach(styled, written(trained(both), tmp_path / "a.safetensors"))
    assert styled.get_active_adapters() == ["style", "twinflow"]
    one = called(styled, WORDS, noise())
    attach(both, tmp_path / "a.safetensors")
    both.load_lora_weights(style, adapter_name="style")
    both.set_adapters(["twinflow", "style"])
    close(called(both, WORDS, noise()), one, atol=1e-4, rtol=1e-4)
    styled.set_adapters(["twinflow"])
    assert not torch.allclose(called(styled, WORDS, noise()), one, atol=1e-2)
    styled.unload_lora_weights()
    with pytest.raises(ValueError, match="adapters 'twinflow' of this pipeline were unloaded: load it anew"):
        called(styled, WORDS, noise())


def test_what_fails_leaves_the_pipeline_as_it_was(adapted, tmp_path):
    pipeline = pipeline_of(SD3, tmp_path)
    file = lora_files.adapter_file(trained(pipeline))
    whole = {**file.whole, "r_embedder.linear_1.bias": torch.zeros(3)}
    lora_files.write_adapters(file._replace(whole=whole), tmp_path / "small.safetensors")
    before = called(pipeline, WORDS, noise())
    with pytest.raises(ValueError, match="r_embedder.linear_1.bias is"):
        attach(pipeline, tmp_path / "small.safetensors")
    assert torch.equal(called(pipeline, WORDS, noise()), before)
    lora_files.write_adapters(file, tmp_path / "good.safetensors")
    attach(pipeline, tmp_path / "good.safetensors")


def test_offloading_comes_after(tmp_path):
    from accelerate import cpu_offload

    for turn_on in (
        lambda model: model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level"),
        lambda model: cpu_offload(model, torch.device("cpu")),
    ):
        pipeline = pipeline_of(SD3, tmp_path)
        good = written(trained(pipeline), tmp_path / "good.safetensors")
        turn_on(pipeline.transformer)
        with pytest.raises(ValueError, match="is offloaded: load the pipeline anew, attach, and switch offloading on"):
            attach(pipeline, good)


def test_a_first_frame_that_is_given_is_refused(adapted):
    """A time a token, one of them 0, is no time of the step."""
    pipeline = copy.deepcopy(adapted)
    pipeline.scheduler.set_timesteps(1)
    with pytest.raises(ValueError, match="shows its model several times at once"):
        pipeline.transformer(noise(), timestep=torch.tensor([[1000.0, 0.0]] * 2))


def test_what_is_attached_learns_no_more_and_embedders_stay_in_float32(tmp_path):
    """And a call that fails leaves no time behind."""
    pipeline = pipeline_of(SD3, tmp_path)
    good = written(trained(pipeline), tmp_path / "a.safetensors")
    attach(pipeline.to(torch.bfloat16), good)
    kinds = {name: p.dtype for name, p in pipeline.transformer.named_parameters()}
    assert not any(p.requires_grad for p in pipeline.transformer.parameters())
    assert kinds["time_text_embed_2.timestep_embedder.linear_1.weight"] == torch.float32
    assert kinds["transformer_blocks.0.attn.to_q.base_layer.weight"] == torch.bfloat16
    feed = list(pipeline.transformer._forward_pre_hooks.values())[-1].__self__
    with pytest.raises(ValueError, match="cannot be greater than"):
        called(pipeline, WORDS, None, height=512, width=512)
    assert feed.net.now is None


def test_any_precision_and_a_deep_copy(adapted):
    low = copy.deepcopy(adapted).to(torch.bfloat16)
    a, b = called(low, WORDS, noise()), called(adapted, WORDS, noise())
    assert a.dtype == torch.bfloat16 and (a.float() - b).std() < 0.05 * b.std()
    assert torch.equal(called(adapted, WORDS, noise()), b)


def test_image_to_image_begins_at_its_own_time(adapted):
    """Strength 1/2 of four steps is the last two, of lengths 1/4 and 1/4, on the same parts."""
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(**adapted.components)
    seen, side = [], SHAPE[1] * adapted.vae_scale_factor
    embedder = adapted.transformer.time_text_embed_2.timestep_embedder
    handle = embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(WORDS[0], image=torch.rand(1, 3, side, side), strength=0.5, num_inference_steps=4,
                     guidance_scale=1.0, output_type="pt").images  # fmt: skip
    handle.remove()
    waves = adapted.transformer.time_text_embed.time_proj(torch.tensor([250.0, 0.0]))
    assert image.isfinite().all() and torch.equal(torch.stack(seen), waves)


@pytest.mark.parametrize("how", ["block_level", "leaf_level"])
def test_offloading_in_groups(adapted, how):
    """What is offloaded are the embedders too, since they are parts of the transformer."""
    pipeline = copy.deepcopy(adapted)
    wanted, about = called(pipeline, WORDS, noise()), {"num_blocks_per_group": 1} if how == "block_level" else {}
    pipeline.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), how, **about)
    assert torch.equal(called(pipeline, WORDS, noise()), wanted)


def test_offloading_of_whole_models(adapted):
    """What enable_model_cpu_offload does to each model: it comes when called, and goes when the next one comes."""
    from accelerate import cpu_offload_with_hook

    pipeline = copy.deepcopy(adapted)
    wanted = called(pipeline, WORDS, noise())
    _, hook = cpu_offload_with_hook(pipeline.transformer, torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(called(pipeline, WORDS, noise()), wanted)
        hook.offload()


def test_sequential_offloading(adapted):
    """Weights live on no device but during their own call: what accelerate does for enable_sequential_cpu_offload."""
    from accelerate import cpu_offload

    pipeline = copy.deepcopy(adapted)
    wanted, model = called(pipeline, WORDS, noise()), pipeline.transformer
    cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    names = [name for name, p in model.named_parameters() if p.is_meta]
    assert any("time_text_embed_2" in name for name in names)
    assert torch.equal(called(pipeline, WORDS, noise()), wanted)


def test_the_scheduler_is_saved_with_the_pipeline(adapted, tmp_path):
    pipeline = pipeline_of(SD3, tmp_path)
    attach(pipeline, Velocity(copy.deepcopy(pipeline.transformer)), mode="multi")
    pipeline.save_pretrained(tmp_path / "all")
    again = JumpScheduler.from_pretrained(tmp_path / "all" / "scheduler")
    assert again.config.mode == "multi"
    assert json.loads((tmp_path / "all" / "model_index.json").read_text())["scheduler"][1] == "JumpScheduler"


@pytest.mark.parametrize(
    ("given", "grid"),
    [
        ({"num_inference_steps": 1}, [1, 0]),
        ({"num_inference_steps": 4}, [1, 0.75, 0.5, 0.25, 0]),
        ({"sigmas": np.linspace(1, 1 / 4, 4), "mu": 1.2}, [1, 0.75, 0.5, 0.25, 0]),
        ({"sigmas": np.linspace(1, 0.001, 2)}, [1, 0.5, 0]),
        ({"sigmas": [1.0, 0.9, 0.2]}, [1, 0.9, 0.2, 0]),
        ({"sigmas": [1.0, 0.9]}, [1, 0.9, 0]),
        ({"timesteps": [900, 300]}, [0.9, 0.3, 0]),
    ],
)
def test_the_grid_is_even_unless_the_user_bends_it(given, grid):
    scheduler = JumpScheduler()
    scheduler.set_timesteps(**given)
    close(scheduler.sigmas.float(), torch.tensor(grid).float())
    x = z = torch.ones(1, 2)
    for t, r in zip(grid, grid[1:]):
        assert [round(float(time), 5) for time in scheduler.interval()] == pytest.approx([t, r], abs=1e-5)
        x = scheduler.step(2 * torch.ones(1, 2), scheduler.timesteps[scheduler._due()], x).prev_sample
    close(x, z - 2 * grid[0])


def test_wrong_use_ends_in_one_line(tmp_path, adapted):
    pipeline = pipeline_of(SD3, tmp_path)
    net = trained(pipeline)
    file = lora_files.adapter_file(net)
    good = written(net, tmp_path / "good.safetensors")

    def changed(name, **parts):
        lora_files.write_adapters(file._replace(**parts), tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    first = file.layers()[0]
    key = f"transformer.{first}.lora_A.weight"
    rank = changed("rank", lora={**file.lora, "transformer.r": 3})
    odd = changed("odd", lora={**file.lora, "transformer.target_modules": ["blocks.9.to_q"]})
    nan = changed("nan", tensors={**file.tensors, key: file.tensors[key] * torch.nan})
    foreign = changed("foreign", whole={})
    small = changed("small", whole={**file.whole, "r_embedder.linear_1.bias": torch.zeros(3)})
    (tmp_path / "bytes.safetensors").write_bytes(b"nothing")
    other = pipeline_of(QWEN, tmp_path)
    bare = pipeline_of(SD3, tmp_path)
    bare.transformer = None
    strange = pipeline_of(SD3, tmp_path)
    strange.transformer = torch.nn.Linear(2, 2)
    two = copy.deepcopy(adapted)
    two.transformer_2 = copy.deepcopy(pipeline.transformer)
    for message, call in {
        "has no transformer with a scheduler": lambda: attach(bare, good),
        "has no transformer_2 with a scheduler": lambda: attach(pipeline, good, part="transformer_2"),
        "NoneType has no transformer": lambda: attach(None, good),
        "the transformer of this StableDiffusion3Pipeline: Linear is none of the known": lambda: attach(strange, good),
        "attach takes a run, adapters or the folder of a model, got int": lambda: attach(pipeline, 3),
        "no such file": lambda: attach(pipeline, tmp_path / "none.safetensors"),
        "damaged": lambda: attach(pipeline, tmp_path / "bytes.safetensors"),
        "adapters of another model or rank": lambda: attach(pipeline, rank),
        "blocks.9.to_q is no linear layer here": lambda: attach(pipeline, odd),
        "adapters of another model": lambda: attach(other, good),
        "holds NaN or infinity": lambda: attach(pipeline, nan),
        "were not trained to make jumps": lambda: attach(pipeline, foreign),
        "r_embedder.linear_1.bias is": lambda: attach(copy.deepcopy(pipeline), small),
        "unknown mode 'few': choose from any, multi": lambda: attach(pipeline, good, mode="few"),
        "transformer of this StableDiffusion3Pipeline is attached already": lambda: attach(
            copy.deepcopy(adapted), good
        ),
        "scheduler is of mode any, not multi": lambda: attach(two, good, mode="multi", part="transformer_2"),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert len(str(error.value).splitlines()) == 1


def test_a_pipeline_that_shows_no_r_stops_in_one_line(tmp_path):
    """Another scheduler on an attached model, ours on another model, the model called outside of a pipeline."""
    pipeline = attached(SD3, tmp_path)
    ours, z = pipeline.scheduler, noise()
    with pytest.raises(ValueError, match="takes no steps"):
        pipeline.transformer(z, torch.randn(2, 5, 40), torch.randn(2, 16), torch.ones(2))
    called(pipeline, WORDS, z)
    with pytest.raises(ValueError, match="takes no steps"):
        pipeline.transformer(z, torch.randn(2, 5, 40), torch.randn(2, 16), torch.ones(2))
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="its scheduler takes no steps: is another in its place"):
        called(pipeline, WORDS, z)
    pipeline.scheduler = ours
    assert called(pipeline, WORDS, z).isfinite().all()
    plain = pipeline_of(SD3, tmp_path)
    plain.scheduler = JumpScheduler()
    with pytest.raises(ValueError, match="the model was not shown how far this step goes: tinytwinflow.attach"):
        called(plain, WORDS, z)
