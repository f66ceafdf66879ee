"""Backbones in training: recipe text from end to end on a tiny model of a real class, on one process and on two."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytwinflow import TwinFlowLoss
from tinytwinflow.backbones import lora, video_families
from tinytwinflow.backbones import states as large
from tinytwinflow.backbones.texts import Texts
from tinytwinflow.backbones.velocity import Velocity
from tinytwinflow.backbones.velocity_files import load_velocity
from tinytwinflow.benchmarks import speed_backbone as bench_large
from tinytwinflow.cli.commands import main
from tinytwinflow.data.batches import known_of
from tinytwinflow.runs.folder import backbone_of
from tinytwinflow.runs.recipes import configured
from tinytwinflow.runs.settings import loss_of
from tinytwinflow.training import sharded
from tinytwinflow.training.loop import train
from tinytwinflow.training.optimizers import optimizer_of

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
from test_distributed import ENV, torchrun  # noqa: E402
from test_velocity import TINY, given_cond, latents, model_of  # noqa: E402

KIND = "SD3Transformer2DModel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model as diffusers saves it, and a data set of eight prompts with latents near a constant a prompt."""
    root = tmp_path_factory.mktemp("large")
    model_of(KIND, std=0.1).save_pretrained(root / "model")
    draw = torch.Generator().manual_seed(0)
    words = {"prompt_embeds": torch.randn(8, 5, 12, generator=draw), "pooled": torch.randn(8, 10, generator=draw)}
    pixels = torch.linspace(-1, 1, 8)[:, None, None, None] + 0.1 * torch.randn(8, 4, 4, 4, generator=draw)
    (root / "texts").mkdir()
    safetensors.save_file({**words, "latents": pixels}, root / "texts" / "texts-00000.safetensors")
    null = {name: torch.zeros(1, *value.shape[1:]) for name, value in words.items()}
    safetensors.save_file(null, root / "texts" / "null.safetensors")
    tensors = {name: ["F32", list(value.shape[1:])] for name, value in {**words, "latents": pixels}.items()}
    index = {"shards": ["texts-00000.safetensors"], "sizes": [8], "tensors": tensors, "null": "null.safetensors"}
    (root / "texts" / "texts.json").write_text(json.dumps(index))
    return root


def command(folders, out, *changes):
    some = ["steps=4", "checkpoint_every=2", "sample_every=4", "batch_size=4", "lora_rank=3", *changes]
    return ["train", "text", "--data", folders / "texts", "--out", out, "--set", f"model={folders / 'model'}", *some]


def run(*words):
    return main([str(word) for word in words])


ADAPTERS, ALL, IN_BACKWARD = (
    ("weights=bf16",),
    ("weights=float32", "lora_rank=0", "precision=bf16"),
    ("weights=bf16", "lora_rank=0", "optimizer=adafactor"),
)
trainings = pytest.mark.parametrize("how", [ADAPTERS, ALL, IN_BACKWARD], ids=["adapters", "all", "in backward"])


def numbers(folder):
    """The weights of a run's last checkpoint, by name."""
    path = sharded.newest(folder)
    if path is None:
        return torch.load(folder / "checkpoint.pt", weights_only=True)["net"]
    keys = torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    content = {"net": {}}
    for key, value in keys.items():
        if key.startswith("net."):
            content["net"][key.removeprefix("net.")] = torch.empty(value.size, dtype=value.properties.dtype)
    sharded.read_pieces(path, content)
    return content["net"]


def stopped(patch, at):
    """Make reading the batch of a step a Ctrl-C."""
    batch = Texts.batch

    def read(self, step):
        if step == at:
            raise KeyboardInterrupt
        return batch(self, step)

    patch.setattr(Texts, "batch", read)


