"""Mutation testing: one slip of the pen at a time, and whether a test sees it.

    nice python tests/mutants.py                            # every room, half an hour of one core
    nice python tests/mutants.py method/draws peers/scm     # some rooms
    nice python tests/mutants.py --share 0.2 --seed 1       # a fifth of each room, drawn at random

Each mutant is one change to one room of the package: a comparison turned, + for -, another number, arguments swapped,
a keyword, a `.detach()` or a statement left out. Annotations, docstrings and messages are left alone. The tests are
collected once. For each mutant a process forks, puts the changed code into the functions, classes and constants in use,
and runs the tests that reach the changed function, the quick ones and those that have killed the most before first. One
that fails or hangs has killed it. What is known is kept in the file `--out`, a line a mutant: a run that was stopped
goes on, and only those that lived are tried again; begin another file when the code has changed. `mutants.txt` lists
the mutants that change nothing that is promised, each with the reason.
"""

import argparse
import ast
import copy
import gc
import importlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FunctionType

import pytest
from _pytest.runner import runtestprotocol

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "tinytwinflow"
HELPERS = "test_helpers_begin_as_the_flow_model_and_the_frozen_one_stays"
SUITES = {
    "method": ["method"],
    "training": ["training/test_loop.py", "peers/test_peers.py::" + HELPERS],
    "evaluation": ["evaluation/test_metrics.py"],
    "peers": ["peers"],
}
ROOMS = [f"method/{name}" for name in "losses draws samplers path twin conditions exact reference".split()]
ROOMS += ["training/loop", "training/ema", "evaluation/metrics"]
ROOMS += [f"peers/{path.stem}" for path in sorted((PACKAGE / "peers").glob("[a-z]*.py"))]

COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq}
COMPARISONS |= {ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
ARITHMETIC |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
NAMES = "no_grad enable_grad  min max  minimum maximum  ones_like zeros_like  any all  sum mean".split("  ")
NAMES = {a: b for a, b in (pair.split() for pair in NAMES)} | {b: a for a, b in (pair.split() for pair in NAMES)}
PASSED = set("detach clone clamp abs sqrt square floor eval requires_grad_ log exp".split())
SYMMETRIC = "min max minimum maximum isinstance squared_error same_shape allclose getattr promote_types".split()


def variants(node):
    """What a slip of the pen makes of a node.  -> nodes"""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                other = COMPARISONS[type(op)]()
                yield ast.Compare(node.left, [*node.ops[:i], other, *node.ops[i + 1 :]], node.comparators)
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target, op, value):
            yield ast.AugAssign(target, ARITHMETIC[type(op)](), value)
            yield ast.Pass()
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield ast.Constant(2 * value or 0.5)
        case ast.Name(name, ast.Load()) if name in NAMES and name != "mean" and name != "sum":
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(value, name, ast.Load()) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], ast.Load())
        case ast.IfExp(_, body, orelse):
            yield from (body, orelse)
        case ast.If():
            yield from (changed(node, test=ast.Constant(value)) for value in (True, False))
        case ast.Slice():
            for end in ("lower", "upper"):
                if isinstance(getattr(node, end), ast.Name | ast.Call | ast.Attribute):
                    yield changed(node, **{end: ast.BinOp(getattr(node, end), ast.Add(), ast.Constant(1))})
        case ast.Call(function, arguments, keywords):
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in PASSED and isinstance(function, ast.Attribute) and ast.unparse(function.value) != "math":
                yield function.value
            for i, keyword in enumerate(keywords):
                if keyword.arg not in ("device", "kind", "choices", "length", "none"):
                    yield ast.Call(function, arguments, [*keywords[:i], *keywords[i + 1 :]])
            plain = not any(isinstance(a, ast.Starred) or isinstance(a, ast.Constant) for a in arguments[:2])
            if len(arguments) > 1 and name not in SYMMETRIC and plain:
                *first, a, b = arguments if name == "where" else reversed(arguments)
                yield ast.Call(function, [*first, b, a] if name == "where" else [a, b, *reversed(first)], keywords)
        case ast.Expr():
            yield ast.Pass()
        case ast.Assign([target], value):
            again = ast.unparse(target) in {ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.expr)}
            if again or isinstance(target, ast.Subscript | ast.Attribute):
                yield ast.Pass()


def changed(node, **fields):
    """A node with other fields."""
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def text(statement):
    """A statement on one line, without what stands in it."""
    empty = {"body": [], "orelse": [], "decorator_list": []}
    head = changed(statement, **{name: value for name, value in empty.items() if hasattr(statement, name)})
    return " ".join(ast.unparse(head).split())


