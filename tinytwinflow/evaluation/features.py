"""What images are compared by: features, from a small classifier trained here or from Inception."""

from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.nn import functional as f

from ..bars import bar
from ..files import aside, damage_named, load_weights, read_checkpoint, read_torch


class Classifier(nn.Module):
    """A small convolutional network.  features: (B, C, H, H) -> (B, 128); forward: -> (B, classes)."""

    def __init__(self, channels, classes):
        super().__init__()
        sizes = (channels, 32, 64, 128)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(sizes[:-1], sizes[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in sizes[1:])
        self.last = nn.Linear(sizes[-1], classes)

    def features(self, x):
        for layer, norm in zip(self.layers, self.norms):
            x = f.max_pool2d(f.relu(norm(layer(x))), 2, ceil_mode=True)
        return x.mean(dim=(2, 3))

    def forward(self, x):
        return self.last(self.features(x))


def train_classifier(data, steps=600, lr=2e-3, device="cpu", shown=False, seed=None):
    """A classifier for the images of a training set; with 600 batches of it, a minute's work on two cores.

    seed: of its first weights, by default that of the data, 0 where they have none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(getattr(data, "seed", 0) if seed is None else seed)
        net = Classifier(data.shape[0], data.classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in bar(range(steps), "classifier of images", unit="steps", hidden=not shown):
        x, label = data.batch(step)
        optimizer.zero_grad()
        f.cross_entropy(net(x.to(device)), label.to(device)).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def classifier_of(folder, data, device="cpu", shown=False):
    """The classifier kept in a run folder, trained now if it is not there yet, or if there is no folder.

    data: the whole set with a seed and batch that do not depend on the run, so that the figures of
    all runs on one set are in the same features.
    """
    path = None if folder is None else Path(folder) / "classifier.pt"
    if path is not None and path.exists():
        net = Classifier(data.shape[0], data.classes)
        load_weights(net, read_checkpoint(path, keys=("net",))["net"], path)
        return net.to(device).eval().requires_grad_(False)
    net = train_classifier(data, device=device, shown=shown)
    if path is not None:
        with aside(path) as file:
            torch.save({"net": net.state_dict()}, file)
    return net


class Inception(nn.Module):
    """Torchvision's Inception v3 from its weights file.  features: RGB in [-1, 1], any size -> (B, 2048).

    Its weights were trained on pixels in [-1, 1] as they are: torchvision, which is handed pixels normalised as for its
    other models, first turns them back. A Frechet distance in these features is no published FID, which is of another
    Inception file (of 2015, with pooling of its own) and another way to resize: compare it with its like alone.
    """

    def __init__(self, path):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, init_weights=False)
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file: features are 'classifier' or a file of torchvision's Inception v3")
        weights = read_torch(path, "file of weights")
        with damage_named(path, "not torchvision's Inception v3"):
            self.net.load_state_dict(weights)
        self.net.fc = nn.Identity()

    def features(self, x):
        if x.shape[1] != 3:
            raise ValueError(f"Inception takes RGB images, these have {x.shape[1]} channels: --set features=classifier")
        return self.net(f.interpolate(x, (299, 299), mode="bilinear", antialias=True, align_corners=False))


@torch.no_grad()
def features_of(net, x, device="cpu", batch_size=500):
    """Features of many images, a few at a time.  (n, C, H, H) -> (n, D)."""
    return torch.cat([net.features(some.to(device)).float().cpu() for some in x.split(batch_size)])
