"""Showing a job to people: a live view on a terminal, one plain line per happening everywhere else.

`WatchScreen` draws a `WatchState` as rich renderables in whatever width and height there is; `follow` feeds events to
it. It knows no gRPC and no job service: `maskwork job watch` and `maskwork demo` both use it. What is known of the job
is `maskwork.watch_state`'s.

Rules it upholds: nothing is interpreted as markup, since names and reasons come from elsewhere; a cohort of a
thousand takes no more lines than one of five; without colour and with ASCII alone it says the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from maskwork.job_events import STAGES, ConnectionLost, Dropped, RoundCommitted, WatchEvent
from maskwork.watch_state import (
    Attempt,
    Notice,
    NoticeKind,
    StageProgress,
    WatchState,
    bytes_text,
    dropped_text,
    metrics_of,
    some,
)

__all__ = ["WatchScreen", "WatchState", "follow", "plain_line"]

NOTHING_KNOWN: Final = WatchState()
REFRESH_PER_S: Final = 8.0
SHOWN_DROPS: Final = 3
NOTICE_LINES: Final = 5
# A blank line, the head of the table, and the last line of the terminal, which stays free.
_ROUNDS_HEAD: Final = 3
_FEWEST_ROUNDS: Final = 3
# Round, sites, time, sent, and the least that is good for the names of those out, with their padding.
_ROUND_COLUMNS_WIDTH: Final = 7 + 7 + 9 + 9 + 10
_RECENT_ROUNDS: Final = 10

STATE_STYLES: Final = {
    "queued": "yellow",
    "running": "cyan",
    "completed": "bold green",
    "failed": "bold red",
    "aborted": "bold red",
}
_NOTICE_STYLES: Final = {
    NoticeKind.JOB: "",
    NoticeKind.ROUND: "green",
    NoticeKind.DROP: "red",
    NoticeKind.ABORT: "yellow",
    NoticeKind.WAIT: "yellow",
    NoticeKind.CONNECTION: "magenta",
}


@dataclass(frozen=True, slots=True)
class Marks:
    """Signs of a stage: finished, open, not yet begun; of somebody out; and what stands for what is left out."""

    done: str
    open: str
    ahead: str
    out: str
    cut: str


UNICODE_MARKS: Final = Marks(done="✓", open="●", ahead="·", out="✗", cut="…")
ASCII_MARKS: Final = Marks(done="+", open="*", ahead=".", out="x", cut="~")


@dataclass(slots=True)
class WatchScreen:
    """The live view of `state`, which may be replaced between two drawings.

    Attributes:
        state: What to draw.
        clock: Unix time in seconds, by this machine's clock.
        behind_s: How far the coordinator's clock, as its events show it, is behind ours.
    """

    state: WatchState
    clock: Callable[[], float] = time.time
    behind_s: float | None = None

    def take(self, event: WatchEvent) -> None:
        """Apply an event; learn the difference of the clocks from the one that arrived soonest after it happened."""
        behind_s = self.clock() - event.at
        told = event.at > 0 and not isinstance(event, ConnectionLost)  # that one is by our own clock
        if told and (self.behind_s is None or behind_s < self.behind_s):
            self.behind_s = behind_s
        self.state = self.state.apply(event)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw what fits."""
        marks = ASCII_MARKS if options.ascii_only else UNICODE_MARKS
        now = self.clock() - (self.behind_s or 0.0)
        state, width = self.state, options.max_width
        above: list[RenderableType] = [*title(state, width, marks), progress(state)]
        if state.attempt is not None:
            above += [Text(), attempt_line(state.attempt), stage_table(state.attempt, width, marks=marks, now=now)]
            above += [_drop_line(drop, width, marks) for drop in state.attempt.drops[-SHOWN_DROPS:]]
        notices = _latest_notices(state, width)
        below: list[RenderableType] = [Text(), *notices] if notices else []
        if state.rounds:
            used = _height(console, options, [*above, *below])
            room = max(_FEWEST_ROUNDS, (options.height or console.height) - used - _ROUNDS_HEAD)
            below = [Text(), rounds_table(state.rounds[-room:], width), *below]
        yield Group(*above, *below)


