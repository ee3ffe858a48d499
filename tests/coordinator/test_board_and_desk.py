"""What researchers see: jobs taken in or refused, events replayed and followed, models handed out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.coordinator.local_federation import spec

from maskwork import job_events as events
from maskwork.coordinator import board as boards
from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.jobs import JobDesk
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.records import JobState
from maskwork.coordinator.store import Store
from maskwork.errors import StoreError, UserError
from maskwork.net.identity import IdentityError, IdentityProblem
from maskwork.net.status import Refusal, Refused, status_of
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire.codec import WireError

import grpc  # isort: skip

ROSA = "spiffe://ward/researcher/rosa"


class Office:
    def __init__(self, folder: Path) -> None:
        self.store = Store.open(f"sqlite:///{folder}/coordinator.sqlite")
        self.models = ModelStore(folder / "models")
        self.board = EventBoard()
        self.desk = JobDesk(
            store=self.store, models=self.models, board=self.board, max_model_bytes=10_000, clock=lambda: 5.0
        )
        self.folder = folder

    def model(self, value: float = 0.5) -> bytes:
        path = self.folder / "m.safetensors"
        write_model(path, Schema((TensorSpec("w", "F32", (3,)),)), np.full(3, value, np.float32), {})
        return path.read_bytes()

    async def submit(self, spec_json: bytes | None = None, model: bytes | None = None, size: int | None = None) -> str:
        data = self.model() if model is None else model
        chosen = spec().canonical_json() if spec_json is None else spec_json
        job = await self.desk.submit(chosen, len(data) if size is None else size, chunks(data), submitted_by=ROSA)
        return job.job_id


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for offset in range(0, len(data), 100):
        yield data[offset : offset + 100]


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    opened = Office(tmp_path)
    yield opened
    opened.store.close()


def stage(number: int, round_number: int = 1) -> events.StageOpened:
    return events.StageOpened("job-1", float(number), round_number, 1, events.STAGES[number], ())


def attempt(round_number: int = 1) -> events.AttemptOpened:
    return events.AttemptOpened("job-1", 0.0, round_number, 1, ("a", "b", "c"), 3, bytes(32))


# --- the board ------------------------------------------------------------------------------------------------------


async def test_who_comes_in_the_middle_sees_the_attempt_from_its_beginning() -> None:
    board = EventBoard()
    board.publish(events.Waiting("job-1", 0.0, "nobody", ()))
    board.publish(attempt(1))
    board.publish(stage(0))
    board.publish(attempt(2))
    board.publish(stage(1, 2))
    with board.subscribe("job-1") as subscription:
        board.publish(stage(2, 2))
        assert [await anext(subscription) for _ in range(3)] == [attempt(2), stage(1, 2), stage(2, 2)]
    with board.subscribe("job-2") as subscription:
        board.publish(stage(3))
        assert subscription._queue.empty()


async def test_one_that_does_not_keep_up_is_cut_off_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "WATCHER_LIMIT", 3)
    board = EventBoard()
    with board.subscribe("job-1") as slow, board.subscribe("job-1") as quick:
        for number in range(5):
            board.publish(stage(number))
            assert await anext(quick) == stage(number)
        assert [event async for event in slow] == [stage(0), stage(1), stage(2)]


async def test_an_ended_job_leaves_nothing_behind() -> None:
    board = EventBoard()
    board.publish(attempt())
    board.forget("job-1")
    with board.subscribe("job-1") as subscription:
        assert subscription._queue.empty()


async def test_a_board_that_closes_ends_every_watch_to_come_too() -> None:
    board = EventBoard()
    with board.subscribe("job-1") as before:
        board.publish(stage(0))
        board.close()
        assert [event async for event in before] == [stage(0)]
    with board.subscribe("job-1") as after:
        assert [event async for event in after] == [stage(0)]


# --- submissions ----------------------------------------------------------------------------------------------------


async def test_a_submitted_job_is_queued_with_its_model(office: Office) -> None:
    job_id = await office.submit()
    record = office.store.job(job_id)
    assert record is not None
    assert (record.state, record.submitted_by, record.submitted_at) == (JobState.QUEUED, ROSA, 5.0)
    assert office.models.path(record.initial_model).read_bytes() == office.model()
    assert office.desk.details(job_id).job == office.desk.list()[0]
    assert office.desk.model(job_id, 0) == office.models.file(record.initial_model)


async def test_two_submissions_are_two_jobs(office: Office) -> None:
    assert await office.submit() != await office.submit()


@pytest.mark.parametrize(
    ("spec_json", "says"),
    [
        (b"{", "Invalid JSON"),
        (b'{"name": "x", "task": "digits", "rounds": 0}', "rounds"),
        (b'{"name": "x", "task": "digits", "rounds": 1, "cohrt": {}}', "did you mean cohort"),
        (b'{"name": "x", "task": "digits", "rounds": 1, "cohort": {"wait": 1}}', "did you mean wait_s"),
        (b'{"name": "../x", "task": "digits", "rounds": 1}', "name"),
        (b'{"name": "x", "task": "digits", "rounds": 1, "metrics": {"loss": 1}}', "metrics"),
        (b"\xff", "not valid"),
    ],
)
async def test_a_spec_that_is_wrong_is_refused_with_the_key(office: Office, spec_json: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        await office.submit(spec_json)
    assert caught.value.refusal is Refusal.INVALID
    assert office.store.jobs() == ()


async def test_models_that_are_not_are_refused_and_not_kept_as_jobs(office: Office) -> None:
    whole = office.model()
    for data, size, says in [
        (whole, len(whole) + 1, "were announced"),
        (whole, len(whole) - 1, "more than the .* bytes that were announced"),
        (b"\x80\x04pickled", None, "not usable"),
        (whole[:-4] + np.float32(np.nan).tobytes(), None, "not usable"),
    ]:
        with pytest.raises(Refused, match=says) as caught:
            await office.submit(model=data, size=size)
        assert caught.value.refusal is Refusal.INVALID
    for size in (0, 10_001):
        with pytest.raises(Refused, match="1 to 10000 bytes") as caught:
            await office.submit(model=whole, size=size)
        assert caught.value.refusal is Refusal.TOO_MUCH
    assert office.store.jobs() == ()
    assert not [p for p in office.models.directory.iterdir() if p.name.startswith(".")]


async def test_what_is_not_there_is_said_to_be_not_there(office: Office) -> None:
    job_id = await office.submit()
    for asked in (lambda: office.desk.details("nothing"), lambda: office.desk.model("nothing", 0)):
        with pytest.raises(Refused, match="there is no job nothing") as caught:
            asked()
        assert caught.value.refusal is Refusal.NOT_FOUND
    with pytest.raises(Refused, match="no committed round 1"):
        office.desk.model(job_id, 1)
    with pytest.raises(Refused, match="there is no job nothing"):
        await anext(office.desk.watch("nothing"))


# --- watching -------------------------------------------------------------------------------------------------------


async def test_a_watch_ends_with_the_job(office: Office) -> None:
    job_id = await office.submit()
    watch = office.desk.watch(job_id)
    first = await anext(watch)
    assert isinstance(first, events.JobSummary)
    following = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    office.store.set_job_state(job_id, JobState.ABORTED, "by rosa")
    ended = events.JobSummary(job_id, 6.0, "job", "digits", "aborted", 1, 0, "by rosa")
    office.board.publish(ended)
    assert await following == ended
    assert [event async for event in watch] == []
    assert [
        e.state for e in [event async for event in office.desk.watch(job_id)] if isinstance(e, events.JobSummary)
    ] == ["aborted"]


async def test_a_watch_that_the_coordinator_ends_says_why(office: Office) -> None:
    job_id = await office.submit()
    watch = office.desk.watch(job_id)
    await anext(watch)
    office.board.close()
    with pytest.raises(Refused, match="the coordinator stops") as caught:
        await anext(watch)
    assert status_of(caught.value)[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_watch_that_falls_behind_is_told_so(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "WATCHER_LIMIT", 0)
    job_id = await office.submit()
    watch = office.desk.watch(job_id)
    await anext(watch)
    following = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0)
    office.board.publish(events.Waiting(job_id, 0.0, "for nobody", ()))
    with pytest.raises(Refused, match="too far behind") as caught:
        await following
    assert status_of(caught.value)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- statuses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "phrase"),
    [
        (Refused(Refusal.NOT_NOW, "not now"), grpc.StatusCode.FAILED_PRECONDITION, "not now"),
        (
            IdentityError(IdentityProblem.EXPIRED, "certificate 12:34 of /secret/path expired"),
            grpc.StatusCode.UNAUTHENTICATED,
            "certificate refused: expired",
        ),
        (WireError("field 3 of 7"), grpc.StatusCode.INVALID_ARGUMENT, "malformed message"),
        (
            StoreError("is full", file="/var/secret", remedy="…"),
            grpc.StatusCode.UNAVAILABLE,
            "the coordinator's storage is not available",
        ),
        (UserError("the job is wrong"), grpc.StatusCode.INVALID_ARGUMENT, "the job is wrong"),
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED, "no data for too long"),
        (KeyError("secret"), grpc.StatusCode.INTERNAL, "internal error"),
    ],
)
def test_every_error_has_a_status_and_a_phrase_that_gives_nothing_away(
    error: Exception, code: grpc.StatusCode, phrase: str
) -> None:
    assert status_of(error) == (code, phrase)
