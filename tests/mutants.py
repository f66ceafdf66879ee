"""Mutation testing: one slip of the pen at a time, and whether a test sees it.

    nice python tests/mutants.py                            # every room, some hours of one core
    nice python tests/mutants.py method/draws peers/scm     # some rooms
    nice python tests/mutants.py --share 0.2 --seed 1       # a fifth of each room, drawn at random

Each mutant is one change to one room of the package: a comparison turned, + for -, another number, arguments swapped,
a keyword, a `.detach()` or a statement left out. Annotations, docstrings and messages are left alone. A process that
has not imported the package forks for each, the child gets the changed source and runs the tests that reach the changed
function, those that killed the most before first. One that fails or hangs has killed it. What is known is kept in the
file `--out`, a line a mutant, so that a run that was stopped goes on and only those that lived are tried again;
begin another file when the code has changed. `mutants.txt` lists the mutants that change nothing that is promised,
with the reason.
"""

import argparse
import ast
import copy
import importlib.util
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from importlib.machinery import SourceFileLoader
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "tinytwinflow"
SUITES = {
    "method": ["method"],
    "training": ["training/test_loop.py"],
    "evaluation": ["evaluation/test_metrics.py"],
    "peers": ["peers"],
}
ORDER = "losses draws samplers path twin conditions exact reference".split()
ROOMS = [f"method/{name}" for name in ORDER] + ["training/loop", "training/ema", "evaluation/metrics"]
ROOMS += [f"peers/{path.stem}" for path in sorted((PACKAGE / "peers").glob("[a-z]*.py"))]
WARM = "numpy scipy.stats scipy.integrate scipy.optimize scipy.linalg torch torchvision torch.distributed.fsdp pytest"
WARM += " torch.distributed.checkpoint torch.nn.attention hypothesis.extra.numpy matplotlib.pyplot PIL.Image tqdm"

COMPARISONS = {ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE]}
COMPARISONS |= {ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot]}
COMPARISONS |= {ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In]}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
ARITHMETIC |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
NAMES = "no_grad enable_grad  min max  minimum maximum  ones_like zeros_like  any all  sum mean".split("  ")
NAMES = {a: b for a, b in (pair.split() for pair in NAMES)} | {b: a for a, b in (pair.split() for pair in NAMES)}
PASSED = set("detach clone clamp abs sqrt square floor eval requires_grad_ log exp".split())
SYMMETRIC = {"min", "max", "minimum", "maximum", "isinstance", "squared_error", "same_shape", "allclose", "getattr"}


def variants(node):
    """What a slip of the pen makes of a node.  -> nodes"""
    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                for other in COMPARISONS[type(op)]:
                    yield ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1 :]], node.comparators)
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
            if name in PASSED and isinstance(function, ast.Attribute):
                yield function.value
            for i, keyword in enumerate(keywords):
                if keyword.arg not in ("device", "kind", "choices", "length", "none"):
                    yield ast.Call(function, arguments, [*keywords[:i], *keywords[i + 1 :]])
            if len(arguments) > 1 and name not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in arguments):
                *first, a, b = arguments if name == "where" else reversed(arguments)
                yield ast.Call(function, [*first, b, a] if name == "where" else [a, b, *reversed(first)], keywords)
        case ast.Expr() | ast.Raise():
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
            here = child if isinstance(child, ast.stmt) else statement
            yield child, put, outer, here
            if not isinstance(child, ast.Raise | ast.Import | ast.ImportFrom):
                yield from sites(child, outer, here)


def mutants_of(room):
    """All mutants of a room.  -> list of dicts: id, room, source, and the line of the function that is changed"""
    tree, found, seen = ast.parse((PACKAGE / f"{room}.py").read_text()), [], Counter()
    for node, put, function, statement in list(sites(tree)):
        before = text(statement) if statement else ""
        for new in variants(node):
            put(new)
            after = text(new if statement is node else statement)
            source = ast.unparse(ast.fix_missing_locations(tree))
            put(node)
            name = f"{room}.{function.name if function else ''}: " + (f"no {before}" if after == "pass" else after)
            seen[name] += 1
            number = f" ({seen[name]})" if seen[name] > 1 else ""
            line = function and min([function.lineno, *(d.lineno for d in function.decorator_list)])
            found.append({"id": name + number, "room": room, "source": source, "line": line})
    return found


