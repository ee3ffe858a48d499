"""Takes each check of the protocol's two state machines out in turn and says which test notices.

A mutant is the source of ``client.py`` or ``server.py`` with one condition changed in its syntax tree:

* a guard (an ``if`` whose body ends by raising, or by a return that refuses: the state as it was, an abort, a
  complaint, a drop, False or None) that never fires;
* the same for each operand of an ``or`` or ``and`` in it, and for each place of a compared pair or a set difference;
* a bound in it that is one off (``<`` for ``<=`` and the reverse);
* a returned verdict (``signature == …``, ``keys.verify_signature(…)``, ``all(…)``) that is always good;
* a call of a ``check_…`` function that is left out.

Each mutant is loaded in place of the module by an import hook, in a process of its own, and the tests of
``tests/secagg`` run until the first one fails. Nothing is written to the tree. Exit status 1 when one survives.

What it does not do: change anything but conditions, look at other modules, or leave a mutant out. A check that no
test can tell from its absence is either redundant, and goes, or lacks a test.

Usage: python scripts/mutants.py [--only client|server] [--list] [--jobs 2]
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.abc
import importlib.util
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
SECAGG = ROOT / "common" / "maskwork" / "secagg"
TESTS = ROOT / "tests" / "secagg"
FIRST = {"client": "test_participant_*.py", "server": "test_coordinator_*.py"}
"""The files that hold one lie for each check run first; the others follow by name."""
NOT_RUN = frozenset({"test_transcript.py", "test_plan.py"})
"""They compare bytes of an honest run, and test another module."""
PYTEST = (
    *("-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "timeout=20"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # hypothesis is loaded already, and has nothing to rewrite
)
SECONDS = 120
CHECKED = (ast.If, ast.match_case, ast.Return, ast.Expr)
REFUSALS = ("_abort", "_drop", "Step(state)", "Step(aborted", "Step(back)", "False", "None")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One check and how to take it out: `path` leads from the module's tree to the node, `value` replaces it."""

    module: str
    line: int
    text: str
    node: int
    value: ast.expr


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which test noticed; None when none did."""

    mutant: Mutant
    killed_by: str | None
    seconds: float


# --- finding the checks ---------------------------------------------------------------------------------------------


def mutants_of(module: str) -> Iterator[Mutant]:
    """Every check of a module, in the order of its lines."""
    tree = ast.parse((SECAGG / f"{module}.py").read_text())
    numbers = {id(node): number for number, node in enumerate(ast.walk(tree))}
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, CHECKED)), key=lambda n: _at(n).lineno):
        for expression, value in _changes(node):
            text = ast.unparse(expression)
            if isinstance(value, ast.Compare) and isinstance(expression, ast.Compare):
                text = f"one off: {ast.unparse(value)}"
            elif expression is not _condition(node):
                text += f"   [in: {ast.unparse(_condition(node))}]"
            yield Mutant(module, expression.lineno, text, numbers[id(expression)], value)


def _at(node: ast.AST) -> ast.expr | ast.stmt | ast.pattern:
    found = node.pattern if isinstance(node, ast.match_case) else node
    assert isinstance(found, ast.expr | ast.stmt | ast.pattern)
    return found


def _condition(node: ast.AST) -> ast.expr:
    if isinstance(node, ast.If | ast.match_case):
        test = node.test if isinstance(node, ast.If) else node.guard
        assert test is not None
        return test
    assert isinstance(node, ast.Return | ast.Expr)
    assert node.value is not None
    return node.value


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The expressions to replace in one statement, each with what takes its place."""
    if (isinstance(node, ast.If) and _refuses(node.body)) or (isinstance(node, ast.match_case) and node.guard):
        condition = _condition(node)
        yield condition, ast.Constant(False)
        yield from _operands(condition)
        yield from _bounds(condition)
    elif isinstance(node, ast.Return) and node.value is not None and _is_verdict(node.value):
        yield node.value, ast.Constant(True)
        yield from _bounds(node.value)
    elif isinstance(node, ast.Expr) and ast.unparse(node.value).lstrip("_").startswith("check_"):
        yield node.value, ast.Constant(None)


