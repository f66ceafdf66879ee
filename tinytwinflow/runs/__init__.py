"""Runs: from settings to a folder of results.

Rooms, in reading order: settings, recipes, methods, build, choice, checks, folder, export, run, evaluate.
May import: backbones, evaluation, training, data, peers, nets, method, files, ranges, bars.
"""

from . import build, checks, choice, evaluate, export, folder, methods, recipes, run, settings

__all__ = ["build", "checks", "choice", "evaluate", "export", "folder", "methods", "recipes", "run", "settings"]
