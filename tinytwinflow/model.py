"""The front door: data in, a model out that makes a sample in one network evaluation.

model = fit(x)              # an array, a DataLoader, a function of the step, a file, a folder, a set's name
model.sample(1000)          # in the units and the type of x
model.save("model.pt"); model = load("model.pt")
"""

import copy
import io
import os
import sys
from pathlib import Path

import torch

from .data.given import as_data_set, in_units
from .evaluation.pictures import draw_one
from .evaluation.tables import run_table
from .files import load_weights, read_checkpoint
from .ranges import plain
from .runs.build import OWN
from .runs.choice import choose
from .runs.evaluate import evaluate
from .runs.folder import Trained, checked, condition_of, net_again, read_config, refuse_backbone, sampled, trained
from .runs.run import begin, finish, resume
from .runs.settings import SETTINGS, method_of, mode_of
from .training.checkpoints import NAME, check_about, write_checkpoint
from .training.distributed import device_of


def fit(data, net=None, recipe=None, steps=None, device=None, out=None, seed=0, **settings):
    """Train a model of the data.  -> Model

    data: an array or tensor (n, D) or (n, C, H, W), or a pair of it and labels; a DataLoader or any iterable of batches
    x or (x, labels); a function of the step that returns one; a `DataSet` of your own; or, as a text, the name of a
    set, a .npy or .csv file, a folder of images. net: your own network net(x, t, r, cond), else one that fits the data.
    recipe, and every setting by name: `python -m tinytwinflow settings`. out: a run folder, where `load(out).train()`
    goes on. device: a GPU if there is one. Ctrl-C ends training after a step, and the model can be sampled from and
    goes on with `train()`. Raises ValueError, in one line, for what does not fit.
    """
    device = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if out is not None and not (isinstance(out, str | os.PathLike) and str(out)):
        raise ValueError(f"out is the name of a folder, got {out!r}")
    net, settings = (None, settings | {"net": net}) if isinstance(net, str) else (net, settings)
    config, own = choose(data, net, recipe, settings | {"seed": seed} | ({} if steps is None else {"steps": steps}))
    return Model(run=begin(config, out, device, data=own, net=net, measured=False)).train()


class Model:
    """A trained network that samples in 1, 2, 4 or 100 steps; of `fit`, or read back by `load`."""

    def __init__(self, own=None, run=None, device="cpu"):
        self.own, self.run, self.device = own or run.trained(), run, run.device if run else device

    @property
    def net(self):
        """The velocity field net(x, t, r, cond): the average of the trained network."""
        return self.own.net

    @property
    def config(self):
        """The settings of its run."""
        return self.own.config

    @property
    def saved(self):
        """Steps done, and of the data shape, labels and scaling."""
        return self.own.saved

    def train(self, data=None):
        """Train to the last step, from wherever it stands.  -> the model; Ctrl-C ends it after a step.

        data: what `fit` was given, for a model that was read back and whose data have no name.
        """
        if self.run is None:
            if self.own.folder is None:
                raise ValueError("a model from a file has nothing to go on training with: fit(..., out=DIR) keeps it")
            if data is None and not self.config["data"]:
                raise ValueError("this model has been read back without its data: train(data) takes them")
            data = None if data is None else as_data_set(data, self.config["batch_size"], self.config["seed"])
            net = copy.deepcopy(self.net).requires_grad_().train() if self.config["net"] == OWN else None
            self.run = resume(self.own.folder, self.device, data=data, net=net)
        finish(self.run, stoppable=True)
        self.own = self.run.trained()
        if self.saved["step"] < self.config["steps"]:
            print(f"stopped at step {self.saved['step']} of {self.config['steps']}: train() goes on", file=sys.stderr)
        return self

    def draw(self, n, steps=1, cond=None, seed=None, mode=None):
        """`sample` before units: of spread one, or images in [-1, 1], on the CPU."""
        n = plain(n)
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number of samples >= 1, got {n!r}")
        usual = mode_of(self.config)
        if steps != 1 and usual is None and mode is None:
            raise ValueError(f"{method_of(self.config)} makes samples in one step: steps=1, or name a mode")
        seed = int.from_bytes(os.urandom(4), "little") if seed is None else plain(seed)
        SETTINGS["seed"].check("seed", seed)
        shape = self.saved["data"]["shape"]
        cond, times = condition_of(self.own, n, cond), self.config["time_shape"]
        return sampled(self.net, n, shape, steps, mode or usual or "any", seed, cond, time_shape=times)

    def sample(self, n, steps=1, cond=None, seed=None, mode=None):
        """n samples in so many network evaluations, in the units and the type of the data.

        cond: a label for all, n labels, or another condition of n rows; by default each label in turn. seed: the same
        one gives the same samples. mode: of `method.samplers.sample`. Raises ValueError for what the model cannot do.
        """
        return in_units(self.draw(n, steps, cond, seed, mode), self.saved["data"])

    def evaluate(self, nfes=(1, 2, 4, 8, 100), baseline=False):
        """Measure samples against the data; print a table.  -> dict of metrics, as metrics.json holds them.

        baseline: train flow matching too, in the run's folder, and measure it at 1 and 100 NFE.
        """
        if baseline and (self.own.folder is None or self.config["net"] == OWN):
            raise ValueError("the baseline is trained in the run's folder, with a net by name: fit(..., out=DIR)")
        if self.own.data is None and not self.config["data"]:
            raise ValueError("this model has been read back without its data, so there is nothing to measure against")
        result, *_ = evaluate(self.own, nfes, with_baseline=baseline, device=self.device)
        print(run_table(result))
        return result

    def save(self, path):
        """Write architecture, settings, weights and scaling as one file, without pickled code.

        Raises FloatingPointError if a weight is not finite.
        """
        about = {"config": self.config, **self.saved, "average": self.net.state_dict()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, {key: about[key] for key in ("config", "step", "data", "average")})

    def _repr_png_(self):
        """What a notebook shows: samples of one step, where they need no condition to be given."""
        if "model" in self.config or self.config["conditional"] and not self.saved["data"]["classes"]:
            return None
        picture, x = io.BytesIO(), self.draw(5000 if len(self.saved["data"]["shape"]) == 1 else 64, seed=0)
        draw_one(picture, x.numpy(), f"{method_of(self.config)}, 1 NFE, step {self.saved['step']}")
        return picture.getvalue()


def load(path, device="cpu", net=None):
    """A model from a file of `Model.save`, a run folder or its checkpoint.  -> Model

    net: the network, where the model has one of the user's own. Raises ValueError if it is none of these.
    """
    path, device = Path(path), device_of(device)
    if path.is_dir():
        return Model(trained(path, device, net), device=device)
    content = read_checkpoint(path, keys=("average", "data", "step"))
    check_about(content, path)
    config = checked(content["config"], path) if "config" in content else read_config(path.parent)
    refuse_backbone(path, config)
    saved = {"step": content["step"], "data": content["data"]}
    folder = path.parent if path.name == NAME else None
    net = net_again(config, saved, path) if net is None else net
    load_weights(net, content["average"], path)
    return Model(Trained(net.to(device).requires_grad_(False).eval(), config, saved, folder), device=device)
