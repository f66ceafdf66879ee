"""A LoRA trained elsewhere as the start: what its own library computes is what training begins at."""

import json
import shutil

import pytest
import torch
from tiny_first import FLUX, HAND, QWEN, SANA, SD3, TINY, Z_IMAGE
from torch import nn

from tinytwinflow.backbones import lora, lora_files, states
from tinytwinflow.backbones.first_adapters import begin_at
from tinytwinflow.backbones.velocity import Velocity

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")
from test_states import command, folders, numbers, run, stopped  # noqa: E402, F401
from test_velocity import given_cond, latents, model_of  # noqa: E402

close = torch.testing.assert_close
PIPELINES = {SD3: "StableDiffusion3", SANA: "Sana", FLUX: "Flux", QWEN: "QwenImage", Z_IMAGE: "ZImage"}
TARGETS = {kind: ["to_k", "to_q", "to_v", "to_out.0"] for kind in TINY}
TARGETS[SD3] = [f"attn.{name}" for name in TARGETS[SD3]]  # and not those of the second attention


def with_lora(kind, seed=1, **how):
    """A tiny model with PEFT's adapters, their matrices random."""
    model = model_of(kind, std=0.1)
    how = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[kind], **how}
    model.add_adapter(peft.LoraConfig(**how))
    draw = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = 0.3 * torch.randn(value.shape, generator=draw)
    return model


def written(model, kind, folder):
    """The file that the training scripts of diffusers leave."""
    pipeline = getattr(diffusers, f"{PIPELINES[kind]}Pipeline")
    about = diffusers.training_utils._collate_lora_metadata({"transformer": model})
    layers = peft.get_peft_model_state_dict(model)
    pipeline.save_lora_weights(folder, transformer_lora_layers=layers, **about)
    return folder


def begun(kind, path, rank=3, layers=None):
    net = Velocity(model_of(kind, std=0.1))
    states.adapt(net, rank, TARGETS[kind] if layers is None else layers)
    begin_at(net, path)
    return net


def seen(net, n=3):
    """x, times r = t > 0, a condition."""
    t = torch.rand(n, generator=torch.Generator().manual_seed(2))
    return latents(net, n), t, t, given_cond(net, n)


@torch.no_grad()
def same(net, kind, model):
    """Student and average are what the model computes, called as its pipeline does; the original is the plain one."""
    x, t, _, cond = here = seen(net)
    wanted, plain = (HAND[kind](each.eval(), x, t, cond) for each in (model, model_of(kind, std=0.1)))
    for field in (net, lora.average(net)):
        close(field(*here), wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-4)
    close(lora.original(net)(*here), plain, atol=0, rtol=0)
    assert (wanted - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("kind", TINY)
def test_what_the_training_scripts_of_diffusers_write(kind, tmp_path):
    """For each family a file with its alpha, twice the rank; the file and the folder that it is in alike."""
    model = with_lora(kind)
    folder = written(model, kind, tmp_path / "lora")
    same(begun(kind, folder), kind, model)
    net, other = begun(kind, folder), begun(kind, next(folder.iterdir()))
    assert all(map(torch.equal, lora.parameters(net), lora.parameters(other)))


@pytest.mark.parametrize(
    "how",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"transformer_blocks.1.attn.to_v": 1}}, {"lora_alpha": 3}],
    ids=["alpha", "rslora", "alpha by layer", "alpha is rank"],
)
def test_what_peft_writes(how, tmp_path):
    """A folder of save_pretrained, whose scale is said beside the file."""
    model = peft.get_peft_model(
        model_of(SD3, std=0.1), peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS[SD3], **how})
    )
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.3)
    model.save_pretrained(tmp_path / "lora")
    same(begun(SD3, tmp_path / "lora"), SD3, model.base_model.model)


def merged(kind, matrices, scale):
    """The tiny model with W + scale up down as weights."""
    model = model_of(kind, std=0.1)
    for layer, (down, up) in matrices.items():
        model.get_submodule(layer).weight.data += scale * up @ down
    return model


