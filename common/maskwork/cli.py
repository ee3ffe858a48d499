"""The ``maskwork`` command: a list of groups, each loaded when it is called for.

Every installed root of the namespace adds its commands through the entry-point group ``maskwork.commands``:

- ``NAME = "module:app"`` where ``app`` is a `typer.Typer` adds a group of commands. Several distributions may
  name the same group (``model init`` is the participant's, ``model export`` is not): their commands are merged.
- ``NAME = "module:function"`` adds the function as a single command.

It is NOT where any command lives, and it knows none of the packages that it loads.

Rules it upholds: listing the groups imports none of them, so ``maskwork --help`` costs nothing and the
coordinator's commands never see torch; an error meant for the person at the terminal is printed as it is, with
exit code 1, and never with a traceback; locals never reach the terminal.
"""

import errno
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, distributions, entry_points
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeGuard

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from maskwork.errors import StoreError, UserError

if TYPE_CHECKING:
    # Typer carries its click inside and does not give these types a public name.
    from typer._click.core import Command, Context

ENTRY_POINT_GROUP: Final = "maskwork.commands"

_SUMMARIES: Final[Mapping[str, str]] = {
    "pki": "Make a federation's CA, issue certificates, look at them.",
    "coordinator": "Run the coordinator and look after it.",
    "participant": "Run a site's agent and look after it.",
    "job": "Submit jobs, watch them, end them.",
    "model": "Make initial models, take trained ones home.",
    "audit": "Check afterwards who took part, and under which parameters.",
    "demo": "A whole federation on this machine: five participants, masked, with dropouts.",
    "privacy": "Plan a privacy budget before a run.",
    "bench": "Measure what masking costs here.",
    "simulate": "Run a federation in one process.",
}
"""Help lines known without importing anything; what is not listed gets the name of its distribution."""


class CommandConflictError(RuntimeError):
    """Two installed distributions contribute commands that cannot live together."""


class LazyCommands(TyperGroup):
    """The top of the command tree: names and summaries at once, the commands themselves when one is called for."""

    _contributions: Mapping[str, tuple[EntryPoint, ...]] = {}

    def contribute(self, contributions: Mapping[str, tuple[EntryPoint, ...]]) -> None:
        """List the groups in `contributions` without loading them."""
        self._contributions = contributions
        for name, points in contributions.items():
            self.add_command(TyperGroup(name=name, help=_summary(name, points)), name)

    def resolve_command(self, ctx: "Context", args: list[str]) -> "tuple[str | None, Command | None, list[str]]":
        """Put the real command in the place of its summary, for dispatch and for shell completion."""
        name = args[0]
        if name in self._contributions:
            self.add_command(load_command(name, self._contributions[name]), name)
        return super().resolve_command(ctx, args)


def installed_contributions() -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points of the installed roots by the name of the group that they contribute to, in order of name."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value)):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def load_command(name: str, points: tuple[EntryPoint, ...]) -> "Command":
    """Import what contributes to `name` and make one command of it.

    Raises:
        UserError: When a contribution cannot be imported because a package is missing.
        CommandConflictError: When contributions overlap.
    """
    loaded = [_load(name, point) for point in points]
    if len(loaded) == 1:
        return loaded[0]
    merged: dict[str, Command] = {}
    for command in loaded:
        if not isinstance(command, TyperGroup):
            raise CommandConflictError(f"`maskwork {name}` is contributed twice, once as a single command")
        if overlap := merged.keys() & command.commands.keys():
            raise CommandConflictError(f"`maskwork {name} {min(overlap)}` is contributed twice")
        merged.update(command.commands)
    return TyperGroup(
        name=name, help=_summary(name, points), commands=dict(sorted(merged.items())), no_args_is_help=True
    )


def build(contributions: Mapping[str, tuple[EntryPoint, ...]]) -> LazyCommands:
    """The ``maskwork`` command with the given contributions."""
    root = typer.Typer(cls=LazyCommands, name="maskwork", no_args_is_help=True, add_completion=True)
    root.callback()(_top)
    command = get_command(root)
    assert isinstance(command, LazyCommands)
    command.contribute(contributions)
    return command


def run(contributions: Mapping[str, tuple[EntryPoint, ...]], arguments: list[str]) -> NoReturn:
    """Run the command line `arguments` and exit: 0 done, 1 an error with its text on stderr, 2 wrong usage."""
    try:
        build(contributions).main(args=arguments, prog_name="maskwork")
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # whatever file it was: it is the limit that is to be mended
            _fail(str(StoreError.from_cause(error, file=error.filename or "maskwork")))
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")
    sys.exit(0)


def main() -> NoReturn:
    """The console script."""
    run(installed_contributions(), sys.argv[1:])


def _print_versions(asked: bool) -> None:
    if not asked:
        return
    others = sorted(d.name for d in distributions() if (d.name or "").startswith("maskwork-"))
    for name in ("maskwork", *others):
        typer.echo(f"{name} {version_of(name)}")
    raise typer.Exit


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions and exit.", is_eager=True, callback=_print_versions)
    ] = False,
) -> None:
    """Federated training in which the coordinator only ever sees the sum."""


def _load(name: str, point: EntryPoint) -> "Command":
    try:
        target: object = point.load()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "maskwork":
            raise
        raise UserError(
            f"`maskwork {name}` needs the package {error.name!r}, which is not installed: "
            f"install {_distribution(point)} again, with its dependencies"
        ) from None
    if isinstance(target, typer.Typer):
        return get_group(target)
    if not _is_function(target):
        raise CommandConflictError(
            f"entry point {point.name} = {point.value!r} is neither a typer.Typer nor a function"
        )
    single = typer.Typer(add_completion=False)
    single.command(name)(target)
    return get_command(single)


def _is_function(target: object) -> TypeGuard[Callable[..., None]]:
    return callable(target)


def _summary(name: str, points: tuple[EntryPoint, ...]) -> str:
    return _SUMMARIES.get(name, f"Commands of {_distribution(points[0])}.")


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.module


def _fail(text: str) -> NoReturn:
    # No markup and no wrapping: texts hold paths, URIs and brackets that people copy.
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(text, err=True)
    sys.exit(1)