def sites(node, function=None, statement=None):
    """All places of a tree where something can be put instead.  -> node, put, outermost function, statement"""
    for field, value in ast.iter_fields(node):
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            words = isinstance(child, ast.JoinedStr) or isinstance(getattr(child, "value", None), ast.Constant)
            words = words and isinstance(child, ast.Expr | ast.JoinedStr)
            if field in ("annotation", "returns") or words or not isinstance(child, ast.AST):
                continue

            def put(new, i=i, children=children, field=field, value=value):
                children[i] = new
                setattr(node, field, value if isinstance(value, list) else new)

            outer = child if function is None and isinstance(child, ast.FunctionDef) else function
            outer = None if field == "decorator_list" else outer
            here = child if isinstance(child, ast.stmt) or field == "decorator_list" else statement
            yield child, put, outer, here
            if not isinstance(child, ast.Raise | ast.Import | ast.ImportFrom):
                yield from sites(child, outer, here)


def mutants_of(room):
    """All mutants of a room.  -> list of dicts: id, room, source, and the line of the function that is changed"""
    tree, found, seen = ast.parse((PACKAGE / f"{room}.py").read_text()), [], Counter()
    original = ast.unparse(tree)
    for node, put, function, statement in list(sites(tree)):
        before = text(statement) if statement else ""
        for new in variants(node):
            put(new)
            after = text(new if statement is node else statement)
            source = ast.unparse(ast.fix_missing_locations(tree))
            put(node)
            if source == original:
                continue
            if after == "pass":
                after = f"no {before}"
            elif after in ("if True:", "if False:"):
                after += f"  # {before}"
            name = f"{room}.{function.name if function else ''}: {after}"
            seen[name] += 1
            number = f" ({seen[name]})" if seen[name] > 1 else ""
            line = function and min([function.lineno, *(d.lineno for d in function.decorator_list)])
            found.append({"id": name + number, "room": room, "source": source, "line": line})
    return found


def graft(old, new, put):
    """Give the functions, classes and constants in use, by name, what those of another source have."""
    for name, value in new.items():
        own, value = (getattr(each, "__func__", getattr(each, "fget", each)) for each in (old.get(name), value))
        known = isinstance(value, FunctionType) or name == "__dataclass_fields__" or not name.startswith("__")
        if own is value or own is None or not known:
            continue
        if isinstance(value, FunctionType):
            for part in ("__code__", "__defaults__", "__kwdefaults__"):
                setattr(own, part, getattr(value, part))
            for cell, other in zip(own.__closure__ or (), value.__closure__ or ()):
                if isinstance(cell.cell_contents, FunctionType):
                    graft({"it": cell.cell_contents}, {"it": other.cell_contents}, None)
                else:
                    cell.cell_contents = other.cell_contents
        elif isinstance(value, type) and not issubclass(value, tuple):
            inside = {name: part for name, part in vars(value).items() if not isinstance(part, type)}
            graft(vars(own), inside, lambda name, new, own=own: setattr(own, name, new))
            for name in [name for name in vars(own) if name not in vars(value) and name[0] != "_"]:
                delattr(own, name)
        else:
            put(name, value)


def mutate(mutant):
    """Make the package, as it is in this process, that of a mutant."""
    module = importlib.import_module(f"tinytwinflow.{mutant['room'].replace('/', '.')}")
    other = {name: getattr(module, name) for name in ("__name__", "__package__", "__file__")}
    exec(compile(mutant["source"], module.__file__, "exec"), other)
    graft(vars(module), other, vars(module).__setitem__)


def forked(function, *args, timeout):
    """What a function returns in a process that forks for it; None if it hangs, "it dies" if it does."""

    def child(end):
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        end.send(function(*args))
        os._exit(0)

    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(timeout) else None
    except EOFError:
        return "it dies"
    finally:
        if process.is_alive():
            process.join(1)
        if process.is_alive():
            os.killpg(process.pid, 9)
        process.join()


def failing(items, mutant, quick):
    """The first test that a mutant does not pass, "" if it passes all that are run in so many seconds."""
    try:
        mutate(mutant)
    except Exception:
        return "it cannot be imported"
    for item, following in zip(items, [*items[1:], None]):
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            return item.nodeid
        if time.process_time() > quick:
            break
    return ""


