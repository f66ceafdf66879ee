"""Benchmarks: what methods give and what they cost.

Rooms, in reading order: speed, memory, calls, few_bits, plan, compare, pays, speed_backbone, checked, pieces, report.
May import: runs, backbones, evaluation, training, data, peers, nets, method, files, ranges, bars.
"""

from . import calls, checked, compare, few_bits, memory, pays, pieces, plan, report, speed, speed_backbone

__all__ = [
    "calls", "checked", "compare", "few_bits", "memory", "pays", "pieces", "plan", "report", "speed", "speed_backbone",
]  # fmt: skip
