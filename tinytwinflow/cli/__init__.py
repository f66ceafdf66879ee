"""The command line.

Rooms, in reading order: arguments, commands.
May import: benchmarks, model, runs, backbones, evaluation, training, data, nets, method, files, ranges.
"""
