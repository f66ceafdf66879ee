"""A run on its way out, by the commands: embed, train, paint, export, attach, on a tiny pipeline of a real class."""

import copy
import json
import re

import pytest
import torch
from PIL import Image
from test_painting import pipeline_of
from test_pipelines import called, noise
from test_prompts import PROMPTS, SD3, picture_of

import tinytwinflow as ttf
from tinytwinflow.backbones import states
from tinytwinflow.backbones.prompts import encode_text
from tinytwinflow.cli.commands import main
from tinytwinflow.runs.folder import backbone_of

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
WORDS = PROMPTS[:2]


def run(*words):
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline's folder, embedded prompts, and two runs of two steps, of adapters and of all weights."""
    home = tmp_path_factory.mktemp("export")
    pipeline = pipeline_of(SD3, home)
    pipeline.register_to_config(_name_or_path="someone/tiny")
    pipeline.transformer.register_to_config(_name_or_path="someone/tiny")
    pipeline.save_pretrained(home / "pipeline")
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (home / "pairs").mkdir()
    for i, prompt in enumerate(PROMPTS[:3]):
        Image.new("RGB", (40, 40), (80 * i, 40, 200)).save(home / "pairs" / f"{i}.png")
        (home / "pairs" / f"{i}.txt").write_text(prompt)
    encoded = ["--pipeline", home / "pipeline", "--tokens", 5, "--out", home / "texts"]
    assert run("embed", home / "pairs", "--size", 16 * pipeline.vae_scale_factor, *encoded) == 0
    for name, rank in (("adapters", 2), ("all", 0)):
        how = ["steps=2", "batch_size=2", "lr=0.3", "weights=float32", f"lora_rank={rank}", "precision=float32"]
        how += [f"model={home / 'pipeline'}", "warmup_steps=0", "base_steps=0"]
        assert run("train", "text", "--data", home / "texts", "--out", home / name, "--set", *how) == 0
    return home


def test_of_all_weights_the_average_leaves(home, tmp_path):
    """What samples.png shows, not what was trained last."""
    saved = torch.load(home / "all" / "checkpoint.pt", weights_only=True)
    name = "transformer_blocks.0.attn.to_q.weight"
    net = backbone_of(home / "all")[0]
    assert torch.equal(net.model.state_dict()[name], saved["average"][f"model.{name}"])
    assert not torch.equal(net.model.state_dict()[name], saved["net"][f"model.{name}"])


def field(folder):
    """What a run samples from."""
    net, config, _, _ = backbone_of(folder)
    return states.view(net, config)


runs = pytest.mark.parametrize("name", ["adapters", "all"])


@runs
def test_a_run_and_what_is_exported_of_it_make_the_samples_of_the_run(name, home, tmp_path):
    """Attached to the pipeline that it began from, whose own sample is another; a file of adapters alone as well."""
    z, fresh = noise(), pipeline_of(SD3, tmp_path)
    cond = encode_text(fresh, WORDS, 5)
    assert run("export", home / name, "--out", tmp_path / "out") == 0
    sources = [home / name, tmp_path / "out"]
    if name == "adapters":
        assert run("export", home / name, "--out", tmp_path / "one.safetensors") == 0
        sources.append(tmp_path / "one.safetensors")
    for steps in (1, 4):
        wanted = ttf.sample(field(home / name), z, steps, cond=cond)
        for source in sources:
            pipeline = pipeline_of(SD3, tmp_path)
            assert ttf.attach(pipeline, source) is pipeline
            made = called(pipeline, WORDS, z, steps)
            torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
        assert (wanted - called(fresh, WORDS, z, steps)).std() > 0.02
    assert run("export", home / name, "--out", tmp_path / "out") == 2, "nothing is written over"


