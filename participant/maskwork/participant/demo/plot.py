"""Accuracy and loss over the rounds as a picture, if matplotlib is installed.

It is NOT needed for anything: matplotlib is a developer's tool, and a site does without it.

Rule it upholds: a round's federated evaluation is that of the model which the round *began* with, and is drawn there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from maskwork.job_events import RoundCommitted
from maskwork.participant.demo.faults import Landed, Moment, Turn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORDS = {Moment.BEFORE_UPLOAD: "before its upload", Moment.BEFORE_UNMASKING: "before unmasking"}


def draw(
    path: Path,
    rounds: Sequence[RoundCommitted],
    turns: Sequence[Turn],
    *,
    plain_accuracies: Sequence[float],
    masked_accuracy: float,
) -> bool:
    """Write the picture; False, and nothing written, if matplotlib is not installed.

    Args:
        path: A PNG file.
        rounds: The committed rounds.
        turns: What was done to the sites.
        plain_accuracies: On the test set, after each round of the plain repetition.
        masked_accuracy: On the test set, of the last masked model.
    """
    # matplotlib keeps a cache of fonts where it keeps its settings: with the run, not in the user's home.
    os.environ.setdefault("MPLCONFIGDIR", str(path.parent / "plot-cache"))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_metric(upper, rounds, "eval.accuracy", "masked: at the sites, on what each holds out")
    _draw_test_accuracy(upper, plain_accuracies, masked_accuracy)
    _draw_metric(lower, rounds, "eval.loss", "masked: at the sites, on what each holds out")
    _draw_metric(lower, rounds, "train.loss", "masked: while training", color="tab:purple")
    upper.set_ylabel("accuracy")
    lower.set(ylabel="loss", xlabel="rounds in the model", yscale="log")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlim(-0.5, len(rounds) + 0.5)
    for axes in (upper, lower):
        _mark_faults(axes, turns, named=axes is upper)
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize="small")
    figure.suptitle("maskwork demo: federated, masked, with two sites killed")
    figure.savefig(path, dpi=120)
    return True


def _draw_metric(
    axes: Axes, rounds: Sequence[RoundCommitted], name: str, label: str, *, color: str = "tab:blue"
) -> None:
    points = [(event.round_number - 1, event.statistics[name]) for event in rounds if name in event.statistics]
    axes.plot([x for x, _ in points], [y for _, y in points], ".-", color=color, label=label)


def _draw_test_accuracy(axes: Axes, plain: Sequence[float], masked: float) -> None:
    axes.plot(range(1, len(plain) + 1), plain, ":", color="tab:green", label="in clear: test set")
    axes.plot([len(plain)], [masked], "D", color="tab:orange", label="masked: test set, last model")


def _mark_faults(axes: Axes, turns: Sequence[Turn], *, named: bool) -> None:
    for style, turn in zip(("--", "-."), [t for t in turns if isinstance(t, Landed)], strict=False):
        strike = turn.strike
        words = f"round {strike.round_number}: {strike.victim} killed {_WORDS[strike.moment]}"
        # What a round changes shows between the model that it began with and the one that it made.
        at = strike.round_number - 0.5
        axes.axvline(at, color="tab:red", linestyle=style, alpha=0.7, label=words if named else None)