def _bounds(expression: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The comparisons in an expression, each with its bound moved by one (of sets: proper for improper inclusion)."""
    other = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
    for node in ast.walk(expression):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in other:
            moved = ast.Compare(left=node.left, ops=[other[type(node.ops[0])]()], comparators=node.comparators)
            yield node, moved


def _refuses(body: Sequence[ast.stmt]) -> bool:
    last = body[-1]
    if isinstance(last, ast.Raise):
        return True
    return isinstance(last, ast.Return) and ast.unparse(last).removeprefix("return ").startswith(REFUSALS)


def _is_verdict(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _is_verdict(value.body)
    if isinstance(value, ast.Compare | ast.BoolOp):
        return True
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("all", "any", "keys.verify_signature")


def _operands(condition: ast.expr) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each part of a condition that could be missing, with the value that makes it so."""
    match condition:
        case ast.BoolOp(op=operator, values=values):
            for value in values:
                yield value, ast.Constant(isinstance(operator, ast.And))
                yield from _operands(value)
        case ast.UnaryOp(op=ast.Not(), operand=ast.BoolOp() as inner):
            yield from _operands(inner)
        case ast.Compare(left=ast.Tuple(elts=left), ops=[operator], comparators=[ast.Tuple(elts=right)]):
            for missing in range(len(left)):
                ours = [e for i, e in enumerate(left) if i != missing]
                theirs = [e for i, e in enumerate(right) if i != missing]
                pair = (ast.Tuple(elts=ours, ctx=ast.Load()), ast.Tuple(elts=theirs, ctx=ast.Load()))
                yield left[missing], ast.Compare(left=pair[0], ops=[operator], comparators=[pair[1]])
        case _:
            return


def mutated(mutant: Mutant) -> ast.Module:
    """The module's syntax tree without the check."""
    tree = ast.parse((SECAGG / f"{mutant.module}.py").read_text())
    target = next(node for number, node in enumerate(ast.walk(tree)) if number == mutant.node)
    value = copy.deepcopy(mutant.value)
    if isinstance(value, ast.Compare) and not isinstance(target, ast.Compare):  # a pair without one of its places
        target = next(n for n in ast.walk(tree) if isinstance(n, ast.Compare) and target in ast.walk(n.left))

    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            return value if node is target else self.generic_visit(node)

    Replace().visit(tree)
    return ast.fix_missing_locations(tree)


# --- running the tests ----------------------------------------------------------------------------------------------


class MutantLoader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives the mutated module to whoever imports it; every other import goes its usual way."""

    def __init__(self, mutant: Mutant) -> None:
        self._name = f"maskwork.secagg.{mutant.module}"
        self._path = str(SECAGG / f"{mutant.module}.py")
        self._code = compile(mutated(mutant), self._path, "exec")

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the mutated module, or None."""
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        """Run the mutated code."""
        exec(self._code, module.__dict__)


class FirstFailure:
    """Remembers which test failed first."""

    def __init__(self) -> None:
        self.nodeid: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test, or its set-up, has ended."""
        if report.failed and self.nodeid is None:
            self.nodeid = report.nodeid.removeprefix("tests/secagg/")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file was imported."""
        if report.failed and self.nodeid is None:
            self.nodeid = report.nodeid.removeprefix("tests/secagg/") + " (on import)"


def run(mutant: Mutant | None, first: str) -> tuple[str | None, str]:
    """The first test that fails, and what pytest said. Must run in a process that never imported the module."""
    assert not any(name.startswith("maskwork.secagg.") for name in sys.modules)
    if mutant is not None:
        sys.meta_path.insert(0, MutantLoader(mutant))
    likely = sorted(TESTS.glob(first))
    others = sorted(path for path in TESTS.glob("test_*.py") if path.name not in NOT_RUN and path not in likely)
    noticed, output = FirstFailure(), io.StringIO()
    for files in (likely, others):  # the others are not even collected when one of the likely ones has noticed
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = pytest.main([*PYTEST, *map(str, files)], plugins=[noticed])
        if status != pytest.ExitCode.OK:
            return noticed.nodeid or f"(pytest ended with {status})", output.getvalue()
    return None, output.getvalue()


def judge(mutant: Mutant) -> Verdict:
    """Run the tests against one mutant. A test that no longer ends has noticed too."""
    started = time.monotonic()
    killed_by, _ = run(mutant, FIRST[mutant.module])
    return Verdict(mutant, killed_by, time.monotonic() - started)


def unmutated(_: int) -> tuple[str | None, str]:
    """The tests must pass before a failure can mean anything."""
    return run(None, FIRST["client"])


# --- the table ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run all mutants and print the table; 1 when a check could go unnoticed."""
    parser = argparse.ArgumentParser(description="takes each check of the state machines out in turn")
    parser.add_argument("--only", choices=sorted(FIRST), help="one module only")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--list", action="store_true", help="print the checks and run nothing")
    parser.add_argument("--match", default="", help="only checks whose text contains this")
    options = parser.parse_args(arguments)
    modules = [options.only] if options.only else sorted(FIRST)
    mutants = [m for module in modules for m in mutants_of(module) if options.match in m.text]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.module}.py:{mutant.line}: {mutant.text}")
        return 0
    hypothesis.settings.register_profile("mutants", database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    os.chdir(ROOT)
    started = time.monotonic()
    # Forked after pytest and hypothesis are loaded and before any of ours is: a mutant costs its tests and no start-up.
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        failed, output = pool.map_async(unmutated, [0]).get(SECONDS)[0]
        if failed is not None:
            print(output)
            print(f"the tests fail without any mutant: {failed}")
            return 2
        verdicts = []
        for verdict in pool.imap(judge, mutants, chunksize=1):
            verdicts.append(verdict)
            print(_line(verdict), flush=True)
    survivors = sum(v.killed_by is None for v in verdicts)
    print(f"{len(verdicts)} checks taken out, {len(verdicts) - survivors} noticed, {survivors} survived", end="")
    print(f" ({time.monotonic() - started:.0f} s)")
    return 1 if survivors else 0


def _line(verdict: Verdict) -> str:
    mutant = verdict.mutant
    where = f"{mutant.module}.py:{mutant.line}"
    text = mutant.text if len(mutant.text) <= 100 else mutant.text[:97] + "..."
    return f"{where:<15} {text:<100} {verdict.killed_by or 'SURVIVED'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
