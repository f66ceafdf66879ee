"""Image sets dealt out to training steps: named ones, any folder of images, or a folder of latents."""

from pathlib import Path

import torch

from ..method.draws import seeded
from .batches import half_of, kept_apart, mine, rows_of_step
from .latents import Latents, is_latents
from .readers import IMAGE_SETS, Folder, Pixels


class Images:
    """Training data as a function of the step: batch(i) is the same whenever and wherever it is asked.

    data: a name, a folder of images or one of latents; `size` as trained on, `flip` mirrors half of
    the images at random, `subset` > 0 keeps the first so many of each class, for a machine without a GPU.
    Of a set without a test part, folders and latents, every twentieth image is kept from training.

    Rows are shuffled once an epoch and cut into batches that run on over its end, so the position in the
    data is the step. part = (rank, size): of each batch, one process's rows. Raises ValueError, in one line, for
    data that is missing or does not fit.
    """

    def __init__(self, data, batch_size, seed=0, folder="data", size=32, flip=False, subset=0, part=(0, 1)):
        self.batch_size, self.seed, self.flip, self.part = batch_size, seed, flip, part
        self.latents = is_latents(data)
        if self.latents:
            self.train = self.test = Latents(data, mirrored=flip)
        elif data in IMAGE_SETS:
            if data == "clipart" and not (Path(folder) / data).exists():
                from .clipart import make_clipart  # not above, or it could not run as a script

                make_clipart(Path(folder) / data)
            self.train, self.test = Pixels(data, folder, size), Pixels(data, folder, size, train=False)
        elif Path(data).is_dir():
            self.train = self.test = Folder(data, size)
        else:
            raise ValueError(
                f"{data}: no such folder; data is one of {', '.join(IMAGE_SETS)}, a folder with a folder of images "
                "for each class, or one of latents, made by `python -m tinytwinflow encode`"
            )
        self.on_disk, self.count, self.mark = data not in IMAGE_SETS, self.train.count, self.train.mark
        self.shape, self.classes = self.train.shape, self.train.classes
        if self.shape[-1] != size:
            raise ValueError(f"{data}: size is {self.shape[-1]} there, not {size}: --set size={self.shape[-1]}")
        if subset < 0:
            raise ValueError(f"subset must be at least 0, got {subset}")
        self.rows = torch.arange(len(self.train))
        if self.train is self.test:
            apart = kept_apart(len(self.rows))
            self.rows, self.test_rows = self.rows[~apart], self.rows[apart]
        else:
            self.test_rows = torch.arange(len(self.test))
        if subset:
            of_class = [
                self.rows[self.train.labels[self.rows] == label][:subset] for label in range(max(1, self.classes))
            ]
            self.rows = torch.cat(of_class)

    @property
    def scaling(self):
        """What a checkpoint keeps so that samples can be mapped back without the data."""
        return {"scale": self.train.scale, "shift": self.train.shift} if self.latents else {}

    def batch(self, step):
        """Images (batch_size, C, H, W) and labels (batch_size,) of one step."""
        rows = self.rows[mine(rows_of_step(len(self.rows), self.batch_size, step, self.seed), self.part)]
        generator = seeded(self.seed, 2, step, *(self.part if self.part != (0, 1) else ()))
        x, label = self.train.read(rows, generator)
        if self.flip and not self.latents:
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        return x, label

    def fresh(self, n, draw=0):
        """n real images with labels to measure against, none of them trained on; draws 0 and 1 have none in common.

        Fewer than n come back where half of the test part is fewer.
        """
        return self.test.read(self.fresh_rows(n, draw), seeded(self.seed, 1, draw))

    def fresh_rows(self, n, draw):
        """Which rows of the test part `fresh` reads."""
        return half_of(self.test_rows, n, draw, self.seed)
