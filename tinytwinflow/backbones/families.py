"""Families: all kinds of flow transformers that are known, by the name of their class in diffusers."""

from .audio_families import SOUNDS
from .image_families import IMAGES
from .more_image_families import MORE_IMAGES
from .video_families import VIDEOS

FAMILIES = {**IMAGES, **MORE_IMAGES, **VIDEOS, **SOUNDS}


ANYFLOW = ("AnyFlowTransformer3DModel", "FAR_Wan_Transformer3DModel")  # in diffusers, and in the authors' own folders


def class_in(about, where):
    """The class that the model of a config.json is read as; AnyFlow's are Wan's with an embedder of r from the start.

    None if the file names none. Raises ValueError for AnyFlow's causal model.
    """
    kind = about.get("_class_name")
    if kind == "AnyFlowFARTransformer3DModel" or kind in ANYFLOW and about.get("init_far_model"):
        raise ValueError(f"{where}: {kind} is causal, shown each part of a video after those before it: not supported")
    return "WanTransformer3DModel" if kind in ANYFLOW else kind


def family_of(kind, where):
    """The Family of a diffusers class. Raises ValueError that names the known ones."""
    if kind not in FAMILIES:
        raise ValueError(f"{where}: {kind} is none of the known flow transformers: {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def published_names():
    """What --net may name."""
    return [name for family in FAMILIES.values() for name in family.published]


def published_backbone(name):
    """The class of a published model, by name, and its Configuration. Raises ValueError that names the known ones."""
    for kind, family in FAMILIES.items():
        if name in family.published:
            return kind, family.published[name]
    raise ValueError(f"unknown backbone {name!r}: choose from {', '.join(published_names())}")


def diffusers_class(kind, where):
    """The class of a family's models, or of its pipeline. Raises ValueError if diffusers, or that in it, is missing."""
    if kind in FAMILIES and FAMILIES[kind].model:
        return FAMILIES[kind].model
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"{where}: {kind} needs diffusers: pip install 'tinytwinflow[large]'") from error
    if not hasattr(diffusers, kind):
        raise ValueError(f"{where}: diffusers {diffusers.__version__} has no {kind}: install a newer one")
    return getattr(diffusers, kind)