class Served:
    """Finds one module of the package, and serves another source for it; a plugin of pytest, too."""

    def __init__(self, room, source=None, tests=None):
        self.module, self.path, self.source = f"tinytwinflow.{room.replace('/', '.')}", PACKAGE / f"{room}.py", source
        self.tests, self.by, self.reach, self.seconds = tests, "", {}, {}

    def find_spec(self, name, path=None, target=None):
        if name == self.module and self.source:
            loader = SourceFileLoader(name, str(self.path))
            loader.get_code = lambda name: compile(self.source, str(self.path), "exec")
            return importlib.util.spec_from_file_location(name, self.path, loader=loader)

    def pytest_collection_modifyitems(self, items):
        if self.tests is not None:
            items[:] = sorted((i for i in items if i.nodeid in self.tests), key=lambda i: self.tests.index(i.nodeid))

    def pytest_runtest_call(self, item):
        """Without a mutant, notes the functions of the package that a test reaches."""
        if not self.source:
            reached = self.reach.setdefault(item.nodeid, set())

            def note(frame, event, _):
                if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
                    reached.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

            sys.setprofile(note)

    def pytest_runtest_logreport(self, report):
        sys.setprofile(None)
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        self.by = report.nodeid if report.failed else self.by


def tried(served, suite, timeout):
    """Run tests in a fork.  -> exit status, None where it hangs; which failed; what each reaches; its seconds"""

    def child(end):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        os.setsid()
        sys.meta_path.insert(0, served)
        import pytest

        how = "-x -q -n 0 -p no:cacheprovider --hypothesis-seed=0 -W ignore::pytest.PytestAssertRewriteWarning".split()
        status = pytest.main([*how, *(str(TESTS / part) for part in suite)], plugins=[served])
        end.send((int(status), served.by, served.reach, served.seconds))
        end.close()
        os._exit(0)

    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        answer = here.recv() if here.poll(timeout) else (None, "it hangs", {}, {})
    except EOFError:
        answer = -1, "it dies", {}, {}
    if process.is_alive() and answer[0] is None:
        os.killpg(process.pid, 9)
    process.join()
    return answer


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rooms", nargs="*", default=ROOMS, help="such as method/draws")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "tinytwinflow-mutants.jsonl")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_STORAGE_DIRECTORY": tempfile.mkdtemp()}
    for name in WARM.split():
        importlib.import_module(name)
    from hypothesis import Phase, settings

    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)  # nothing is shrunk
    settings.load_profile("mutants")
    os.chdir(TESTS.parent)
    sys.path.insert(0, str(TESTS.parent))

    lines = options.out.read_text().splitlines() if options.out.exists() else []
    known = {line["id"]: line for line in map(json.loads, lines)}
    listed = [line for line in (TESTS / "mutants.txt").read_text().splitlines() if line and line[0] not in " #"]
    reached, table, kills = {}, [], Counter()
    for room in options.rooms:
        mutants, begun, alive = mutants_of(room), time.monotonic(), []
        if options.share < 1:
            mutants = random.Random(options.seed).sample(mutants, round(options.share * len(mutants)))
        suite = SUITES[room.split("/")[0]]
        if str(suite) not in reached:
            status, by, *reached[str(suite)] = tried(Served(room), suite, 1800)
            if status:
                sys.exit(f"the tests fail without any mutant: {by}")
        reach, seconds = reached[str(suite)]
        for mutant in mutants:
            if mutant["id"] in listed or known.get(mutant["id"], {}).get("killed"):
                continue
            place = (str(PACKAGE / f"{room}.py"), mutant["line"])
            tests = [test for test in reach if mutant["line"] is None or place in reach[test]]
            tests.sort(key=lambda test: (seconds[test] + 0.1) / (1 + kills[test]))
            budget = 20 + 4 * sum(seconds[test] for test in tests)
            status, by, *_ = tried(Served(room, mutant["source"], tests), suite, budget) if tests else (0, "", 0, 0)
            kills[by] += 1
            known[mutant["id"]] = {"id": mutant["id"], "killed": status not in (0, 5), "by": by, "tests": len(tests)}
            with open(options.out, "a") as file:
                file.write(json.dumps(known[mutant["id"]]) + "\n")
        equivalent = [mutant["id"] for mutant in mutants if mutant["id"] in listed]
        alive = [m["id"] for m in mutants if m["id"] not in listed and not known[m["id"]]["killed"]]
        for name in alive:
            print(f"alive  {name}  [{known[name]['tests']} tests]")
        killed = len(mutants) - len(equivalent) - len(alive)
        table.append((room, len(mutants), killed, len(equivalent), len(alive), time.monotonic() - begun))
        print(f"{room}: {len(mutants)} mutants, {killed} killed, {len(equivalent)} equivalent, {len(alive)} alive")
        sys.stdout.flush()
    totals = [sum(column) for column in list(zip(*table))[1:]]
    print("total: {} mutants, {} killed, {} equivalent, {} alive, {:.0f} seconds".format(*totals))


if __name__ == "__main__":
    main()
