"""Latents: what the autoencoder says of each image, read back row by row; a stop or damage is named in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_folder

from tinytwinflow.data import latents
from tinytwinflow.data.images import Images
from tinytwinflow.data.readers import Folder

close = torch.testing.assert_close


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("twelve") / "pictures")


@pytest.fixture(scope="module")
def encoded(twelve, vae, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "pictures"
    latents.encode(Folder(twelve, 16), latents.autoencoder(vae), out, batch_size=5, shard=8)
    return out


def test_latents_are_the_autoencoders(twelve, vae, encoded):
    """Mean and deviation of the posterior, of the image and of its mirror image, in shards; scaled when read."""
    model, images = latents.autoencoder(vae), Folder(twelve, 16)
    assert sorted(path.name for path in encoded.glob("*.npy")) == ["latents-00000.npy", "latents-00001.npy"]
    x = images.read(torch.arange(12), None)[0]
    for side, picture in enumerate((x, x.flip(-1))):
        posterior = model.encode(picture).latent_dist
        stored = np.concatenate([np.load(encoded / f"latents-0000{i}.npy")[:, side] for i in (0, 1)])
        close(torch.from_numpy(stored).float(), torch.cat([posterior.mean, posterior.std], 1), atol=2e-3, rtol=2e-3)
    table = latents.Latents(encoded)
    drawn = torch.stack([table.read(torch.arange(12), torch.Generator().manual_seed(i))[0] for i in range(400)])
    posterior, scale = model.encode(x).latent_dist, model.config.scaling_factor
    close(drawn.mean(0), posterior.mean * scale, atol=0.25 * scale * posterior.std.max().item(), rtol=0.01)
    assert ((drawn.std(0) / (posterior.std * scale)).mean() - 1).abs() < 0.02
    assert torch.equal(table.read(torch.arange(12), torch.Generator())[1], images.labels)
    close(latents.decode(posterior.mean * scale, model, scale, 0.0), model.decode(posterior.mean).sample)


def test_mirrored_latents_come_half_of_the_time(encoded):
    table, rows = latents.Latents(encoded, mirrored=True), torch.arange(12)
    assert all(isinstance(shard, np.memmap) for shard in table.shards)
    sides = []
    plain = latents.Latents(encoded)
    for i in range(60):
        mirrored = table.read(rows, torch.Generator().manual_seed(i))[0]
        sides.append((mirrored - plain.read(rows, torch.Generator().manual_seed(i))[0]).flatten(1).norm(dim=1) < 1e-6)
    assert 0.4 < torch.stack(sides).float().mean() < 0.6


def test_a_set_of_latents_is_data_like_any_other(encoded):
    data = Images(str(encoded), 5, size=8, flip=True)
    assert data.shape == (4, 8, 8) and data.classes == 2 and set(data.scaling) == {"scale", "shift"}
    assert torch.equal(data.batch(3)[0], Images(str(encoded), 5, size=8, flip=True).batch(3)[0])
    with pytest.raises(ValueError, match="size is 8 there, not 32"):
        Images(str(encoded), 5, size=32)


def test_encoding_goes_on_where_it_was_stopped_and_overwrites_nothing(twelve, vae, encoded, tmp_path):
    model, images, out = latents.autoencoder(vae), Folder(twelve, 16), tmp_path / "out"

    class Stops(Folder):
        def read(self, rows, generator):
            if rows.max() >= 10:
                raise KeyboardInterrupt
            return super().read(rows, generator)

    with pytest.raises(KeyboardInterrupt):
        latents.encode(Stops(twelve, 16), model, out, batch_size=5, shard=8)
    assert not latents.is_latents(out)
    first = (out / "latents-00000.npy").stat().st_mtime_ns
    latents.encode(images, model, out, batch_size=5, shard=8)
    assert (out / "latents-00000.npy").stat().st_mtime_ns == first
    for name in ("latents-00000.npy", "latents-00001.npy"):
        assert np.array_equal(np.load(out / name), np.load(encoded / name))
    with pytest.raises(ValueError, match="already holds latents"):
        latents.encode(images, model, out)
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        latents.encode(Stops(twelve, 16), model, other, batch_size=5, shard=8)
    with pytest.raises(ValueError, match="was begun with size 16, not 20: choose another --out"):
        latents.encode(Folder(twelve, 20), model, other, batch_size=5, shard=8)


def test_damaged_latents_are_named(encoded, vae, tmp_path):
    def copy(name):
        return shutil.copytree(encoded, tmp_path / name)

    nan = copy("nan")
    shard = np.load(nan / "latents-00001.npy")
    shard[2, 0, 1, 0, 0] = np.nan
    np.save(nan / "latents-00001.npy", shard)
    with pytest.raises(ValueError, match="the latent of image 10 holds NaN"):
        Images(str(nan), 12, size=8).batch(0)
    missing = copy("missing")
    (missing / "latents-00000.npy").unlink()
    with pytest.raises(ValueError, match="damaged latents"):
        Images(str(missing), 12, size=8)
    wrong = copy("wrong")
    about = json.loads((wrong / "latents.json").read_text())
    (wrong / "latents.json").write_text(json.dumps({**about, "labels": about["labels"][:-1]}))
    with pytest.raises(ValueError, match="damaged latents .*11 labels"):
        Images(str(wrong), 12, size=8)
    for broken in ({"labels": None}, {"scale": "big"}, {"shards": []}):
        (wrong / "latents.json").write_text(json.dumps({**about, **broken}))
        with pytest.raises(ValueError, match="damaged latents"):
            Images(str(wrong), 12, size=8)
    (wrong / "latents.json").write_text(json.dumps({**about, "labels": [5] * 12}))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 1\]"):
        Images(str(wrong), 12, size=8)
    with pytest.raises(ValueError, match="config.json: no such file"):
        latents.autoencoder(tmp_path / "nowhere")
