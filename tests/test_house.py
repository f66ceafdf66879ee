"""The house: which folders and rooms there are, in which order, and that no import goes upward."""

import ast
import re
from pathlib import Path

import pytest

import tinytwinflow

PACKAGE = Path(tinytwinflow.__file__).parent
FLOORS = (
    ("files", "ranges", "bars"),
    ("method",),
    ("nets", "peers", "data", "training", "evaluation"),
    ("backbones",),
    ("runs",),
    ("model",),
    ("benchmarks",),
    ("cli",),
)
FILES = ("files", "ranges", "bars", "model")
FOLDERS = [name for floor in FLOORS for name in floor if name not in FILES]


def door(folder):
    """What the sign at a folder's door says: its rooms in reading order, and what it may import."""
    text = " ".join(ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())).split())
    rooms = re.search(r"Rooms, in reading order: ([\w, ]+)\.", text)[1].split(", ")
    allowed = re.search(r"May import: ([\w, ]+)\.", text)[1].split(", ")
    return rooms, [] if allowed == ["nothing of the package"] else allowed


def imports(code, folder):
    """What a file of a folder imports of the package, as paths from its root.  -> list of tuples ("method", "path")"""
    here, found = tuple(folder.split("/")) if folder else (), []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            base = tuple(name for name in base if name)
            inside = PACKAGE.joinpath(*base)
            for name in node.names:
                room = (inside / f"{name.name}.py").is_file() or (inside / name.name).is_dir()
                found.append((*base, name.name) if room else base)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            assert not any(name.split(".")[0] == "tinytwinflow" for name in names), f"{folder}: absolute import"
    return found


def strays(code, folder, allowed):
    """The folders that a file of a folder imports and may not."""
    return [target for target in imports(code, folder) if not target or target[0] not in (folder, *allowed)]


def test_folders_are_those_of_the_design():
    there = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert there == set(FOLDERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *FILES}


def test_each_sign_names_its_rooms_and_no_room_imports_a_later_one():
    for folder in FOLDERS:
        rooms, _ = door(folder)
        there = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
        assert set(rooms) == there and len(rooms) == len(there), folder
        for i, room in enumerate(rooms):
            for target in imports((PACKAGE / folder / f"{room}.py").read_text(), folder):
                if target[0] == folder:
                    assert target[1] in rooms[:i], f"{folder}/{room} imports {target[1]}"


def test_no_import_leads_to_a_folder_that_the_sign_does_not_allow_or_upward():
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for folder in FOLDERS:
        _, allowed = door(folder)
        assert all(floor_of[name] < floor_of[folder] for name in allowed), folder
        for path in (PACKAGE / folder).glob("*.py"):
            assert not strays(path.read_text(), folder, allowed), path


@pytest.mark.parametrize(
    "line",
    [
        "from ..nets import MLP",
        "from .. import nets",
        "from ..nets.mlp import MLP",
        "def f():\n    from .. import sample",
    ],
)
def test_an_upward_import_is_seen(line):
    """The test above would fail if a room of `method` had one, in each way to write it."""
    code = (PACKAGE / "method" / "path.py").read_text()
    assert not strays(code, "method", []) and strays(f"{code}\n{line}\n", "method", [])


def test_no_two_things_have_one_name():
    """Of functions, classes and constants at the top of a room, but for those that a room keeps to itself."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            named = [part for target in targets for part in ast.walk(target) if isinstance(target, ast.expr)]
            names = [part.id for part in named if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            names += [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            for name in names:
                found.setdefault(name, []).append(path.relative_to(PACKAGE).as_posix())
    twice = {name: rooms for name, rooms in found.items() if len(rooms) > 1 and not name.startswith("_")}
    assert twice == {}, twice
