"""What people see of a job: on terminals of several sizes, and in logs."""

import io
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.jobs import scripted_events as make

from maskwork.job_events import STAGES, AttemptAborted, ConnectionLost, JobSummary, Waiting, WatchEvent
from maskwork.watch_state import Notice, NoticeKind, WatchState
from maskwork.watch_view import WatchScreen, duration_text, follow, plain_line

RUNNING = JobSummary(make.JOB, make.T0, "digits", "digits", "running", 20, 0)
COMPLETED = replace(RUNNING, state="completed", rounds_committed=20)
FAILED = replace(RUNNING, state="failed", reason="round 3 failed 20 times")
CROWD = tuple(f"site-{number:04d}" for number in range(1000))


class AsciiOut(io.StringIO):
    """A terminal that can do nothing but ASCII."""

    encoding = "ascii"


def drawn(
    events: Iterable[WatchEvent], width: int = 120, *, height: int = 40, ascii_only: bool = False, now: float = make.T0
) -> list[str]:
    file = AsciiOut() if ascii_only else io.StringIO()
    console = Console(file=file, width=width, height=height, force_terminal=False, color_system=None)
    screen = WatchScreen(WatchState(), clock=lambda: now)
    for event in events:
        screen.take(event)
    console.print(screen)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def line_with(lines: list[str], word: str) -> str:
    found = [line for line in lines if word in line]
    assert len(found) == 1, (word, lines)
    return found[0]


async def told(events: Iterable[WatchEvent], *, terminal: bool = False) -> tuple[WatchState, str]:
    async def stream() -> AsyncIterator[WatchEvent]:
        for event in events:
            yield event

    file = io.StringIO()
    console = Console(file=file, width=80, height=24, force_terminal=terminal, color_system=None, legacy_windows=False)
    return await follow(stream(), console), file.getvalue()


def test_a_round_in_the_middle_of_the_upload() -> None:
    lines = drawn([RUNNING, *make.whole_round(1), *make.whole_round(2)[:-3]])
    assert line_with(lines, "3f9a1c").split() == ["digits", "3f9a1c", "task", "digits", "running"]
    assert "round 1/20" in line_with(lines, "left")
    assert "about 28 s left" in line_with(lines, "left")
    assert line_with(lines, "must stay") == "round 2  5 sites, 4 must stay"
    assert line_with(lines, "advertise-keys").split() == ["✓", "advertise-keys", "5/5", "0.0", "s", "all"]
    assert "●" in line_with(lines, "masked-update ")
    assert "3/5" in line_with(lines, "masked-update ")
    assert line_with(lines, "masked-update ").endswith("·north ✓south ✓east ✓west ·centre")
    for stage in STAGES[3:]:
        assert line_with(lines, stage).split() == ["·", stage]


def test_who_is_out_and_why() -> None:
    lines = drawn([RUNNING, make.attempt_opened(), make.stage_opened("masked-update"), make.dropped("north")])
    assert "✗north" in line_with(lines, "masked-update ")
    assert line_with(lines, "is out") == "  ✗ north is out at masked-update: deadline (no answer before the deadline)"
    lines = drawn([RUNNING, *make.whole_round()[:-1], make.stage_opened("unmask", expected=make.SITES[1:])])
    assert line_with(lines, "4/5").endswith("✗north")
    # Under the stages while it concerns them, among the messages afterwards.
    lines = drawn([RUNNING, *make.whole_round(1), make.attempt_opened(2)])
    assert "round 1: north is out" in line_with(lines, "is out")
    text = "\n".join(drawn([RUNNING, *make.whole_round(1), make.attempt_opened(2), make.dropped("west", 2)]))
    assert text.count("west is out") == text.count("round 1: north is out") == 1


def test_the_rounds_with_their_means() -> None:
    lines = drawn([RUNNING, *make.whole_round(1), make.committed(2)])
    head = line_with(lines, "train.loss").split()
    assert head == ["round", "sites", "train.loss", "eval.loss", "eval.accuracy", "time", "sent", "out"]
    rows = [line.split() for line in lines if "MB" in line]
    assert rows == [
        ["1", "4/5", "0.5000", "0.7500", "0.8750", "1.5", "s", "2.09", "MB", "north"],
        ["2", "5/5", "0.5000", "0.7500", "0.8750", "1.5", "s", "2.09", "MB"],
    ]


def test_metrics_that_a_task_invents_have_their_columns() -> None:
    statistics = {"examples": 9.0, "eval.auc": 0.25, "eval.accuracy": 0.5}
    lines = drawn([RUNNING, replace(make.committed(1), statistics=statistics)])
    assert line_with(lines, "eval.auc").split()[2:4] == ["eval.accuracy", "eval.auc"]


LONG_REASON = AttemptAborted(make.JOB, make.T0, 2, 1, "complaint-upheld", "many words " * 30)
BUSY = [
    RUNNING,
    *(event for number in range(1, 19) for event in make.whole_round(number)),
    make.attempt_opened(19),
    make.stage_opened("masked-update", 19),
    make.dropped("north", 19),
    make.dropped("south", 19),
]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("height", [24, 40])
def test_it_fits_the_terminal(width: int, height: int) -> None:
    lines = drawn(BUSY, width, height=height)
    assert max(cell_len(line) for line in lines) <= width
    if width >= 80:
        assert len(lines) < height
        assert "eval.accuracy" in "".join(lines)
    assert any(line.split()[:1] == ["18"] for line in lines), "the newest round is always there"


