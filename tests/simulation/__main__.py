"""`make sim SEEDS=10000`: many simulated runs, one for each seed, and what they covered.

    python -m tests.simulation --seeds 10000            a campaign; exit code 1 if any run failed
    python -m tests.simulation --replay 4711            one run again, with its error in full
    python -m tests.simulation --shrink 4711            the same with all operations taken out that it does not need

The operations of a failed run, shrunk, are what a test in `test_reproductions.py` begins with.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from tests.simulation.campaign import LEAST_COVERED, Outcome, campaign, covered, quiet, run_seed, shrunk
from tests.simulation.invariants import Violation
from tests.simulation.schedules import settings_of


def main(
    seeds: Annotated[int, typer.Option(help="How many runs.", min=1)] = 1000,
    first: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    jobs: Annotated[int, typer.Option(help="Processes side by side; 0: one for each core.", min=0)] = 0,
    replay: Annotated[int | None, typer.Option(help="Run this seed alone and show its error.")] = None,
    shrink: Annotated[int | None, typer.Option(help="Find the operations that this failing seed needs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
) -> None:
    """Run simulated federations."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if shrink is not None:
        quiet()
        operations = shrunk(shrink)
        console.print(f"settings: {settings_of(shrink)}; {len(operations)} operations")
        for op in operations:
            console.print(repr(op), soft_wrap=True)
        return
    if replay is not None:
        try:
            world = run_seed(replay)
        except (Exception, Violation):
            traceback.print_exc()
            raise typer.Exit(1) from None
        console.print(f"seed {replay}: {len(world.operations)} operations, {len(world.watch.committed)} rounds")
        return
    began = time.monotonic()
    total = campaign(seeds, first, jobs or os.cpu_count() or 1, console)
    _report(total, time.monotonic() - began, console, out)
    if total.failures:
        raise typer.Exit(1)


def _report(total: Outcome, seconds: float, console: Console, out: Path | None) -> None:
    table, thin = covered(total.coverage)
    console.print(table)
    figures = {
        "runs": total.runs,
        "failed": [seed for seed, _ in total.failures],
        "operations": total.operations,
        "attempts": total.attempts,
        "rounds_committed": total.rounds,
        "simulated_hours": round(total.simulated_s / 3600, 1),
        "seconds": round(seconds, 1),
        "pairs_below_20": thin,
    }
    if thin:
        console.print(f"pairs met fewer than {LEAST_COVERED} times: {'; '.join(thin)}")
    console.print(
        f"{total.runs} runs, {len(total.failures)} failed; {total.operations} operations, {total.attempts} attempts, "
        f"{total.rounds} rounds committed, {total.simulated_s / 3600:.0f} simulated hours in {seconds:.0f} s"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