async def follow(
    events: AsyncIterator[WatchEvent],
    console: Console,
    *,
    state: WatchState = NOTHING_KNOWN,
    clock: Callable[[], float] = time.time,
) -> WatchState:
    """Show events until there are no more: live on a terminal, else as plain lines.

    Args:
        events: What happens, as `JobsClient.watch` gives it.
        console: Where to show it.
        state: What is known already.
        clock: Unix time in seconds.

    Returns:
        The last state; `WatchState.succeeded` is the verdict.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        async for event in events:
            before, state = state, state.apply(event)
            for notice in state.new_notices(before):
                console.print(plain_line(notice), markup=False, highlight=False, soft_wrap=True)
        return state
    screen = WatchScreen(state, clock)
    with Live(screen, console=console, refresh_per_second=REFRESH_PER_S, vertical_overflow="crop"):
        async for event in events:
            screen.take(event)
    return screen.state


def plain_line(notice: Notice) -> str:
    """A notice as a line of a log: time of day in UTC and what happened."""
    return f"{datetime.fromtimestamp(notice.at, UTC):%H:%M:%S}Z {notice.text}"


# --- the parts of the live view -------------------------------------------------------------------------------------


def title(state: WatchState, width: int, marks: Marks) -> list[RenderableType]:
    """Which job, where it stands, and why nothing moves if nothing does."""
    job = state.job
    if job is None:
        return [Text("connecting" if state.lost is None else "connection lost, trying again", "dim")]
    left = Text(job.name, "bold", overflow="ellipsis", no_wrap=True).append(f"  {job.job_id}  task {job.task}", "dim")
    standing = Text(job.state, STATE_STYLES.get(job.state, ""), no_wrap=True)
    if state.lost is not None and not job.ended:
        standing = Text("connection lost, trying again", "bold magenta", no_wrap=True)
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(ratio=1, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row(left, standing)
    if job.ended:
        return [table, _cut(Text(job.reason, "red"), 3 * width, marks)] if job.reason else [table]
    if state.waiting is not None:
        return [table, _cut(Text(f"waiting: {state.waiting.detail}", "yellow"), 3 * width, marks)]
    return [table]


def progress(state: WatchState) -> RenderableType:
    """Rounds committed of all, and about how long the others will take."""
    total, done = state.rounds_total, state.rounds_committed
    if not total:
        return Text()
    words = Text(f"round {done}/{total}", no_wrap=True)
    if state.rounds and done < total and not state.ended:
        median_s = statistics.median(event.seconds for event in state.rounds[-_RECENT_ROUNDS:])
        words.append(f"  about {duration_text((total - done) * median_s)} left", "dim")
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(ratio=1)
    table.add_column(justify="right", no_wrap=True)
    table.add_row(ProgressBar(total=total, completed=done), words)
    return table


def attempt_line(attempt: Attempt) -> Text:
    """Which attempt the stages below belong to."""
    line = Text(f"round {attempt.round_number}", "bold", overflow="ellipsis", no_wrap=True)
    if attempt.attempt > 1:
        line.append(f", attempt {attempt.attempt}", "bold yellow")
    line.append(f"  {len(attempt.roster)} sites", "dim")
    if attempt.threshold is not None:
        line.append(f", {attempt.threshold} must stay", "dim")
    if attempt.outcome:
        line.append(f"  {attempt.outcome}", "green" if attempt.outcome == "committed" else "yellow")
    return line


def stage_table(attempt: Attempt, width: int, *, marks: Marks, now: float) -> RenderableType:
    """The five stages: how many have answered, after how long, who has and who has not."""
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify, no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    names_width = width - 4 - max(map(len, STAGES)) - 1 - (2 * len(f"{len(attempt.roster)}") + 2) - len("118 s ")
    names = (*STAGES, *(stage.name for stage in attempt.stages if stage.name not in STAGES))
    for index, name in enumerate(names):
        stage = attempt.stage(name)
        if stage is None:
            # A session that was resumed after a restart begins in the middle.
            passed = any(attempt.stage(later) for later in names[index:])
            table.add_row(Text(f"  {marks.done if passed else marks.ahead}", "dim"), Text(name, "dim"), "", "", "")
            continue
        finished = stage.closed_at is not None
        mark = Text(f"  {marks.done}", "green") if finished else Text(f"  {marks.open}", "cyan")
        seconds = (stage.closed_at if stage.closed_at is not None else max(now, stage.opened_at)) - stage.opened_at
        table.add_row(
            mark,
            Text(name, "" if finished else "bold"),
            f"{len(stage.answered)}/{len(stage.expected)}",
            Text(duration_text(seconds), "dim"),
            _who(stage, attempt.out, names_width, marks),
        )
    return table


def rounds_table(rounds: tuple[RoundCommitted, ...], width: int) -> RenderableType:
    """The given rounds: who was in, the means over their examples, how long it took, what was sent."""
    left = width - _ROUND_COLUMNS_WIDTH
    names = []
    for name in dict.fromkeys(name for event in rounds for name in metrics_of(event)):
        left -= max(len(name), 6) + 2
        if left < 0:
            break
        names.append(name)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    table.add_column("round", justify="right", no_wrap=True)
    table.add_column("sites", justify="right", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("sent", justify="right", no_wrap=True)
    table.add_column("out", no_wrap=True, overflow="ellipsis", style="red")
    for event in rounds:
        metrics = metrics_of(event)
        table.add_row(
            str(event.round_number),
            f"{len(event.survivors)}/{len(event.survivors) + len(event.dropouts)}",
            *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names),
            duration_text(event.seconds),
            bytes_text(event.uplink_bytes),
            some(event.dropouts, limit=3),
        )
    return table


def duration_text(seconds: float) -> str:
    """A duration for people: ``0.8 s``, ``42 s``, ``3 min``, ``5 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    if seconds < 119.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def _who(stage: StageProgress, out: frozenset[str], width: int, marks: Marks) -> Text:
    """Who has answered an open stage and who has not, or who was missing in a finished one, as far as there is room.

    In roster order if all fit, so that names stay where they are; else those who are waited for come first.
    """
    missing = [name for name in stage.expected if name not in stage.answered]
    if stage.closed_at is not None:
        named = [(marks.out + name, "red") for name in missing]
        return _fill(named, width) if named else Text("all", "green")

    def shown(name: str) -> tuple[str, str]:
        if name in stage.answered:
            return marks.done + name, "green"
        return (marks.out + name, "red") if name in out else (marks.ahead + name, "yellow")

    if sum(cell_len(name) + 2 for name in stage.expected) <= width + 1:
        return _fill([shown(name) for name in stage.expected], width)
    return _fill([shown(name) for name in sorted(stage.expected, key=lambda n: (n in stage.answered, n in out))], width)


