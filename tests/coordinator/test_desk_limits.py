"""What one submitter may leave at the coordinator: unfinished jobs, and models for which there is room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.coordinator.local_federation import spec
from tests.fuzz import recordings

from maskwork.coordinator.board import EventBoard
from maskwork.coordinator.jobs import DISK_RESERVE_BYTES, JobDesk
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.records import JobState
from maskwork.coordinator.store import Store
from maskwork.net.status import Refusal, Refused

ROSA, RUTH = "spiffe://ward/researcher/rosa", "spiffe://ward/researcher/ruth"
MODEL = recordings.model_files()[0]


class Office:
    def __init__(self, folder: Path) -> None:
        self.store = Store.open(f"sqlite:///{folder}/coordinator.sqlite")
        self.models = ModelStore(folder / "models")
        self.free = 1 << 40
        self.desk = JobDesk(
            store=self.store,
            models=self.models,
            board=EventBoard(),
            max_model_bytes=1 << 40,
            max_unfinished_jobs=2,
            free_bytes=lambda _: self.free,
        )

    async def submit(self, by: str = ROSA, chunks: AsyncIterator[bytes] | None = None, size: int = len(MODEL)) -> str:
        chosen = in_one_piece() if chunks is None else chunks
        return (await self.desk.submit(spec().canonical_json(), size, chosen, submitted_by=by)).job_id

    async def refused(self, by: str = ROSA, size: int = len(MODEL)) -> str:
        with pytest.raises(Refused) as refused:
            await self.submit(by, size=size)
        assert refused.value.refusal is Refusal.TOO_MUCH
        return str(refused.value)


async def in_one_piece() -> AsyncIterator[bytes]:
    yield MODEL


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    opened = Office(tmp_path)
    yield opened
    opened.store.close()


async def test_a_submitter_has_so_many_unfinished_jobs_and_others_have_theirs(office: Office) -> None:
    first, _ = [await office.submit() for _ in range(2)]
    assert "2 jobs of yours have not ended" in await office.refused()
    await office.submit(RUTH)
    office.store.set_job_state(first, JobState.ABORTED, "by hand")
    await office.submit()


async def test_submissions_at_the_same_time_do_not_pass_the_limit_together(office: Office) -> None:
    results = await asyncio.gather(*(office.submit() for _ in range(5)), return_exceptions=True)
    assert sum(isinstance(result, str) for result in results) == 2
    assert all(isinstance(result, str | Refused) for result in results)


async def test_a_model_that_leaves_too_little_room_is_not_taken_in(office: Office) -> None:
    office.free = DISK_RESERVE_BYTES + len(MODEL) - 1
    with capture_logs() as logged:
        assert "no room" in await office.refused()
    assert [(line["free"], line["wanted"]) for line in logged] == [(office.free, office.free + 1)]
    assert not list(office.models.directory.iterdir())
    office.free += 1
    await office.submit()


async def test_what_others_are_sending_is_room_that_is_taken(office: Office) -> None:
    office.free = DISK_RESERVE_BYTES + 2 * len(MODEL) - 1
    go = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        await go.wait()
        yield MODEL

    slow = asyncio.create_task(office.submit(chunks=slowly()))
    await asyncio.sleep(0)
    assert "no room" in await office.refused(RUTH)
    go.set()
    await slow
    await office.submit(RUTH)


async def test_room_is_given_back_when_a_submission_fails(office: Office) -> None:
    office.free = DISK_RESERVE_BYTES + len(MODEL) + 1
    with pytest.raises(Refused, match="were announced"):
        await office.submit(size=len(MODEL) + 1)
    await office.submit()


async def test_a_model_that_is_refused_leaves_nothing_on_the_disk_and_tells_no_path(office: Office) -> None:
    nan = MODEL[:-4] + b"\xff\xff\xff\xff"

    async def spoilt() -> AsyncIterator[bytes]:
        yield nan

    with pytest.raises(Refused, match="NaN or infinity") as refused:
        await office.submit(chunks=spoilt())
    assert str(office.models.directory) not in str(refused.value)
    assert not list(office.models.directory.iterdir())
