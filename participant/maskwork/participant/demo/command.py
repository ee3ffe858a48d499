"""``maskwork demo``: the options, the order of things, what is printed, the exit code.

It is NOT where anything is done; each part has a module of its own. torch is not imported before it is needed, so
that ``maskwork demo --help`` is quick.

Rules it upholds: the path of ``summary.json`` is the last line on stdout; failures are told on stderr, with the ends of
the logs that say why; exit code 0 only if every promise was kept, 1 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from maskwork.errors import UserError
from maskwork.participant.demo.display import Display
from maskwork.participant.demo.federation import (
    FEWEST_PARTICIPANTS,
    FEWEST_ROUNDS,
    MOST_PARTICIPANTS,
    DemoOptions,
    RunFolder,
    create_folder,
    write_federation,
)
from maskwork.participant.local.failure import RunFailed
from maskwork.participant.local.files import free_port

if TYPE_CHECKING:
    from maskwork.participant.demo.masked_run import MaskedRun

INTERRUPTED: Final = 130
_TAIL_LINES: Final = 5
_CULPRIT_LINES: Final = 30
_TAIL_WIDTH: Final = 400


def demo(
    rounds: Annotated[
        int, typer.Option("--rounds", min=FEWEST_ROUNDS, max=1000, help="Rounds of federated training.")
    ] = 20,
    participants: Annotated[
        int, typer.Option("--participants", min=FEWEST_PARTICIPANTS, max=MOST_PARTICIPANTS, help="Sites.")
    ] = 5,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the shards, the initial model and the training.")
    ] = 1,
    alpha: Annotated[
        float, typer.Option("--alpha", min=0.01, max=1000.0, help="Dirichlet concentration: small is more skewed.")
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder of the run; else runs/demo-TIME.", show_default=False),
    ] = None,
) -> None:
    """Run a whole federation on this machine: masked, with two sites killed on the way, against the same in clear."""
    started = time.monotonic()
    options = DemoOptions(rounds=rounds, participants=participants, seed=seed, alpha=alpha)
    console = Console(highlight=False, markup=False, emoji=False)
    display = Display(console)
    folder = create_folder(out, now=time.time())
    display.say(f"everything of this run is in {folder.root}")
    try:
        masked = _masked(folder, options, display)
        kept = _judge(folder, options, masked, console=console)
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo(f"stopped, and every process with it; what there is stays in {folder.root}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    display.say(f"{time.monotonic() - started:.0f} s in all")
    typer.echo(str(folder.summary))
    raise typer.Exit(0 if kept else 1)


def _masked(folder: RunFolder, options: DemoOptions, display: Display) -> MaskedRun:
    from maskwork.participant.demo.masked_run import run_masked

    port = free_port()
    write_federation(folder, options, port, now=time.time())
    try:
        return asyncio.run(run_masked(folder, options, port, display))
    except UserError as failure:
        _show_logs(folder, failure.process if isinstance(failure, RunFailed) else "")
        raise


def _judge(folder: RunFolder, options: DemoOptions, masked: MaskedRun, *, console: Console) -> bool:
    """Compare, write and print what came out; whether every promise was kept."""
    from maskwork.participant.demo import plot
    from maskwork.participant.demo.comparison import compare
    from maskwork.participant.demo.faults import planned
    from maskwork.participant.demo.summary import shortcomings, summary_table

    display = Display(console)
    summary, plain = compare(folder, options, masked, display)
    summary.write(folder.summary)
    found = shortcomings(summary, planned=len(planned(options.rounds)), exits=masked.exits, logs=folder.logs)
    console.print()
    console.print(summary_table(summary, masked.turns))
    drawn = plot.draw(
        folder.plot,
        masked.rounds,
        masked.turns,
        plain_accuracies=plain.accuracies,
        masked_accuracy=summary.accuracy.masked,
    )
    display.say(f"drawn: {folder.plot}" if drawn else "no picture was drawn: matplotlib is not installed")
    for shortcoming in found:
        typer.secho(f"NOT KEPT: {shortcoming}", fg=typer.colors.RED, err=True)
    return not found


def _show_logs(folder: RunFolder, culprit: str) -> None:
    """The ends of the logs on stderr, the one that matters most last."""
    logs = sorted(folder.logs.glob("*.log"), key=lambda log: (log.stem == culprit, log.stem))
    for log in logs:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines:
            continue
        typer.secho(f"--- {log}, its last lines", dim=True, err=True)
        for line in lines[-(_CULPRIT_LINES if log.stem == culprit else _TAIL_LINES) :]:
            typer.echo(line[:_TAIL_WIDTH], err=True)