@runs
def test_the_card_says_what_it_is_and_nothing_of_the_machine(name, home, tmp_path):
    samples = ["--pipeline", home / "pipeline", "--prompts", home / "prompts.txt"]
    assert run("export", home / name, "--out", tmp_path / "mine", *samples) == 0
    text = (tmp_path / "mine" / "README.md").read_text()
    _, metadata, rest = text.split("---\n", 2)
    about = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in metadata.splitlines())}
    assert about["library_name"] == "diffusers" and about["base_model"] == "someone/tiny"
    assert ("lora" in about["tags"]) == (name == "adapters") and "twinflow" in about["tags"]
    assert "2 steps of recipe text" in rest and "| batch_size | 2 |" in rest and "| lr | 0.3 |" in rest
    assert str(home).encode() not in b"".join(path.read_bytes() for path in (tmp_path / "mine").iterdir())
    assert all(f"{i}. {prompt}" in rest for i, prompt in enumerate(PROMPTS, 1))
    code = re.search(r"```python\n(.*?)```", rest, re.S)[1]
    compile(code, "card", "exec")
    assert 'StableDiffusion3Pipeline.from_pretrained("someone/tiny")' in code and "guidance_scale=1.0" in code
    grid = picture_of(tmp_path / "mine" / "samples.png")
    side = 16 * pipeline_of(SD3, tmp_path).vae_scale_factor + 2
    assert grid.size == (3 * side + 2, len(PROMPTS) * side + 2)
    assert run("export", home / name, "--out", tmp_path / "plain") == 0
    assert "samples.png" not in (tmp_path / "plain" / "README.md").read_text()
    assert not (tmp_path / "plain" / "samples.png").exists() and not (tmp_path / "plain.tmp").exists()


def test_peft_reads_what_is_exported(home, tmp_path):
    """PEFT itself, told by the file what it is, and the pipeline's own loader: the same function of r = t."""
    import peft

    assert run("export", home / "adapters", "--out", tmp_path / "out") == 0
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    tensors = {
        k.removeprefix("transformer."): v for k, v in safetensors.load_file(file).items() if "lora_also" not in k
    }
    with safetensors.safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["lora_adapter_metadata"])
    pipeline, cond = pipeline_of(SD3, tmp_path), None
    model = copy.deepcopy(pipeline.transformer)
    config = peft.LoraConfig(**{key.removeprefix("transformer."): value for key, value in said.items()})
    peft.inject_adapter_in_model(config, model)
    assert not peft.set_peft_model_state_dict(model, tensors).unexpected_keys
    pipeline.load_lora_weights(tmp_path / "out")
    x, t, cond = noise(), torch.full((2,), 0.5), encode_text(pipeline, WORDS, 5)
    how = {"encoder_hidden_states": cond["prompt_embeds"], "pooled_projections": cond["pooled"], "return_dict": False}
    with torch.no_grad():
        one, two = (net(x, timestep=1000 * t, **how)[0] for net in (model, pipeline.transformer))
        close = torch.testing.assert_close
        close(one, two), close(one, field(home / "adapters")(x, t, t, cond), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adapters", "all", "exported"])
def test_paint_writes_what_the_attached_pipeline_makes(name, home, tmp_path):
    source = home / name
    if name == "exported":
        source = tmp_path / "out"
        assert run("export", home / "adapters", "--out", source) == 0
    side, out = 16 * pipeline_of(SD3, tmp_path).vae_scale_factor, tmp_path / "images"
    words = ["paint", source, "--prompts", home / "prompts.txt", "--pipeline", home / "pipeline", "--tokens", 5]
    assert run(*words, "--n", 2, "--size", side, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"{i:05d}" for i in range(len(PROMPTS))]
    assert picture_of(out / "00001" / "00001.png").size == (side, side)
    assert run(*words, "--size", side + 1) == 2 and run(*words, "--mode", "few", "--out", tmp_path / "few") == 2


def test_wrong_exports_end_in_one_line(home, tmp_path, capsys):
    assert run("train", "toy", "--out", tmp_path / "toy", "--set", "steps=2", "width=8", "depth=1") == 0
    wrong = {
        "toy is no run of a backbone: python -m tinytwinflow sample": ["export", tmp_path / "toy", "--out", "x"],
        "no adapters: choose a folder": ["export", home / "all", "--out", tmp_path / "a.safetensors"],
        "samples stand beside a card": [
            *("export", home / "adapters", "--out", tmp_path / "a.safetensors"),
            *("--pipeline", home / "pipeline", "--prompts", home / "prompts.txt"),
        ],
        "need both --pipeline and --prompts": ["export", home / "all", "--out", tmp_path / "a", "--prompts", "p.txt"],
    }
    for message, words in wrong.items():
        capsys.readouterr()
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "a").exists()
