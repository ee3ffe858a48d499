"""What came out of the demo: the figures, the verdict, the table.

It is NOT where anything is measured or run; figures come from what the coordinator recorded, what the baselines gave
and what the logs hold.

Rule it upholds: every promise of the demo that was not kept is a sentence of its own, and any of them makes the exit
code non-zero.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rich.table import Table
from rich.text import Text

from maskwork.job_events import STAGES, RoundCommitted
from maskwork.participant.demo.faults import Landed, Rejoined, Turn
from maskwork.participant.local.children import ended_text

MOST_ACCURACY_DIFFERENCE: Final = 0.01
"""One point, between the masked and the plain model."""
FLOAT32_BYTES: Final = 4

_TRACEBACK: Final = b"Traceback (most recent call last)"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Accuracy on the common test set, 0 to 1."""

    masked: float
    plain: float
    centralised: float


@dataclass(frozen=True, slots=True)
class Summary:
    """``summary.json``, field by field.

    Attributes:
        participants: Sites.
        rounds: Rounds asked for.
        rounds_committed: Rounds committed.
        dropouts_injected: Sites that were killed where they were meant to be.
        dropouts_recovered: Of those, how many rounds were committed all the same.
        rejoined: Of those sites, how many were survivors of a later round.
        accuracy: On the common test set.
        max_abs_difference_of_weights: Between the masked and the plain model, over all weights.
        uplink_bytes_per_parameter: Of one masked update with its masked statistics, the mean over all uploads.
        round_seconds_median: From the plan to the commit.
        stage_seconds: Medians by stage.
        model: The masked model's file.
    """

    participants: int
    rounds: int
    rounds_committed: int
    dropouts_injected: int
    dropouts_recovered: int
    rejoined: int
    accuracy: Accuracy
    max_abs_difference_of_weights: float
    uplink_bytes_per_parameter: float
    round_seconds_median: float
    stage_seconds: Mapping[str, float]
    model: str

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def summarise(
    *,
    participants: int,
    rounds: int,
    committed: Sequence[RoundCommitted],
    turns: Sequence[Turn],
    accuracy: Accuracy,
    difference: float,
    parameters: int,
    model: Path,
) -> Summary:
    """Put the figures together.

    Args:
        participants: Sites.
        rounds: Rounds asked for.
        committed: As recorded; at least one.
        turns: What was done to the sites, and what came of it.
        accuracy: On the common test set.
        difference: Largest absolute difference between a masked and a plain weight.
        parameters: d.
        model: The masked model's file.
    """
    landed = [turn.strike for turn in turns if isinstance(turn, Landed)]
    numbers = {event.round_number for event in committed}
    uploads = sum(len(event.survivors) for event in committed)
    return Summary(
        participants=participants,
        rounds=rounds,
        rounds_committed=len(committed),
        dropouts_injected=len(landed),
        dropouts_recovered=sum(strike.round_number in numbers for strike in landed),
        rejoined=sum(isinstance(turn, Rejoined) for turn in turns),
        accuracy=accuracy,
        max_abs_difference_of_weights=difference,
        uplink_bytes_per_parameter=sum(event.uplink_bytes for event in committed) / (uploads * parameters),
        round_seconds_median=statistics.median(event.seconds for event in committed),
        stage_seconds=_stage_medians(committed),
        model=str(model),
    )


def shortcomings(summary: Summary, *, planned: int, exits: Mapping[str, int], logs: Path) -> list[str]:
    """Every promise that was not kept, a sentence each; empty: all were.

    Args:
        summary: The figures.
        planned: Faults that were planned.
        exits: What each process ended with when it was told to stop.
        logs: The directory of the processes' logs.
    """
    found = []
    if (missing := summary.rounds - summary.rounds_committed) > 0:
        found.append(f"{missing} of {summary.rounds} rounds were not committed")
    if summary.dropouts_injected < planned:
        found.append(
            f"only {summary.dropouts_injected} of {planned} sites could be killed where they were meant to be: "
            "run it again, with more --rounds if the machine is busy"
        )
    if summary.rejoined < summary.dropouts_injected:
        found.append(
            f"only {summary.rejoined} of {summary.dropouts_injected} killed sites were survivors of a later round"
        )
    if abs(summary.accuracy.masked - summary.accuracy.plain) > MOST_ACCURACY_DIFFERENCE:
        found.append(
            f"masked and plain accuracy differ by more than {100 * MOST_ACCURACY_DIFFERENCE:g} point: "
            f"{summary.accuracy.masked:.4f} and {summary.accuracy.plain:.4f}"
        )
    found.extend(f"{name} {ended_text(code)} when it was told to stop" for name, code in exits.items() if code != 0)
    found.extend(f"{log} holds a traceback" for log in sorted(logs.glob("*.log")) if _TRACEBACK in log.read_bytes())
    return found


def summary_table(summary: Summary, turns: Sequence[Turn]) -> Table:
    """The figures for people."""
    accuracy = summary.accuracy
    table = Table(title=Text("maskwork demo", "bold"), title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    stages = "\n".join(f"{name:<18} {1000 * seconds:6.0f} ms" for name, seconds in summary.stage_seconds.items())
    rows = {
        "participants": str(summary.participants),
        "rounds committed": f"{summary.rounds_committed} of {summary.rounds}",
        "sites killed": "\n".join(
            f"{turn.strike.victim} in round {turn.strike.round_number}, {turn.strike.moment.value}"
            for turn in turns
            if isinstance(turn, Landed)
        ),
        "their rounds committed": f"{summary.dropouts_recovered} of {summary.dropouts_injected}",
        "in later rounds again": f"{summary.rejoined} of {summary.dropouts_injected}",
        "accuracy, masked": _percent(accuracy.masked),
        "accuracy, same rounds in clear": _percent(accuracy.plain),
        "accuracy, centralised": _percent(accuracy.centralised),
        "largest difference of a weight": f"{summary.max_abs_difference_of_weights:.2g} (masked and in clear)",
        "uplink per parameter": f"{summary.uplink_bytes_per_parameter:.3f} bytes ({FLOAT32_BYTES} in float32)",
        "a round, median": f"{summary.round_seconds_median:.2f} s",
        "its stages, medians": stages,
        "model": summary.model,
    }
    for name, value in rows.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table


def _stage_medians(committed: Sequence[RoundCommitted]) -> dict[str, float]:
    return {
        stage: statistics.median(times)
        for stage in STAGES
        if (times := [event.stage_seconds[stage] for event in committed if stage in event.stage_seconds])
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