@trainings
def test_a_run_trains_resumes_bit_for_bit_and_paints(folders, tmp_path, monkeypatch, how):
    """A run of four steps = one stopped in its fourth, resumed from its second: records and weights. There is a
    picture, and a field to paint with that is not the model it began as."""
    quiet, hurt = tmp_path / "quiet", tmp_path / "hurt"
    assert run(*command(folders, quiet, *how)) == 0
    with monkeypatch.context() as patch:
        stopped(patch, 3)
        assert run(*command(folders, hurt, *how)) == 130
    assert run("train", "text", "--out", hurt, "--resume", "--data", folders / "texts") == 0
    logs = [(folder / "log.jsonl").read_text() for folder in (quiet, hurt)]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 4 and (quiet / "samples.png").exists()
    a, b = numbers(quiet), numbers(hurt)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    net, config, shape, step = backbone_of(quiet)
    assert tuple(shape) == (4, 4, 4) and step == 4
    net = large.view(net, config)
    x, cond = Texts(folders / "texts", 4).batch(0)
    t = torch.full((4,), 0.5)
    before = load_velocity(folders / "model")(x, t, t, cond)
    assert (net(x, t, t, cond) - before).abs().max() > 1e-5


@pytest.mark.parametrize("lora_rank", [3, 0])
def test_pieces_train_as_copies_do(folders, tmp_path, lora_rank):
    """On two processes FSDP2, its blocks recomputed, ends with the weights of DDP, also when both are resumed there,
    and a run of adapters saved in pieces by two goes on with one."""
    how = ["weights=float32", f"lora_rank={lora_rank}", "lr=0.1", "warmup_steps=1"]

    def on_two(*words):
        launched = torchrun(2, "-m", "tinytwinflow", *words)
        out = launched.communicate(timeout=100)[0]
        assert launched.returncode == 0, out

    def same():
        a, b = numbers(tmp_path / "ddp"), numbers(tmp_path / "fsdp")
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)
        return a

    for parallel in ("ddp", "fsdp"):
        on_two(*command(folders, tmp_path / parallel, *how, f"parallel={parallel}", "sample_every=100"))
    a, began = same(), load_velocity(folders / "model").state_dict()
    assert sum(name not in began or (a[name] - began[name]).abs().max() > 1e-4 for name in a) > 20
    for parallel in ("ddp", "fsdp"):
        config = tmp_path / parallel / "config.json"
        config.write_text(config.read_text().replace('"steps": 4', '"steps": 6'))
    shutil.copytree(tmp_path / "fsdp", tmp_path / "alone")
    assert run("train", "text", "--out", tmp_path / "alone", "--resume", "--data", folders / "texts") == 0
    known = {"step": 6, "size": 1, "data": known_of(Texts(folders / "texts", 4))}
    assert sharded.about(sharded.newest(tmp_path / "alone")) == known
    if lora_rank:
        for parallel in ("ddp", "fsdp"):
            on_two("train", "text", "--out", tmp_path / parallel, "--resume", "--data", folders / "texts")
        same()


def test_layerwise_training_in_pieces_goes_on_with_as_many(folders, tmp_path, capsys):
    """Adafactor inside the backward pass on two processes: resumed on two bit for bit, refused on one."""
    quiet, hurt = tmp_path / "quiet", tmp_path / "hurt"
    words = [*command(folders, quiet, *IN_BACKWARD, "parallel=fsdp", "sample_every=100")]
    for more in (words, [*words[:5], hurt, *words[6:], "steps=2"]):
        launched = torchrun(2, "-m", "tinytwinflow", *more)
        said = launched.communicate(timeout=100)[0]
        assert launched.returncode == 0, said
    config = hurt / "config.json"
    config.write_text(config.read_text().replace('"steps": 2', '"steps": 4'))
    assert run("train", "text", "--out", hurt, "--resume", "--data", folders / "texts") == 2
    assert "is of 2 processes, whose optimisers cannot be dealt to 1" in capsys.readouterr().err
    launched = torchrun(2, "-m", "tinytwinflow", "train", "text", "--out", hurt, "--resume", "--data", words[3])
    said = launched.communicate(timeout=100)[0]
    assert launched.returncode == 0, said
    a, b = numbers(quiet), numbers(hurt)
    assert all(value.isfinite().all() for value in b.values()) and a.keys() == b.keys()
    began = load_velocity(folders / "model", torch.bfloat16).state_dict()
    assert sum(not torch.equal(value, b[name]) for name, value in began.items() if name in b) > 20