def surveyed(items, rooms):
    """Which functions of the package each test reaches, by file and first line, and how long it takes.  -> two dicts

    Each room is first put in place of itself: if that alone made a test fail, every mutant would seem to be killed.
    """
    for room in rooms:
        mutate({"room": room, "source": (PACKAGE / f"{room}.py").read_text()})
    reach, seconds = {}, {}
    for item, following in zip(items, [*items[1:], None]):
        found, begun = reach.setdefault(item.nodeid, set()), time.process_time()

        def note(frame, event, _, found=found):
            if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
                found.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

        sys.settrace(note)
        reports = runtestprotocol(item, nextitem=following, log=False)
        sys.settrace(None)
        if any(report.failed for report in reports):
            return f"{item.nodeid} fails without any mutant"
        seconds[item.nodeid] = time.process_time() - begun
    return reach, seconds


class Trials:
    """A plugin of pytest that, in place of the tests, tries the mutants of rooms on them."""

    def __init__(self, rooms, options, listed):
        self.rooms, self.options, self.listed, self.table = rooms, options, listed, []

    def pytest_runtestloop(self, session):
        survey = forked(surveyed, session.items, self.rooms, timeout=1800)
        if not isinstance(survey, tuple):
            sys.exit(f"{survey or 'the tests hang'}")
        gc.freeze()
        lines = self.options.out.read_text().splitlines() if self.options.out.exists() else []
        known = {line["id"]: line for line in map(json.loads, lines)}
        kills = Counter(line["by"] for line in known.values())
        for room in self.rooms:
            mutants, begun = mutants_of(room), time.monotonic()
            if self.options.share < 1:
                mutants = random.Random(self.options.seed).sample(mutants, round(self.options.share * len(mutants)))
            for mutant in mutants:
                if mutant["id"] not in self.listed and not known.get(mutant["id"], {}).get("by"):
                    known[mutant["id"]] = self.tried(mutant, session.items, *survey, kills)
                    with open(self.options.out, "a") as file:
                        file.write(json.dumps(known[mutant["id"]]) + "\n")
            equivalent = [mutant["id"] for mutant in mutants if mutant["id"] in self.listed]
            alive = [m["id"] for m in mutants if m["id"] not in self.listed and not known[m["id"]]["by"]]
            numbers = len(mutants), len(mutants) - len(equivalent) - len(alive), len(equivalent), len(alive)
            self.table.append((*numbers, time.monotonic() - begun))
            told("".join(f"alive  {name}  [{known[name]['tests']} tests]\n" for name in alive), end="")
            told("{}: {} mutants, {} killed, {} equivalent, {} alive, {:.0f} seconds".format(room, *self.table[-1]))
        return True

    def tried(self, mutant, items, reach, seconds, kills):
        """One mutant.  -> id, by: which test killed it, tests: how many reach it"""
        place = (str(PACKAGE / f"{mutant['room']}.py"), mutant["line"])
        items = [item for item in items if mutant["line"] is None or place in reach[item.nodeid]]
        items.sort(key=lambda item: (seconds[item.nodeid] + 0.05) / (1 + kills[item.nodeid]))
        budget = 20 + 10 * sum(seconds[item.nodeid] for item in items)
        by = forked(failing, items, mutant, self.options.quick, timeout=budget)
        kills[by] += 1
        return {"id": mutant["id"], "by": "it hangs" if by is None else by, "tests": len(items)}


def told(words, end="\n"):
    """Say something past pytest's capture."""
    sys.__stdout__.write(words + end)
    sys.__stdout__.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="*", default=ROOMS, help="such as method/draws")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", type=float, default=float("inf"), help="seconds of tests for a mutant that lives")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "tinytwinflow-mutants.jsonl")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.mkdtemp()}
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)  # nothing is shrunk
    settings.load_profile("mutants")
    listed = {line for line in (TESTS / "mutants.txt").read_text().splitlines() if line and line[0] not in " #"}
    table = []
    for folder, suite in SUITES.items():
        rooms = [room for room in options.rooms if room.startswith(folder)]
        trials = Trials(rooms, options, listed)
        how = "-q -n 0 -s -p no:cacheprovider --hypothesis-seed=0 -W ignore::pytest.PytestAssertRewriteWarning".split()
        if rooms:
            pytest.main(
                [*how, "--rootdir", str(TESTS.parent), *(str(TESTS / part) for part in suite)], plugins=[trials]
            )
        table += trials.table
    totals = [sum(column) for column in zip(*table)]
    told("all: {} mutants, {} killed, {} equivalent, {} alive, {:.0f} seconds".format(*totals))


if __name__ == "__main__":
    main()