def _fill(named: Sequence[tuple[str, str]], width: int) -> Text:
    """Words with their styles until the width is full, then how many more there are."""
    line = Text(no_wrap=True)
    for index, (word, style) in enumerate(named):
        more = f" +{len(named) - index}"
        reserve = len(more) if index < len(named) - 1 else 0
        if line.cell_len + 1 + cell_len(word) + reserve > width:
            return line.append(more, "dim")
        line.append(" " if line.plain else "").append(word, style)
    return line


def _latest_notices(state: WatchState, width: int) -> list[Text]:
    """The latest notices of what the rest of the view does not show, as many as fit into `NOTICE_LINES`."""
    shown_drops = 0 if state.attempt is None else len(state.attempt.drops)
    texts: list[Text] = []
    lines = 0
    for notice in reversed(state.notices):
        if notice.kind is NoticeKind.DROP and shown_drops:
            shown_drops -= 1  # those of the current attempt stand under its stages
            continue
        if notice.kind in (NoticeKind.ROUND, NoticeKind.JOB, NoticeKind.WAIT):
            continue
        text = _notice_text(notice)
        lines += -(-text.cell_len // max(width, 1))
        if lines > NOTICE_LINES and texts:
            break
        texts.insert(0, text)
    return texts


def _height(console: Console, options: ConsoleOptions, parts: Sequence[RenderableType]) -> int:
    return len(console.render_lines(Group(*parts), options.update(height=None)))


def _drop_line(drop: Dropped, width: int, marks: Marks) -> Text:
    return _cut(Text(f"  {marks.out} ", "red").append(dropped_text(drop)), width, marks)


def _notice_text(notice: Notice) -> Text:
    when = datetime.fromtimestamp(notice.at, UTC).astimezone()
    return Text(f"{when:%H:%M:%S} ", "dim").append(notice.text, _NOTICE_STYLES[notice.kind])


def _cut(text: Text, width: int, marks: Marks) -> Text:
    if text.cell_len > width:
        text.truncate(max(0, width - len(marks.cut)))
        text.append(marks.cut)
    return text
