"""Runs: from settings to a folder of results.

Rooms, in reading order: settings, recipes, methods, build, choice, checks, folder, export, drawing, run, evaluate,
play. May import: backbones, evaluation, training, data, peers, nets, method, files, ranges, bars.
"""

from . import build, checks, choice, drawing, evaluate, export, folder, methods, play, recipes, run, settings

__all__ = [
    "build", "checks", "choice", "drawing", "evaluate", "export", "folder", "methods", "play", "recipes", "run",
    "settings",
]  # fmt: skip
