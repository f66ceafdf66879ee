"""Latents: an image folder encoded once by a diffusers AutoencoderKL, read back from disk while training.

A folder of latents holds latents.json and shards, each a .npy of the posterior's mean and deviation,
(n, 2, 2 C, h, w) in float16, second axis: the image and its mirror image. They are memory-mapped, so
a set larger than memory costs none.
"""

import json
from pathlib import Path

import numpy as np
import torch

from ..files import damage_named
from .batches import mark_of, spread
from .shards import place_of, shard_rows, write_index, write_shards

LATENTS_INDEX = "latents.json"


def is_latents(folder):
    return (Path(folder) / LATENTS_INDEX).is_file()


def autoencoder(path, device="cpu"):
    """A diffusers AutoencoderKL from a folder. Raises ValueError if diffusers or the weights are not there."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError("latents need diffusers: pip install 'tinytwinflow[large]'") from error
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"{Path(path) / 'config.json'}: no such file, so {path} holds no AutoencoderKL")
    with damage_named(path, "no AutoencoderKL"):
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True)
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def encode(images, vae, out, batch_size=32, shard=4096):
    """Encode every image of a `Folder` into shards in the folder `out`, and last its index.

    After a stop the shards that are there are not made again. Raises ValueError if `out` holds a finished set, or one
    begun with other images, size or autoencoder, or if a latent is not finite.
    """
    out, device = Path(out), next(vae.parameters()).device
    settings = {
        "images": str(images.folder),
        "count": len(images),
        "size": images.size,
        "autoencoder": str(vae.config._name_or_path),
        "shard": shard,
    }

    def make(rows):
        parts = []
        for some in rows.split(batch_size):
            x = images.read(some, None)[0].to(device)
            posterior = vae.encode(torch.cat([x, x.flip(-1)])).latent_dist
            both = torch.cat([posterior.mean, posterior.std], dim=1).chunk(2)
            parts.append(torch.stack(both, dim=1).half().cpu())
        whole = torch.cat(parts)
        if not whole.isfinite().all():
            raise ValueError(f"images {rows[0]} to {rows[-1]}: their latents are not finite in float16")
        return whole.numpy()

    shards = shard_rows(len(images), shard, "latents-{:05d}.npy")
    write_shards(out, LATENTS_INDEX, settings, shards, make, np.save)
    about = {
        "shards": list(shards),
        "labels": images.labels.tolist(),
        "classes": images.classes,
        "scale": vae.config.scaling_factor,
        "shift": getattr(vae.config, "shift_factor", None) or 0.0,
    }
    write_index(out, LATENTS_INDEX, about)


class Latents:
    """A folder made by `encode`, a table of latents (n, C, h, w) scaled to about unit spread, and labels.

    Each reading draws from the posterior; `mirrored` takes the mirror image's half of the time. Raises
    ValueError if the folder is damaged or a latent is not finite.
    """

    def __init__(self, folder, mirrored=False):
        self.folder, self.mirrored = Path(folder), mirrored
        with damage_named(self.folder, "damaged latents"):
            about = json.loads((self.folder / LATENTS_INDEX).read_text())
            self.labels, self.classes = torch.tensor(about["labels"]).long(), about["classes"]
            self.scale, self.shift = float(about["scale"]), float(about["shift"])
            self.shards = [np.load(self.folder / name, mmap_mode="r") for name in about["shards"]]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        shapes = {shard.shape[1:] for shard in self.shards}
        if len(shapes) != 1 or self.ends[-1] != len(self.labels):
            raise ValueError(f"{self.folder}: damaged latents (shards of shapes {shapes}, {len(self.labels)} labels)")
        if not isinstance(self.classes, int) or not 0 <= self.labels.min() <= self.labels.max() < self.classes:
            raise ValueError(f"{self.folder}: labels must lie in [0, {self.classes - 1}]")
        _, twice, height, width = shapes.pop()
        self.shape, self.count = (twice // 2, height, width), len(self.labels)
        some = zip(*place_of(spread(self.count, 16).numpy(), self.ends))
        self.mark = mark_of((self.folder / LATENTS_INDEX).read_bytes(), *(self.shards[shard][at] for shard, at in some))

    def __len__(self):
        return len(self.labels)

    def read(self, rows, generator):
        mirror = torch.rand(len(rows), generator=generator) < (0.5 if self.mirrored else 0.0)
        noise = torch.randn(len(rows), *self.shape, generator=generator)
        places = zip(*place_of(rows.numpy(), self.ends), mirror)
        x = np.stack([self.shards[shard][at, int(m)] for shard, at, m in places])
        mean, std = torch.from_numpy(x).float().chunk(2, dim=1)
        bad = ~(mean + std).flatten(1).isfinite().all(1)
        if bad.any():
            raise ValueError(f"{self.folder}: the latent of image {rows[bad.nonzero()[0, 0]]} holds NaN or infinity")
        return (mean + std * noise - self.shift) * self.scale, self.labels[rows]


@torch.no_grad()
def decode(x, vae, scale, shift, batch_size=16):
    """Images in [-1, 1] from scaled latents.  (n, C, h, w) -> (n, 3, H, W)."""
    device = next(vae.parameters()).device
    return torch.cat([vae.decode((some / scale + shift).to(device)).sample.cpu() for some in x.split(batch_size)])
