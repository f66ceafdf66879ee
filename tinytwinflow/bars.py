"""How far something is and how long it will take: a bar on a terminal, elsewhere a plain line every half minute."""

import sys

from tqdm import tqdm

EVERY = 30  # seconds from line to line


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


def bar(over=None, name="", total=None, initial=0, unit="", hidden=False):
    """A tqdm bar over an iterable, or one that `update` moves; where stderr is no terminal, lines in its place."""
    if hidden or sys.stderr.isatty():
        return tqdm(over, name, total, initial=initial, unit=f" {unit}", disable=hidden)
    shown = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
    how = {"file": _Lines(), "mininterval": EVERY, "delay": EVERY, "miniters": 1, "bar_format": shown}
    return tqdm(over, name, total, initial=initial, unit=f" {unit}", **how)


def terms_in(shown, record):
    """Show a training record beside a bar: the loss, and its terms where there is room for them."""
    if "total" not in record:  # they are still on the device
        return
    names = ["total"] if sys.stderr.isatty() else [name for name in record if name not in ("step", "lr")]
    shown.set_postfix({name: f"{record[name]:.3g}" for name in names}, refresh=False)
