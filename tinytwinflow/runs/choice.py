"""Which recipe fits some data, and what of it has to be another: what `fit` trains with where it is not told."""

import os
from pathlib import Path

from ..backbones.texts import TEXTS_INDEX
from ..data.given import Table, as_data_set
from ..data.latents import Latents, is_latents
from ..data.points import is_table
from ..data.readers import IMAGE_SETS, find_pictures, read_picture
from ..ranges import plain
from .build import OWN
from .recipes import RECIPES, configured
from .settings import SETTINGS


def choose(data, net, recipe, settings):
    """The settings of a run on some data, and the data set, None where the settings name it.

    data, net, recipe: as `fit` takes them; settings: those that are given. Raises ValueError for one that would not be
    read.
    """
    given = {name: plain(value) for name, value in settings.items()}
    SETTINGS["seed"].check("seed", given["seed"])
    unread = set()
    if isinstance(data, str | os.PathLike):
        own, (usual, found) = None, recipe_for_name(str(data), given.get("size"))
    else:
        own = as_data_set(data, given.get("batch_size"), given["seed"])
        usual, found = recipe_for_data(own, net is not None)
        found["data"] = ""  # no name under which they could be found again
        unread |= {"size", "flip", "subset", "data_dir", "data"}
    if net is not None:
        found |= {"muon_lr": None, "jump_c": None}  # found on networks of this library
        unread |= {"net", "width", "depth", "heads", "patch", "sharp", "epsilon", "predicts", "shifted", "init_from"}
    for name in given.keys() & unread:
        raise ValueError(f"{name} would not be read: data or net are handed over as they are")
    known = RECIPES.get(recipe or usual, found)
    config = configured(recipe or usual, **{name: value for name, value in found.items() if name in known} | given)
    config |= {} if net is None else {"net": OWN}
    if isinstance(own, Table):
        own.batch_size = config["batch_size"]
    return config, own


def recipe_for_name(name, size=None):
    """Recipe and settings for data that a name, a file or a folder is; size: of images, where it is given."""
    path = str(Path(name).resolve())
    if name in IMAGE_SETS:
        return {"cifar10": "cifar", "clipart": "clipart"}.get(name, "fashion"), {"data": name}
    if (Path(name) / TEXTS_INDEX).is_file():
        return "text", {"data": path}
    if is_latents(name):
        return "imagenet", {"data": path, "size": Latents(name).shape[-1]}
    if not Path(name).is_dir():
        return "toy", {"data": path if is_table(name) else name}
    paths, _, classes = find_pictures(name)
    size = min(32, *read_picture(paths[0]).size) // 2 * 2 if size is None else size
    return "fashion", {"data": path, "conditional": classes > 0, **_for_images(size)}


def recipe_for_data(data, own_net=False):
    """Recipe and settings for a data set that is handed over, see `data.given`; own_net: with a network of its own."""
    found = {"conditional": data.fresh(1)[1] is not None}
    found |= {"batch_size": data.batch_size} if getattr(data, "batch_size", None) else {}
    if len(data.shape) == 1:
        return "toy", found
    if own_net:
        return "fashion", found
    if data.shape[-1] != data.shape[-2]:
        raise ValueError(f"images must be square, got {data.shape[-2]} x {data.shape[-1]} pixels")
    return "fashion", found | _for_images(data.shape[-1])


def _for_images(size):
    """Settings of recipe fashion for images of another size: patches that divide it into at most 256, if they can."""
    return {"size": size, "patch": next((p for p in range(2, size + 1) if size % p == 0 and size <= 16 * p), 1)}
