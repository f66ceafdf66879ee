"""Pixel mean flows (pMF, arXiv 2601.22158): improved mean flows of a network that predicts the clean sample.

The network answers with X(x_t, t, r) and is a velocity field by `nets.PredictsData`, F = (x_t - X) / max(t, 0.05).

                   paper and code                              here
near data          V onto (x_t - x) / max(t, 0.05), not u      the same
the tangent        a second head of X                          X(x_t, t, t)
perceptual terms   LPIPS and ConvNeXt of x_t - t F, t < 0.8    none
"""

from dataclasses import dataclass
from typing import ClassVar

from ..method.path import expand
from .improved_meanflow import ImprovedMeanFlow


@dataclass
class PixelMeanFlow(ImprovedMeanFlow):
    """| V - (x_t - x) / max(t, floor) |^2, V as in improved mean flows, which above the floor is onto u."""

    floor: ClassVar = 0.05  # the network's, see `nets.PredictsData`
    needs: ClassVar = {"predicts": "data"}

    def target(self, rows):
        return (rows.x_t - rows.x) / expand(rows.t.clamp(min=self.floor), rows.x)