def test_adapters_learn_and_the_original_stays(folders):
    """Data-free training moves the adapters and the embedders alone; the original's velocity is that of the file."""
    config = configured("text", [f"model={folders / 'model'}", "weights=float32", "lora_rank=2", "data_free=true"])
    net = large.build_backbone({"seed": 0, **config})
    state = large.backbone_state(net, {"seed": 0, **config}, place=lambda net: net)
    x, cond = Texts(folders / "texts", 4).batch(0)
    t = torch.full((4,), 0.5)
    before = net(x, t, t, cond).detach()
    data = Texts(folders / "texts", 4)
    options = {"ema": 0.9, "null": data.null}
    records = list(train(state, loss_of(config), data.batch, 3, **options))
    assert records[-1]["step"] == 3
    assert (net(x, t, t, cond) - before).abs().max() > 1e-6
    assert torch.equal(state.original(x, t, t, cond), before)
    frozen = load_velocity(folders / "model").model.state_dict()
    assert all(torch.equal(value, net.model.state_dict()[name]) for name, value in frozen.items())


def test_what_is_exported_is_read_by_diffusers(folders, tmp_path):
    """The adapters' file on the plain model, the whole model from its folder: diffusers computes what the run does."""
    x, cond = Texts(folders / "texts", 4).batch(0)
    t = torch.full((4,), 0.5)
    for how, out in ((("weights=float32",), "adapters.safetensors"), (ALL, "model")):
        name, out = tmp_path / f"run-{out}", tmp_path / out
        assert run(*command(folders, name, *how, "lr=0.1")) == 0
        assert run("export", name, "--out", out) == 0
        if out.is_dir():
            plain = diffusers.SD3Transformer2DModel.from_pretrained(out)
        else:
            plain = diffusers.SD3Transformer2DModel.from_pretrained(folders / "model")
            plain.load_lora_adapter(out)
        net = large.view(*backbone_of(name)[:2])
        y = plain(x, cond["prompt_embeds"], cond["pooled"], 1000 * t, return_dict=False)[0]
        torch.testing.assert_close(y, net(x, t, t, cond), atol=1e-5, rtol=1e-4)
        assert (y - load_velocity(folders / "model")(x, t, t, cond)).abs().max() > 1e-4
        assert run("export", name, "--out", out) == 2


LAST = {  # the layer that makes the answer, where it is not called proj_out
    "ZImageTransformer2DModel": "all_final_layer.2-1",
    "Lumina2Transformer2DModel": "norm_out.linear_2",
    "HiDreamImageTransformer2DModel": "final_layer.linear",
}


@pytest.mark.parametrize("kind", [kind for kind in TINY if hasattr(diffusers, kind)])
def test_the_loss_of_adapters_falls(kind, monkeypatch):
    """For each class of model, adapters on attention and MLPs, average as teacher: the loss on the same draws. The
    last layer learns too, for a random one hides from the adapters what they are to say."""
    monkeypatch.setattr(video_families, "PICTURE_WORDS", 1)  # all are masked and cost a minute
    net = Velocity(model_of(kind, std=0.05))
    last = f"model.{LAST.get(kind, 'proj_out')}"
    lora.add(net, large.linear_layers(net), 4, also=("r_embedder", "twin_embedder", last))
    x, cond = latents(net, 16) * 0.1 + 1, given_cond(net, 16)
    loss, optimizer = TwinFlowLoss(order=1, share=0.5, one_step_share=0.5), optimizer_of([net], 1e-2)

    def now():
        with torch.no_grad():
            return loss(net, x, cond, generator=torch.Generator().manual_seed(7))

    before, draws = now(), torch.Generator().manual_seed(0)
    for _ in range(40):
        optimizer.zero_grad()
        loss(net, x, cond, lora.average(net), generator=draws).total.backward()
        optimizer.step()
        lora.move_average(net, 0.5)
    assert now().total < 0.9 * before.total


@pytest.mark.parametrize("name", ["sana-1.6b", "qwen-image", "z-image", "wan2.1-1.3b", "stable-audio-3-medium"])
def test_a_backbone_is_measured(name, capsys):
    """On a CPU a small one of the same class: steps, memory, sampling, for each way to train."""
    for training in ("adapters", "in backward", "float32") if name == "sana-1.6b" else ("in backward",):
        assert run("bench", "--net", name, "--training", training, "--batch-size", 2) == 0
        out = capsys.readouterr().out
        assert f"in place of {name}), {training}" in out and "100 NFE" in out and "peak memory" in out
    assert run("bench", "--net", name, "--training", "all") == 2
    assert "training must be one of adapters, in backward, float32, got 'all'" in capsys.readouterr().err


