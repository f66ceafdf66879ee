"""A trained backbone on its way out: all that sampling needs in one folder, and a card that says what it is.

The folder holds adapters (`pytorch_lora_weights.safetensors`: adapters, embedders, and how they were made) or a whole
model, README.md, and samples.png if there is a pipeline to draw it. `attach`, diffusers and PEFT read it.
"""

import json
import os
import shutil
from pathlib import Path

from ..backbones.families import family_of
from ..backbones.lora_files import ADAPTERS_FILE, write_adapters
from ..backbones.painting import draw_grid
from ..backbones.prompts import pixels_of_latent
from ..backbones.velocity_files import kind_of_model, save_velocity
from ..files import read_json
from .folder import adapters_of_run, attach, backbone_of, read_config
from .settings import SETTINGS

PATHS = (
    "data",
    "data_dir",
    "model",
    "init_from",
    "validation",
    "vae",
)  # of the machine that trained: they are nobody else's business


def export(run, out, pipeline=None, prompts=(), seed=0):
    """Write what a run has learnt: its adapters' average or its model, and a card.

    out: FILE.safetensors, adapters alone, or a folder that is not there. pipeline: of diffusers, to draw each of the
    prompts at 1, 2 and 4 NFE with what was written; it is attached afterwards. Raises ValueError if out exists, the
    run is none of a backbone, or a file is asked for of a run without adapters.
    """
    run, out, config = Path(run), Path(out), read_config(run)
    refuse_out(out, pipeline is not None)
    if out.suffix == ".safetensors":
        write_adapters(adapters_of_run(run), out)
        return
    writing = out.with_name(out.name + ".tmp")
    shutil.rmtree(writing, ignore_errors=True)
    if config.get("lora_rank"):
        file = adapters_of_run(run)
        writing.mkdir(parents=True)
        write_adapters(file, writing / ADAPTERS_FILE)
        step, shape = file.about["step"], file.about["shape"]
    else:
        net, _, shape, step = backbone_of(run)
        net.model.register_to_config(_name_or_path=kind_of_model(config["model"])[1] or Path(config["model"]).name)
        save_velocity(net, writing)
    if pipeline is not None:
        size = {name: side * pixels_of_latent(pipeline) for name, side in zip(("height", "width"), shape[-2:])}
        draw_grid(attach(pipeline, writing), prompts, writing / "samples.png", seed=seed, **size)
    text = card(config, step, out.name, prompts if pipeline is not None else (), seed)
    (writing / "README.md").write_text(text, encoding="utf-8")
    os.replace(writing, out)


def refuse_out(out, drawn):
    """Raise ValueError if there is something at out, or it is a file and pictures are to be drawn beside it."""
    if Path(out).exists():
        raise ValueError(f"{out} already exists: choose another --out")
    if drawn and Path(out).suffix == ".safetensors":
        raise ValueError(f"{out}: samples stand beside a card, in a folder: choose another --out")


CARD = """---
{metadata}
---

# {name}

{what} of a {kind}, trained with TwinFlow (arXiv 2512.05150) to make a sample in one network evaluation (NFE), a jump
all the way from noise; 2 or 4 are jumps of a half or a quarter of it.

## Use

```python
import diffusers
import tinytwinflow as ttf

pipeline = diffusers.{pipeline}.from_pretrained("{base}")
ttf.attach(pipeline, "{name}")
pipeline({call})
```
{samples}
## Training

{steps} steps of recipe {recipe} of tinytwinflow, data `{data}`, base model `{model}`.

| setting | value | what it is |
|---|---|---|
{settings}
"""
SAMPLES = """
## Samples

![a row a prompt, at 1, 2 and 4 NFE, seed {seed}](samples.png)

{prompts}
"""


def card(config, step, name, prompts=(), seed=0):
    """The README.md of a model in the form of the hub: metadata, how to use it, how it was made.  -> text

    config: settings of the run; step: the last; name: of the folder; prompts, seed: of the samples, if there are any.
    """
    kind, base = kind_of_model(config["model"])
    model = Path(config["model"])
    model = model.parent if model.name.startswith("transformer") else model  # a folder in that of its pipeline
    adapters, pipeline = config["lora_rank"], _pipeline(family_of(kind, config["model"]), model)
    metadata = {"library_name": "diffusers", "tags": ["twinflow", "one-step", *(["lora"] if adapters else [])]}
    metadata |= {"base_model": base} if base else {}
    plain = "".join(f", {key}={value!r}" for key, value in (pipeline.plain if pipeline else {}).items())
    picture = "image=picture, " if pipeline and pipeline.edits else ""
    rows = [(key, value, SETTINGS[key].meaning) for key, value in config.items() if key not in (*PATHS, "recipe")]
    listed = "\n".join(f"{i}. {prompt}" for i, prompt in enumerate(prompts, 1))
    return CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
        what=f"Low-rank adapters of rank {adapters}" if adapters else "All weights",
        pipeline=pipeline.name if pipeline else "DiffusionPipeline",
        call=f"{picture}prompt='a prompt', num_inference_steps=1{plain}",
        samples=SAMPLES.format(seed=seed, prompts=listed) if prompts else "",
        settings="\n".join(f"| {key} | {value!r} | {meaning} |" for key, value, meaning in rows),
        data=Path(config["data"]).name, model=model.name, base=base or model.name,
        name=name, kind=kind, steps=step, recipe=config["recipe"],
    )  # fmt: skip


def _pipeline(family, folder):
    """Of a family's pipelines that of a folder, or the first; None if it has none."""
    index = folder / "model_index.json"
    name = read_json(index, "diffusers pipeline").get("_class_name") if index.is_file() else None
    return next((one for one in family.pipelines if one.name == name), next(iter(family.pipelines), None))