@pytest.mark.parametrize("width", [80, 120])
def test_a_crowd_takes_no_more_lines_than_a_few(width: int) -> None:
    events: list[WatchEvent] = [RUNNING, make.attempt_opened(sites=CROWD)]
    events += [make.stage_opened("masked-update", expected=CROWD)]
    events += [make.answered("masked-update", site) for site in CROWD[:400]]
    events += [make.dropped(site) for site in CROWD[990:]]
    lines = drawn(events, width)
    assert max(cell_len(line) for line in lines) <= width
    stage = line_with(lines, "masked-update  ")
    assert "400/1000" in stage
    assert "·site-0400" in stage, "those who are waited for come first"
    assert stage.rsplit("+", 1)[1].isdecimal()
    assert len(lines) <= 14
    assert sum("is out" in line for line in lines) == 3


def test_ascii_terminals_are_told_the_same() -> None:
    text = "\n".join(drawn([*BUSY, LONG_REASON], 80, ascii_only=True))
    assert text.isascii()
    assert "xnorth" in text


def test_names_are_not_markup() -> None:
    job = replace(RUNNING, name="[red]digits[/red]", reason="[bold]")
    assert "[red]digits[/red]" in "".join(drawn([job, make.dropped("[link]")]))


def test_why_nothing_moves() -> None:
    wait = Waiting(make.JOB, make.T0, "2 of the 3 sites needed are ready; not connected: " + ", ".join(CROWD))
    lines = drawn([RUNNING, wait], 80)
    assert "waiting: 2 of the 3 sites" in "".join(lines)
    assert len(lines) < 8
    lost = ConnectionLost(make.JOB, make.T0, "Socket closed", 0.5)
    assert line_with(drawn([RUNNING, lost]), "digits").endswith("connection lost, trying again")


def test_why_a_job_failed() -> None:
    lines = drawn([RUNNING, make.committed(1), FAILED])
    assert "failed" in lines[0]
    assert "round 3 failed 20 times" in "".join(lines)
    assert "left" not in "".join(lines)


def test_a_stage_shows_its_age_by_the_coordinators_clock() -> None:
    ahead_s = 3600.0
    screen = WatchScreen(WatchState(), clock=lambda: make.T0 + 12 + ahead_s)
    screen.take(ConnectionLost(make.JOB, screen.clock(), "Socket closed", 0.5))
    screen.take(make.attempt_opened())
    screen.take(make.stage_opened("advertise-keys"))
    screen.take(replace(make.answered("advertise-keys", "north"), at=make.T0 + 12))
    console = Console(file=io.StringIO(), width=100, color_system=None, record=True)
    console.print(screen)
    assert "12 s" in line_with(console.export_text().splitlines(), "advertise-keys")


def test_a_resumed_session_has_passed_what_it_does_not_know() -> None:
    lines = drawn([RUNNING, make.stage_opened("consistency-check")])
    assert [line.split()[0] for line in lines if any(stage in line for stage in STAGES)] == ["✓", "✓", "✓", "●", "·"]


def test_before_anything_is_known() -> None:
    assert drawn([])[0] == "connecting"
    assert "MB" in "".join(drawn([make.committed(3)]))


async def test_plain_lines_tell_each_happening_once() -> None:
    history = [RUNNING, *make.whole_round(1)]
    lost = ConnectionLost(make.JOB, make.T0 + 30, "Socket closed", 0.5)
    wait = Waiting(make.JOB, make.T0 + 40, "2 of the 3 sites needed are ready")
    aborted = AttemptAborted(make.JOB, make.T0 + 41, 2, 1, "too-few-participants")
    events = [*history, lost, *history, wait, make.attempt_opened(2), aborted, make.committed(2, 2), COMPLETED]
    state, text = await told(events)
    assert state.succeeded
    assert [line.split(" ", 1)[1] for line in text.splitlines()] == [
        "job digits (3f9a1c) is running, 0 of 20 rounds",
        "round 1: north is out at masked-update: deadline (no answer before the deadline)",
        "round 1/20 committed: 4 of 5 sites, without north; train.loss 0.5, eval.loss 0.75, eval.accuracy 0.875; "
        "1.50 s, 2.09 MB",
        "connection to the coordinator lost (Socket closed); trying again",
        "connected to the coordinator again",
        "waiting: 2 of the 3 sites needed are ready",
        "round 2, attempt 1 came to nothing: too-few-participants; nothing of it is used",
        "round 2/20 committed: 5 of 5 sites at attempt 2; train.loss 0.5, eval.loss 0.75, eval.accuracy 0.875; "
        "1.50 s, 2.09 MB",
        "job digits (3f9a1c) is completed, 20 of 20 rounds",
    ]


async def test_a_terminal_gets_the_live_view() -> None:
    state, text = await told([RUNNING, *make.whole_round(), COMPLETED], terminal=True)
    assert state.succeeded
    assert "✓ masked-update" in text
    assert "round 20/20" in text
    assert "Z round 1/20 committed" not in text


def test_a_line_begins_with_the_time_in_utc() -> None:
    assert plain_line(Notice(1_790_000_000.0, NoticeKind.WAIT, "waiting: x")) == "14:13:20Z waiting: x"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min"), (9000, "2 h")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
