"""Drawing: what a run makes while it trains, of labels in one step, of prompts in 1, 2 and 4 side by side."""

import torch

from ..backbones.painting import save_grid
from ..backbones.prompts import decode_latents, load_decoder
from ..backbones.texts import SOURCE, read_conditions
from ..evaluation.pictures import draw_one
from ..method.conditions import apart, count_rows, take
from ..training.loop import autocast
from .folder import sampled
from .settings import mode_of


def look(run):
    """One-step samples of the average as it is now, of prompts or of each label, always of the same noise."""
    return _looks(run, (1,))[0]


def _looks(run, nfes):
    """Samples at some numbers of steps each, what they are of read once.  -> list"""
    config, data, n, cond, rows, mode = run.config, run.data, 64, None, 4000, "any"
    if "model" in config:
        mode, rows = mode_of(config) or "any", config["batch_size"] // config["accumulate"]
        rows = 16 * max(1, rows // (run.world.size if run.world else 1))  # as many at once as in training
    if config.get("validation"):
        cond = read_conditions(config["validation"])
    elif config["conditional"] and data.classes:
        cond = torch.arange(n) % data.classes
    elif config["conditional"]:
        cond, _ = apart((data.batch(0) if hasattr(data, "null") else data.fresh(4))[1], None)
        cond = take(cond, slice(0, 4))
    n = n if cond is None else count_rows(cond)
    shape = cond[SOURCE].shape[1:] if isinstance(cond, dict) and SOURCE in cond else data.shape
    with autocast(run.device, config["precision"]):  # as in training, so that nothing is compiled for it
        how = mode, config["seed"], cond, run.device, rows
        return [sampled(run.state.average, n, shape, steps, *how) for steps in nfes]


def draw_look(run, name):
    """Draw what a run makes now into its folder: all processes sample, one writes.  -> the samples of one step

    Of a backbone a row is a prompt, and a column a number of steps, 1, 2, 4. Raises FloatingPointError if one of these
    is not finite.
    """
    x, *more = _looks(run, (1, 2, 4) if "model" in run.config else (1,))
    step = run.state.step
    if more:
        many = torch.stack([x, *more], dim=1).flatten(0, 1)
        if not many.isfinite().all():
            raise FloatingPointError(f"step {step}: samples are not finite")
        if run.writes:
            pixels = pixels_of(many, run.config["vae"], run.device).clamp(-1, 1)
            save_grid(run.folder / name, ((pixels + 1) * 127.5).round().to(torch.uint8), columns=3)
    elif run.writes:
        draw_one(run.folder / name, x.numpy(), f"step {step}, 1 NFE")
    return x


def pixels_of(x, pipeline="", device="cpu"):
    """Pictures of latents (n, C, h, w), (n, C, T, h, w) or (n, T, C), one by one.  -> (n, 3, H, W) about in [-1, 1]

    pipeline: the folder of one that decodes them; without, the first three channels, of the first frame, are colours.
    """
    if pipeline:
        with torch.random.fork_rng(devices=[]):  # modules draw weights before they read theirs
            decoder = load_decoder(pipeline, device)
        return torch.cat([decode_latents(one, decoder).cpu() for one in x.split(1)])
    x = x[:, None] if x.ndim == 3 else x[:, :, 0] if x.ndim == 5 else x
    x = x[:, :3] if x.shape[1] > 2 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return x.repeat_interleave(8, 2).repeat_interleave(8, 3)
