"""What a setting is: its default, what it means and what it may be. A value that may not be is refused in one line.

The fields of `TwinFlowLoss` are made of these, and so are all other settings, in `runs/settings.py`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list", dict: "a dict"}


@dataclass(frozen=True)
class Setting:
    """One setting.

    kind: int, float, bool, str, list or dict. within: an interval such as "[0, 1)" or "(0, inf)", of a list the one
    for each number. length: of a list of numbers. choices: all values there are, or a function that tells them. none:
    whether None is one too. unit: what it counts.
    """

    default: object
    meaning: str
    kind: type
    within: str = ""
    length: int = 0
    choices: tuple | Callable = ()
    none: bool = False
    unit: str = ""

    @property
    def known(self):
        """All values there are, where that is how they are told."""
        return self.choices() if callable(self.choices) else self.choices

    @property
    def range(self):
        """What it may be, in words."""
        low, _, high = self.within[1:-1].partition(", ")
        if self.choices:
            words = f"be one of {', '.join(self.known)}"
        elif self.length:
            words = f"be {self.length} numbers{f' in {self.within}' if self.within else ''}"
        elif not self.within:
            words = f"be {KINDS[self.kind]}"
        elif high == "inf":
            words = f"be at least {low}" if self.within[0] == "[" else f"be a number > {low}"
        else:
            words = f"lie in {self.within}"
        return words + (", or None" if self.none else "")

    def _fits(self, number):
        """Whether a number is of the kind and in the interval."""
        if isinstance(number, bool) or not isinstance(number, int if self.kind is int else int | float):
            return False
        if not self.within:
            return not math.isnan(number)
        low, high = map(float, self.within[1:-1].split(", "))
        above = number > low if self.within[0] == "(" else number >= low
        return above and (number < high if self.within[-1] == ")" else number <= high)

    def check(self, name, value):
        """Raise ValueError unless the value is one that the setting may have."""
        if value is None:
            fits = self.none
        elif self.length:
            fits = isinstance(value, tuple | list) and len(value) == self.length and all(map(self._fits, value))
        elif self.kind in (int, float):
            fits = self._fits(value)
        else:
            fits = isinstance(value, self.kind) and (not self.choices or value in self.known)
        if not fits and self.kind is int and not isinstance(value, int):
            raise ValueError(f"{name} must {self.range} and whole, got {value!r}")
        if not fits:
            raise ValueError(f"{name} must {self.range}, got {value!r}")

    def parse(self, name, text):
        """The value that a text stands for, unchecked. Raises ValueError if it is none of the kind."""
        if self.kind is str:
            return text
        try:
            value = json.loads(text.lower() if text in ("True", "False") else "null" if text == "None" else text)
        except json.JSONDecodeError:
            raise ValueError(f"{name} must {self.range}, got {text!r}") from None
        return float(value) if self.kind is float and type(value) is int else value


def plain(value):
    """A number of numpy's or torch's as Python's own, which files without code can hold; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def setting(default, meaning, within="", kind=None, **rest):
    """A `Setting`, its kind by default that of its default."""
    return Setting(default, meaning, kind or (list if isinstance(default, tuple) else type(default)), within, **rest)


def as_field(default, meaning, within="", **rest):
    """A field of a dataclass that is a setting."""
    return field(default=default, metadata={"setting": setting(default, meaning, within, **rest)})


def settings_of(made):
    """The settings that the fields of a dataclass are, by name."""
    return {name: f.metadata["setting"] for name, f in made.__dataclass_fields__.items() if "setting" in f.metadata}
