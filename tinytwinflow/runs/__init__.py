"""Runs: from settings to a folder of results.

Rooms, in reading order: settings, recipes, methods, choice, build, folder, run, evaluate.
May import: backbones, evaluation, training, data, peers, nets, method, files, ranges.
"""

from . import build, choice, evaluate, folder, methods, recipes, run, settings

__all__ = ["build", "choice", "evaluate", "folder", "methods", "recipes", "run", "settings"]