def test_methods_are_measured_next_to_it(capsys):
    """Flow matching is the recipe's loss with order 0 and neither twin nor guidance; a peer has its own networks, in
    float32 alone; samples are drawn in the precision of the training, once before the clock runs."""
    config = configured("text")
    plain = bench_large.loss_for("flow matching", "adapters")
    assert (plain.order, plain.share, plain.guidance) == (0, 0.0, 0.0)
    assert bench_large.loss_for("twinflow", "adapters") == loss_of(config)
    drawn = []

    def sample(net, z, steps, cond):
        drawn.append((steps, torch.is_autocast_enabled("cpu")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_large, "sample", sample)
        counts = [
            bench_large.bench_backbone("sana-1.6b", "float32", 2, "cpu", method)["parameters"]
            for method in ("flow matching", "dmd2")
        ]
    assert counts[1] == 3 * counts[0] and drawn == 2 * [(1, True), (1, True), (2, True), (100, True)]
    assert "float32, dmd2: " in capsys.readouterr().out
    for training in ("adapters", "in backward"):
        with pytest.raises(ValueError, match="dmd2 needs networks beside the one that learns: take --training float32"):
            bench_large.bench_backbone("sana-1.6b", training, method="dmd2")
    assert run("bench", "--net", "sana-1.6b", "--methods", "twinflow", "gan") == 2
    assert run("bench", "--net", "sana-1.6b", "--methods", "twinflow share=0.5") == 2
    out, error = capsys.readouterr()
    assert "unknown method 'gan'" in error and "and no others" in error and not out
    for words, what in ((("sana-1.6b", "adapters", 1, "cpu", "gan"), "method 'gan'"), (("vit",), "backbone 'vit'")):
        with pytest.raises(ValueError, match=f"unknown {what}: choose from"):
            bench_large.bench_backbone(*words)


@given(st.integers(0, 300))
def test_the_largest_batch_is_found(most):
    """Of the rows that fit, the most, in at most twice as many trials as their number has binary digits, and two."""
    tried = []
    assert bench_large.largest_that_fits(lambda rows: tried.append(rows) or rows <= most) == most
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 2


def test_memory_that_does_not_suffice_ends_in_one_line(monkeypatch, capsys):
    """Not in the traceback of where it ran out: what was asked for, and what to try. A trial of that size is a no."""
    said = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 is free."

    def train(*_, **__):
        yield {}
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(bench_large, "train", train)
    assert run("bench", "--net", "sana-1.6b", "--batch-size", 3) == 2
    error = capsys.readouterr().err
    assert "cpu has no memory left for sana-1.6b, adapters, twinflow, batch 3 (2.50 GiB was asked for)" in error
    assert "smaller --batch-size, or --training in backward or float32" in error and len(error.splitlines()) == 1
    with pytest.raises(ValueError, match=r"batch 1 \(2.50 GiB was asked for\): try --training in backward or float32"):
        bench_large.bench_backbone("sana-1.6b")
    assert not bench_large.fits_in_memory(train, 3) and bench_large.fits_in_memory(lambda rows: iter(range(rows)), 3)
    with pytest.raises(ValueError, match="the largest batch is looked for on a GPU, not on cpu"):
        bench_large.bench_backbone("sana-1.6b", batch_size="largest")


WRONG = {
    "model=nowhere": "nowhere/config.json: not there",
    "weights=float16": "weights must be one of bf16, float32",
    "conditional=false guidance=0": "a backbone needs its prompts",
    "lora_rank=-1": "lora_rank must be at least 0",
    "lora_rank=0": "adamw would lose small steps in bf16",
    "optimizer=adafactor": "is for all parameters: --set lora_rank=0",
    "optimizer=adafactor lora_rank=0 accumulate=2": "--set accumulate=1",
    "data_free=true lora_rank=0 weights=float32": "which adapters keep",
    "method=dmd guidance=0": "has method twinflow",
    'lora_layers=["to_z"]': "to_z",
    "latents=[4,8,8]": "holds latents of shape (4, 4, 4)",
}


@pytest.mark.parametrize("changes", WRONG)
def test_wrong_settings_end_in_one_line(folders, tmp_path, capsys, changes):
    assert run(*command(folders, tmp_path / "run", *changes.split(" "))) == 2
    error = capsys.readouterr().err
    assert WRONG[changes] in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_core_needs_none_of_the_libraries_for_backbones(folders):
    """Without diffusers and its kin everything is imported and trains; what needs them says what to install."""
    lacking = ["diffusers", "transformers", "safetensors", "accelerate", "peft"]
    train = ["train", "text", "--data", str(folders / "texts"), "--set", f"model={folders / 'model'}"]
    code = f"import sys; sys.modules.update(dict.fromkeys({lacking})); from tinytwinflow.cli.commands import main; "
    code += f"sys.exit(main({train}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert told.returncode == 2 and "pip install 'tinytwinflow[large]'" in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_wrong_folders_end_in_one_line(folders, tmp_path, capsys):
    assert run(*command(folders, tmp_path / "run")) == 0
    for words, what in (
        (["sample", tmp_path / "run"], "python -m tinytwinflow paint"),
        (["evaluate", tmp_path / "run"], "python -m tinytwinflow paint"),
        (
            ["train", "text", "--data", tmp_path, "--out", tmp_path / "b", "--set", f"model={folders / 'model'}"],
            "embed",
        ),
    ):
        assert run(*words) == 2
        assert what in capsys.readouterr().err
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"lora_rank": 3', '"lora_rank": 2'))
    assert run("train", "text", "--out", tmp_path / "run", "--resume", "--data", folders / "texts") == 2
    assert "holds another network" in capsys.readouterr().err


def test_a_model_that_cannot_be_read_ends_in_one_line_and_leaves_nothing(folders, tmp_path, capsys, monkeypatch):
    """Quantised weights are refused as such; whatever else its reader raises is named, and stays the cause."""
    words = command(folders, tmp_path / "run", f"model={tmp_path / 'quantised'}", *ALL)
    shutil.copytree(folders / "model", tmp_path / "quantised")
    config = json.loads((folders / "model" / "config.json").read_text())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "quantised: its weights are quantised (quantization_config)" in error and len(error.splitlines()) == 1
    for raised in (ImportError("no `bitsandbytes`\nrun pip"), KeyError("shape"), AttributeError(), OSError(5, "x")):
        monkeypatch.setattr(getattr(diffusers, KIND), "from_pretrained", lambda *_, e=raised, **__: throw(e))
        assert run(*command(folders, tmp_path / "run")) == 2
        error = capsys.readouterr().err
        assert f"model: no {KIND} ({type(raised).__name__}" in error and len(error.splitlines()) == 1
        with pytest.raises(ValueError) as refused:
            load_velocity(folders / "model")
        assert refused.value.__cause__ is raised
    assert not (tmp_path / "run").exists()


def throw(error):
    raise error


def test_data_of_another_model_is_refused_before_anything_is_written(folders, tmp_path, capsys):
    """Latents of other channels, prompts of another width: one line, and no run folder that only fails later."""
    whole = safetensors.load_file(folders / "texts" / "texts-00000.safetensors")
    null = safetensors.load_file(folders / "texts" / "null.safetensors")
    for name, part, wanted in (("latents", 1, "this model takes floats (B, 4, H, W)"), ("pooled", 1, "(4, 10)")):
        other = tmp_path / name
        shutil.copytree(folders / "texts", other)
        index = json.loads((other / "texts.json").read_text())
        index["tensors"][name][1][0] -= part
        (other / "texts.json").write_text(json.dumps(index))
        smaller = {key: value[:, part:].contiguous() if key == name else value for key, value in whole.items()}
        safetensors.save_file(smaller, other / "texts-00000.safetensors")
        smaller = {key: value[:, part:].contiguous() if key == name else value for key, value in null.items()}
        safetensors.save_file(smaller, other / "null.safetensors")
        words = command(folders, tmp_path / "run")
        words[words.index("--data") + 1] = other
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert wanted in error and len(error.splitlines()) == 1 and not (tmp_path / "run").exists()
