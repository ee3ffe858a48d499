"""The command's skeleton: loaded lazily, merged across distributions, and its errors are one clear line."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import NoReturn

import pytest
import typer

from maskwork.cli import ENTRY_POINT_GROUP, CommandConflictError, installed_contributions, run
from maskwork.errors import UserError

HEAVY = ("torch", "grpc", "numpy", "maskwork.coordinator", "maskwork.participant", "maskwork.net.tls")


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


def make() -> None:
    """Make one."""
    typer.echo("made")


def export(count: int = 1) -> None:
    """Take one home."""
    typer.echo(f"exported {count}")


def fail() -> NoReturn:
    raise UserError("disk [full] at /x/y: free some space")


def fail_open() -> None:
    with open("/nonexistent/file"):
        pass


def fault() -> NoReturn:
    raise ZeroDivisionError


def group(*functions: object) -> typer.Typer:
    app = typer.Typer()
    for function in functions:
        assert callable(function)
        app.command()(function)
    return app


@pytest.fixture(autouse=True)
def module() -> Iterator[None]:
    made = ModuleType("made_for_the_tests")
    made.__dict__.update(
        make=make, fail=fail, fail_open=fail_open, fault=fault, one=group(make), two=group(export), same=group(make)
    )
    made.__dict__["number"] = 3
    sys.modules[made.__name__] = made
    yield
    del sys.modules[made.__name__]


def outcome(capsys: pytest.CaptureFixture[str], points: dict[str, list[str]], *arguments: str) -> tuple[int, str, str]:
    contributions = {name: tuple(point(name, value) for value in values) for name, values in points.items()}
    with pytest.raises(SystemExit) as caught:
        run(contributions, list(arguments))
    streams = capsys.readouterr()
    return int(caught.value.code or 0), streams.out, streams.err


def test_help_lists_groups_without_importing_any(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, {"model": ["not.there:app"], "odd": ["not.there:app"]}, "--help")
    assert code == 0
    assert "model" in out
    assert "initial models" in out
    assert "Commands of not.there" in out


def test_a_group_with_one_command_stays_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, {"model": ["made_for_the_tests:one"]}, "model", "make") == (0, "made\n", "")


def test_groups_of_several_distributions_are_merged(capsys: pytest.CaptureFixture[str]) -> None:
    points = {"model": ["made_for_the_tests:one", "made_for_the_tests:two"]}
    assert outcome(capsys, points, "model", "make") == (0, "made\n", "")
    assert outcome(capsys, points, "model", "export", "--count", "2") == (0, "exported 2\n", "")
    _, out, _ = outcome(capsys, points, "model", "--help")
    assert "Make one." in out
    assert "Take one home." in out


def test_a_function_is_a_single_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, {"demo": ["made_for_the_tests:make"]}, "demo") == (0, "made\n", "")


@pytest.mark.parametrize("values", [["one", "same"], ["one", "make"], ["number"]])
def test_contributions_that_cannot_live_together_are_a_fault_of_packaging(values: list[str]) -> None:
    points = tuple(point("model", f"made_for_the_tests:{value}") for value in values)
    with pytest.raises(CommandConflictError):
        run({"model": points}, ["model", "make"])


def test_an_error_for_the_person_is_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    result = outcome(capsys, {"x": ["made_for_the_tests:fail"]}, "x")
    assert result == (1, "", "error: disk [full] at /x/y: free some space\n")


def test_a_file_that_cannot_be_opened_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    result = outcome(capsys, {"x": ["made_for_the_tests:fail_open"]}, "x")
    assert result == (1, "", "error: /nonexistent/file: No such file or directory\n")


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run({"x": (point("x", "made_for_the_tests:fault"),)}, ["x"])


def test_a_missing_package_is_named_and_a_missing_module_of_ours_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, {"x": ["no_such_package.commands:app"]}, "x")
    assert code == 1
    assert "'no_such_package'" in err
    with pytest.raises(ModuleNotFoundError):
        run({"x": (point("x", "maskwork.no_such_module:app"),)}, ["x"])


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, {"x": ["made_for_the_tests:fail"]}, "y")
    assert code == 2
    assert "y" in err


def test_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, {}, "--version")
    assert code == 0
    assert out.startswith("maskwork 0.")


def test_pki_is_installed() -> None:
    assert [p.value for p in installed_contributions()["pki"]] == ["maskwork.pki_commands:app"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["pki", "--help"], ["pki", "show", "/nonexistent"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom maskwork import cli\nsys.argv[1:] = sys.argv[1:]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        f"print('HEAVY', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout + done.stderr
