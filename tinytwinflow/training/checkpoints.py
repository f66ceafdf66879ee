"""Checkpoints: a State on disk, whole at any moment."""

import torch

from ..files import aside


def write_checkpoint(path, content):
    """Write a checkpoint so that a crash at any moment leaves the old file or the new one, whole.

    Raises FloatingPointError, writing nothing, if a weight is not finite.
    """
    for name, value in (*content["net"].items(), *content.get("average", {}).items()):
        if not value.isfinite().all():
            raise FloatingPointError(f"step {content['step']}: weight {name} is not finite; the last checkpoint stays")
    with aside(path) as file:
        torch.save(content, file)
