"""Many simulated runs side by side: what became of them, what they covered, and how a failed one is made smaller."""

from __future__ import annotations

import gc
import logging
import multiprocessing
from collections import Counter
from dataclasses import dataclass, field

import structlog
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tests.simulation.invariants import Violation
from tests.simulation.operations import Kind, Op
from tests.simulation.schedules import ListedSchedule, RandomSchedule, settings_of
from tests.simulation.world import DOWN, STAGES, World

CHUNK = 20
LEAST_COVERED = 20
IMPOSSIBLE = frozenset({(Kind.TRANSFER, DOWN), (Kind.HEAL, DOWN)})
"""Pairs of operation and stage that cannot be: nothing moves, or connects, to a coordinator that is down."""


@dataclass(slots=True)
class Outcome:
    """What became of some seeds."""

    runs: int = 0
    operations: int = 0
    attempts: int = 0
    rounds: int = 0
    simulated_s: float = 0.0
    coverage: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Take others in."""
        self.runs += other.runs
        self.operations += other.operations
        self.attempts += other.attempts
        self.rounds += other.rounds
        self.simulated_s += other.simulated_s
        self.coverage.update(other.coverage)
        self.failures.extend(other.failures)


def run_seed(seed: int) -> World:
    """One run; raises what went wrong."""
    settings = settings_of(seed)
    return World(settings, RandomSchedule(settings)).run()


def run_seeds(seeds: range) -> Outcome:
    """Some runs, in this process."""
    outcome = Outcome()
    for seed in seeds:
        settings = settings_of(seed)
        world = World(settings, RandomSchedule(settings))
        try:
            world.run()
        except (Exception, Violation) as error:
            outcome.failures.append((seed, f"{type(error).__name__}: {error}"))
        outcome.runs += 1
        outcome.operations += len(world.operations)
        outcome.attempts += world.watch.attempts
        outcome.rounds += len(world.watch.committed)
        outcome.simulated_s += world.loop.time()
        outcome.coverage.update(world.coverage)
    return outcome


def campaign(seeds: int, first: int, jobs: int, console: Console) -> Outcome:
    """Many runs, in processes side by side."""
    chunks = [range(at, min(at + CHUNK, first + seeds)) for at in range(first, first + seeds, CHUNK)]
    total = Outcome()
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with multiprocessing.get_context("spawn").Pool(jobs, quiet) as pool, Progress(*columns, console=console) as bar:
        task = bar.add_task("runs", total=seeds)
        try:
            for outcome in pool.imap_unordered(run_seeds, chunks):
                for seed, why in outcome.failures:
                    console.print(f"seed {seed}: {why}")
                total.add(outcome)
                bar.update(task, advance=outcome.runs)
                if not console.is_terminal and total.runs % (CHUNK * 25) == 0:
                    console.print(f"{total.runs} of {seeds} runs, {len(total.failures)} failed")
        except KeyboardInterrupt:
            console.print("interrupted: what follows is of the runs until now")
    return total


def shrunk(seed: int) -> list[Op]:
    """The operations of a failing run without those that it does not need to fail in the same way."""
    kind, operations = _failure(seed, None)
    if kind is None:
        return []
    size = len(operations) // 2
    while size:
        at = 0
        while at < len(operations):
            shorter = operations[:at] + operations[at + size :]
            if _failure(seed, shorter)[0] is kind:
                operations = shorter
            else:
                at += size
        size //= 2
    return operations


def _failure(seed: int, operations: list[Op] | None) -> tuple[type[BaseException] | None, list[Op]]:
    settings = settings_of(seed)
    schedule = RandomSchedule(settings) if operations is None else ListedSchedule(operations)
    world = World(settings, schedule)
    try:
        world.run()
    except (Exception, Violation) as error:
        return type(error), world.operations
    return None, world.operations


def covered(coverage: Counter[tuple[Kind, str]]) -> tuple[Table, list[str]]:
    """The table of operation and stage, and the pairs that occurred too seldom."""
    table = Table("operation", *STAGES, title="how often each operation met each stage")
    thin: list[str] = []
    for kind in Kind:
        counts = [coverage[kind, stage] for stage in STAGES]
        table.add_row(kind.value, *(str(count) for count in counts))
        thin.extend(
            f"{kind.value} in {stage}: {count}"
            for stage, count in zip(STAGES, counts, strict=True)
            if count < LEAST_COVERED and (kind, stage) not in IMPOSSIBLE
        )
    return table, thin


def quiet() -> None:
    """No log lines, of which a run writes hundreds, and fewer looks for garbage, of which it makes little."""
    gc.set_threshold(100_000, 20, 20)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