def matrices_for(kind, layers, rank=3):
    draw, model = torch.Generator().manual_seed(3), model_of(kind)
    sizes = {name: model.get_submodule(name) for name in layers}
    return {
        name: (torch.randn(rank, one.in_features, generator=draw), torch.randn(one.out_features, rank, generator=draw))
        for name, one in sizes.items()
    }


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_what_older_scripts_wrote(alpha, tmp_path):
    """lora.down and lora.up, with alpha as a tensor of each layer or none, which then is the rank."""
    layers = [f"transformer_blocks.{i}.attn.to_{part}" for i in (0, 1) for part in "qv"]
    matrices, tensors = matrices_for(SD3, layers), {}
    for name, (down, up) in matrices.items():
        tensors |= {f"transformer.{name}.lora.down.weight": down, f"transformer.{name}.lora.up.weight": up}
        tensors |= {f"transformer.{name}.alpha": torch.tensor(alpha)} if alpha else {}
    safetensors.save_file(tensors, tmp_path / "old.safetensors")
    net = begun(SD3, tmp_path / "old.safetensors", layers=["attn.to_q", "attn.to_v"])
    same(net, SD3, merged(SD3, matrices, (alpha or 3) / 3))


def test_what_other_trainers_write_is_converted_by_diffusers(tmp_path):
    """Flux in the names of kohya's scripts, with alpha."""
    names = {"img_attn_proj": "attn.to_out.0", "img_mlp_0": "ff.net.0.proj", "txt_mlp_2": "ff_context.net.2"}
    matrices = matrices_for(FLUX, [f"transformer_blocks.0.{layer}" for layer in names.values()])
    tensors = {}
    for name, pair in zip(names, matrices.values()):
        whole = f"lora_unet_double_blocks_0_{name}"
        tensors |= {f"{whole}.lora_{part}.weight": value for part, value in zip(("down", "up"), pair)}
        tensors[f"{whole}.alpha"] = torch.tensor(1.5)
    safetensors.save_file(tensors, tmp_path / "kohya.safetensors")
    same(begun(FLUX, tmp_path / "kohya.safetensors", layers=list(names.values())), FLUX, merged(FLUX, matrices, 0.5))


def test_what_is_written_here_is_read_whole(tmp_path):
    """The average's adapters and its embedders of r and the twin, at all times."""
    net, draw = Velocity(model_of(SD3, std=0.1)), torch.Generator().manual_seed(4)
    states.adapt(net, 3)
    for value in lora.adapter_state(net).values():
        value += 0.1 * torch.randn(value.shape, generator=draw)
    lora_files.write_adapters(lora_files.adapter_file(net), tmp_path / "own.safetensors")
    other = begun(SD3, tmp_path / "own.safetensors", layers=())
    x, t, _, cond = seen(net)
    for r in (t, 0 * t):
        for field in (other, lora.average(other)):
            assert torch.equal(field(x, t, r, cond), lora.average(net)(x, t, r, cond))
            assert torch.equal(field(x, -t, -r, cond), lora.average(net)(x, -t, -r, cond))
        plain = Velocity(model_of(SD3, std=0.1))
        assert torch.equal(lora.original(other)(x, t, r, cond), plain(x, t, r, cond))
    assert not torch.equal(other(x, t, 0 * t, cond), other(x, t, t, cond))


def changed(change):
    """A file like that of diffusers' scripts, its tensors changed."""
    tensors = {}
    for name, (down, up) in matrices_for(SD3, SD3_LAYERS).items():
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    change(tensors)
    return tensors


