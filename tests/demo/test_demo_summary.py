"""The figures, the verdict and the table, from invented rounds."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.jobs import scripted_events as make

from maskwork.job_events import STAGES
from maskwork.participant.demo.faults import Landed, Missed, Moment, Rejoined, Strike, Turn
from maskwork.participant.demo.masked_run import turn_text
from maskwork.participant.demo.summary import Accuracy, Summary, shortcomings, summarise, summary_table
from maskwork.participant.local.logs import event_of

EARLY = Strike(Moment.BEFORE_UPLOAD, "east", 2, 1)
LATE = Strike(Moment.BEFORE_UNMASKING, "west", 3, 1)
TURNS: tuple[Turn, ...] = (EARLY, Landed(EARLY), Rejoined(EARLY, 3), LATE, Landed(LATE), Rejoined(LATE, 4))
ROUNDS = [
    replace(
        make.committed(number, dropouts=("east",) if number == 2 else ()),
        seconds=float(number),
        stage_seconds=dict.fromkeys(STAGES, number / 10),
        uplink_bytes=(4 if number == 2 else 5) * 3300,
    )
    for number in (1, 2, 3, 4)
]


@pytest.fixture
def summary() -> Summary:
    return summarise(
        participants=5,
        rounds=4,
        committed=ROUNDS,
        turns=TURNS,
        accuracy=Accuracy(masked=0.951, plain=0.952, centralised=0.97),
        difference=1e-6,
        parameters=1000,
        model=Path("/somewhere/masked.safetensors"),
    )


def test_summary_json_has_exactly_the_promised_fields(summary: Summary, tmp_path: Path) -> None:
    summary.write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "participants": 5,
        "rounds": 4,
        "rounds_committed": 4,
        "dropouts_injected": 2,
        "dropouts_recovered": 2,
        "rejoined": 2,
        "accuracy": {"masked": 0.951, "plain": 0.952, "centralised": 0.97},
        "max_abs_difference_of_weights": 1e-6,
        "uplink_bytes_per_parameter": 3.3,
        "round_seconds_median": 2.5,
        "stage_seconds": dict.fromkeys(STAGES, 0.25),
        "model": "/somewhere/masked.safetensors",
    }


def verdict(summary: Summary, logs: Path, **exits: int) -> list[str]:
    return shortcomings(summary, planned=2, exits=exits, logs=logs)


def test_a_run_that_kept_everything(summary: Summary, tmp_path: Path) -> None:
    (tmp_path / "site-a.log").write_text('{"event": "participant stops"}\n')
    assert verdict(summary, tmp_path, coordinator=0) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds_committed": 3}, "1 of 4 rounds were not committed"),
        ({"dropouts_injected": 1, "rejoined": 1}, "only 1 of 2 sites could be killed"),
        ({"rejoined": 1}, "only 1 of 2 killed sites"),
        ({"accuracy": Accuracy(masked=0.95, plain=0.961, centralised=0.97)}, "differ by more than 1 point"),
        ({"accuracy": Accuracy(masked=0.961, plain=0.95, centralised=0.97)}, "differ by more than 1 point"),
    ],
)
def test_each_broken_promise_is_a_sentence(
    summary: Summary, tmp_path: Path, change: dict[str, int | Accuracy], said: str
) -> None:
    (sentence,) = verdict(replace(summary, **change), tmp_path)  # type: ignore[arg-type]  # one field each
    assert said in sentence


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_in_any_log(summary: Summary, tmp_path: Path, form: str) -> None:
    traceback = 'Traceback (most recent call last):\n  File "x.py", line 1'
    text = traceback if form == "text" else json.dumps({"event": "oops", "exception": traceback})
    (tmp_path / "coordinator.log").write_text("{}\n")
    (tmp_path / "site-b.log").write_text(f"{{}}\n{text}\n")
    (sentence,) = verdict(summary, tmp_path)
    assert "site-b.log holds a traceback" in sentence


def test_a_process_that_did_not_end_well(summary: Summary, tmp_path: Path) -> None:
    assert verdict(summary, tmp_path, coordinator=0, **{"site-a": -9, "site-b": 1}) == [
        "site-a was ended by SIGKILL when it was told to stop",
        "site-b ended with exit code 1 when it was told to stop",
    ]


def test_the_table_says_it_all_even_in_a_narrow_terminal(summary: Summary) -> None:
    for width in (60, 120):
        console = Console(file=io.StringIO(), width=width)
        console.print(summary_table(summary, TURNS))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
        for said in ("4 of 4", "95.10 %", "95.20 %", "97.00 %", "3.300 bytes", "2.50 s", "east in round 2", *STAGES):
            assert said in text
        assert max(map(len, text.splitlines())) <= width


def test_what_is_told_of_a_site() -> None:
    assert turn_text(EARLY).startswith("round 2: SIGKILL to east after it dealt its shares, before its upload")
    assert turn_text(Landed(LATE)) == "round 3: committed although west was killed"
    assert turn_text(Rejoined(LATE, 4)) == "round 4: west is back among the survivors"
    assert "too late" in turn_text(Missed(LATE, "too late"))


@pytest.mark.parametrize(
    ("line", "event"),
    [(b'{"event": "coordinator ready"}', "coordinator ready"), (b"no JSON", ""), (b"[1]", ""), (b'{"even', "")],
)
def test_events_in_a_log(line: bytes, event: str) -> None:
    assert event_of(line) == event
