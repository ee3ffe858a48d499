"""What the demo shows, on a terminal and elsewhere, and its picture."""

import io
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from rich.console import Console
from tests.jobs import scripted_events as make

from maskwork.job_events import JobSummary, WatchEvent
from maskwork.participant.demo import plot
from maskwork.participant.demo.display import DemoScreen, Display
from maskwork.participant.demo.faults import Landed, Moment, Strike
from maskwork.watch_state import WatchState
from maskwork.watch_view import WatchScreen


def summary(state: str, committed: int) -> JobSummary:
    return JobSummary(make.JOB, make.T0, "demo", "digits", state, 2, committed)


async def events(display: Display) -> AsyncIterator[WatchEvent]:
    yield summary("running", 0)
    display.say("a note")
    for number in (1, 2):
        for event in make.whole_round(number):
            yield event
    yield summary("completed", 2)


@pytest.mark.parametrize("terminal", [True, False])
async def test_a_job_is_shown_with_the_demos_notes(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=terminal, width=100, height=40, legacy_windows=False, _environ={"TERM": "xterm"}
    )
    display = Display(console)
    state = await display.show_job(events(display))
    assert state.succeeded
    assert "a note" in file.getvalue()
    assert ("\x1b[" in file.getvalue()) is terminal
    if not terminal:
        assert "round 2/2 committed: 4 of 5 sites, without north" in file.getvalue()


async def test_after_the_job_notes_are_lines_again() -> None:
    file = io.StringIO()
    display = Display(Console(file=file, force_terminal=True, width=100, height=40, _environ={"TERM": "xterm"}))
    await display.show_job(events(display))
    before = len(file.getvalue())
    display.say("later")
    assert "later" in file.getvalue()[before:]


@pytest.mark.parametrize("height", [12, 24, 60])
def test_the_view_fits_with_its_notes(height: int) -> None:
    state = WatchState().apply(summary("running", 0))
    for number in range(1, 40):
        for event in make.whole_round(number):
            state = state.apply(event)
    notes = ["first note", "second note", "a note as long as " + "x" * 200]
    console = Console(file=io.StringIO(), width=80, height=height, force_terminal=True)
    screen = DemoScreen(WatchScreen(state, lambda: make.T0), notes)
    lines = console.render_lines(screen, console.options, pad=False)
    text = ["".join(segment.text for segment in line) for line in lines]
    assert text[0] == "first note"
    if height >= 24:
        assert len(lines) < height
        assert any(line.lstrip().startswith("39 ") for line in text), "the latest round is in view"


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rounds = [make.committed(number) for number in (1, 2, 3)]
    turns = [Landed(Strike(Moment.BEFORE_UPLOAD, "north", 2, 1))]
    drawn = plot.draw(tmp_path / "p.png", rounds, turns, plain_accuracies=[0.5, 0.6, 0.7], masked_accuracy=0.7)
    assert drawn
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not plot.draw(tmp_path / "p.png", [make.committed()], [], plain_accuracies=[0.5], masked_accuracy=0.5)
    assert not (tmp_path / "p.png").exists()
