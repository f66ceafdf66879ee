"""Evaluation: what samples are worth, in numbers, pictures and tables.

Rooms, in reading order: metrics, features, pictures, tables.
May import: method, files, ranges, bars.
"""

from . import features, metrics, pictures, tables

__all__ = ["features", "metrics", "pictures", "tables"]