SD3_LAYERS = [f"transformer_blocks.{i}.attn.{part}" for i in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")]
FIRST = f"transformer.{SD3_LAYERS[0]}"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
WRONG = {
    "a NaN": (lambda t: t[B].fill_(torch.nan), "to_q.lora_B.weight holds NaN or infinity"),
    "half a pair": (lambda t: t.pop(B), "attn.to_q has not both lora_A and lora_B"),
    "other widths": (lambda t: t.update({A: torch.zeros(3, 7)}), "is (3, 7) there, (3, 16) here"),
    "ranks": (lambda t: t.update({A: torch.zeros(2, 16), B: torch.zeros(16, 2)}), "its rank is 2 and 3, not 3, and"),
    "a layer less": (lambda t: [t.pop(A), t.pop(B)], 'to_q is not adapted there: --set lora_layers=\'["attn.to_k",'),
    "a layer more": (
        lambda t: t.update({f"transformer.proj_out.lora_{part}.weight": torch.zeros(3, 16) for part in "AB"}),
        "proj_out is adapted there alone",
    ),
    "another model": (
        lambda t: t.update({f"transformer.blocks.9.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}),
        "adapters of another model (blocks.9 is no layer of SD3Transformer2DModel)",
    ),
    "dora": (lambda t: t.update({f"{FIRST}.lora_magnitude_vector": torch.ones(16)}), "no part of a plain LoRA"),
    "a bias": (lambda t: t.update({f"{FIRST}.lora_B.bias": torch.ones(16)}), "no part of a plain LoRA"),
    "a text encoder": (
        lambda t: t.update({f"text_encoder.q.lora_{part}.weight": torch.zeros(3, 3) for part in "AB"}),
        "adapters of another model (text_encoder.q is no layer",
    ),
    "nothing": (lambda t: t.clear(), "holds nothing"),
    "half of the embedders": (
        lambda t: t.update({"lora_also.r_embedder.linear_1.bias": torch.zeros(16)}),
        "lora_also.r_embedder.linear_1.weight is not there",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_ends_in_one_line(what, tmp_path):
    change, message = WRONG[what]
    path = tmp_path / "wrong.safetensors"
    safetensors.save_file(changed(change), path)
    with pytest.raises(ValueError) as refused:
        begun(SD3, path)
    said = str(refused.value)
    assert said.startswith(str(path)) and message in said and len(said.splitlines()) == 1


def test_files_that_are_none_end_in_one_line(tmp_path):
    safetensors.save_file(changed(lambda tensors: None), tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes()[:-9])
    for path, message in (
        (tmp_path / "lora.safetensors", "its rank is 3, not 4: --set lora_rank=3"),
        (tmp_path / "cut.safetensors", "damaged, or no safetensors file"),
        (tmp_path / "nowhere", "no such file"),
        (tmp_path, "no such file"),
    ):
        with pytest.raises(ValueError) as refused:
            begun(SD3, path, rank=4)
        assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_run_begins_there_and_goes_on_without_the_file(folders, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Its first step is of the file's adapters; stopped and resumed bit for bit, though the file is gone. What does not
    fit is refused before anything is written."""
    path = tmp_path / "lora"
    safetensors.save_file(changed(lambda tensors: [value.mul_(0.3) for value in tensors.values()]), path)
    how = ["weights=float32", f"init_from={path}", "lora_rank=3", f"lora_layers={json.dumps(TARGETS[SD3])}"]
    plain, quiet, hurt = (tmp_path / name for name in ("plain", "quiet", "hurt"))
    assert run(*command(folders, plain, *how[:1], *how[2:])) == run(*command(folders, quiet, *how)) == 0
    with monkeypatch.context() as patch:
        stopped(patch, 3)
        assert run(*command(folders, hurt, *how)) == 130
    shutil.move(path, tmp_path / "gone")
    assert run("train", "text", "--out", hurt, "--resume", "--data", folders / "texts") == 0
    a, b, c = map(numbers, (quiet, hurt, plain))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    began, moved = changed(lambda tensors: None), 0.0
    for name, value in began.items():
        ours = a["model." + name.removeprefix("transformer.")]
        moved = max(moved, (ours - 0.3 * value).abs().max())
        assert (ours - 0.3 * value).abs().max() < 0.1 * value.abs().max()
    assert moved > 0
    logs = [json.loads((folder / "log.jsonl").read_text().splitlines()[0]) for folder in (plain, quiet)]
    assert logs[0]["total"] != logs[1]["total"]
    monkeypatch.setattr(states, "load_velocity", None)  # what is wrong is known before the model is read
    assert run(*command(folders, tmp_path / "none", *how)) == 2
    assert "lora: no such file" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert run(*command(folders, tmp_path / "none", "weights=float32", "init_from=x", "lora_rank=0")) == 2
    assert "init_from of a backbone is a file of adapters: --set lora_rank=64" in capsys.readouterr().err
