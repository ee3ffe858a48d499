"""Uploads on their way in: what a chunk may be, who may write, and how many at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.spool import Spool, UploadRefused, UploadSlots
from maskwork.secagg.keys import Segment

SHAPE = SessionShape(parameters=10, ring_bits=12, statistics=2)  # 15 and 16 bytes
UPDATE, STATISTICS = bytes(range(15)), bytes(range(100, 116))


def test_an_upload_is_its_two_segments_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "u", SHAPE)
    with spool.writing() as writer:
        writer.write(Segment.UPDATE, 0, UPDATE[:7])
        assert spool.offsets == (7, 0)
        writer.write(Segment.UPDATE, 7, UPDATE[7:])
        before = spool.complete
        writer.write(Segment.STATISTICS, 0, STATISTICS[:8])
        assert spool.offsets == (15, 8)
        writer.write(Segment.STATISTICS, 8, STATISTICS[8:])
    assert (before, spool.complete) == (False, True)
    assert (tmp_path / "u").read_bytes() == UPDATE + STATISTICS


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 31), max_size=5))
def test_however_often_a_stream_breaks_the_bytes_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool") / "u", SHAPE)
    for end in [*sorted(cuts), 31]:
        with spool.writing() as writer:
            update, statistics = spool.offsets
            if UPDATE[update:end]:
                writer.write(Segment.UPDATE, update, UPDATE[update:end])
            if end > 15 and STATISTICS[statistics : end - 15]:
                writer.write(Segment.STATISTICS, statistics, STATISTICS[statistics : end - 15])
    assert spool.path.read_bytes() == UPDATE + STATISTICS


@pytest.mark.parametrize(
    ("segment", "offset", "data"),
    [
        (Segment.UPDATE, 4, b"x"),
        (Segment.UPDATE, 6, b"x"),
        (Segment.UPDATE, 5, b""),
        (Segment.UPDATE, 5, bytes(11)),
        (Segment.STATISTICS, 0, b"x"),
        (Segment.UPDATE, 2**63, b"x"),
    ],
)
def test_a_chunk_that_does_not_go_on_is_refused_and_changes_nothing(
    tmp_path: Path, segment: Segment, offset: int, data: bytes
) -> None:
    spool = Spool(tmp_path / "u", SHAPE)
    with spool.writing() as writer:
        writer.write(Segment.UPDATE, 0, UPDATE[:5])
        with pytest.raises(UploadRefused):
            writer.write(segment, offset, data)
    assert spool.received == 5
    assert spool.path.read_bytes() == UPDATE[:5]


def test_nothing_follows_a_whole_upload(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "u", SHAPE)
    with spool.writing() as writer:
        writer.write(Segment.UPDATE, 0, UPDATE)
        writer.write(Segment.STATISTICS, 0, STATISTICS)
        with pytest.raises(UploadRefused):
            writer.write(Segment.STATISTICS, 16, b"x")


def test_a_newer_stream_takes_over_and_the_older_one_cannot_end_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "u", SHAPE)
    older_context = spool.writing()
    older = older_context.__enter__()
    older.write(Segment.UPDATE, 0, UPDATE[:5])
    with spool.writing() as newer:
        assert older.superseded
        with pytest.raises(UploadRefused, match="newer connection"):
            older.write(Segment.UPDATE, 5, UPDATE[5:6])  # the right bytes, on the wrong stream
        older_context.__exit__(None, None, None)
        assert not newer.superseded
        newer.write(Segment.UPDATE, 5, UPDATE[5:])
        newer.write(Segment.STATISTICS, 0, STATISTICS)
    assert spool.complete


def test_a_discarded_spool_takes_no_more_bytes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "u", SHAPE)
    with spool.writing() as writer:
        writer.write(Segment.UPDATE, 0, UPDATE[:5])
        spool.discard()
        with pytest.raises(UploadRefused):
            writer.write(Segment.UPDATE, 5, UPDATE[5:])
    assert not spool.path.exists()
    spool.discard()


def test_a_disk_that_fails_leaves_the_offset_where_it_was(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "u", SHAPE)

    class FullAfterTwoBytes:
        def __init__(self, file: object) -> None:
            self.file, self.left = file, 2

        def write(self, data: memoryview) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            written: int = self.file.write(data[: self.left])  # type: ignore[attr-defined]
            self.left -= written
            return written

        def seek(self, offset: int) -> None:
            self.file.seek(offset)  # type: ignore[attr-defined]

        def close(self) -> None:
            self.file.close()  # type: ignore[attr-defined]

    with spool.writing() as writer:
        whole = writer._file
        writer._file = FullAfterTwoBytes(whole)  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space"):
            writer.write(Segment.UPDATE, 0, UPDATE[:5])
        assert spool.received == 0
        writer._file = whole
        writer.write(Segment.UPDATE, 0, UPDATE)
    assert spool.path.read_bytes() == UPDATE


# --- slots ----------------------------------------------------------------------------------------------------------


def test_slots_go_to_those_who_asked_first() -> None:
    slots = UploadSlots(2)
    assert [slots.ask(m) for m in (5, 6, 7, 8)] == [True, True, False, False]
    assert slots.ask(5)  # asked again: it has one
    assert not slots.ask(7)
    assert slots.release(6) == 7
    assert slots.holds(7)
    assert not slots.holds(6)
    assert slots.release(8) is None  # it gives up waiting
    assert slots.release(5) is None
    assert slots.ask(9)


def test_a_member_that_asks_again_after_its_slot_went_waits_at_the_end() -> None:
    slots = UploadSlots(1)
    slots.ask(1)
    slots.ask(2)
    assert slots.release(1) == 2
    assert not slots.ask(1)
    assert slots.release(2) == 1


@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 3),
    moves=st.lists(st.tuples(st.sampled_from(["ask", "release"]), st.integers(0, 5)), max_size=60),
)
def test_never_more_than_the_limit_and_never_a_slot_idle_while_somebody_waits(
    limit: int, moves: list[tuple[str, int]]
) -> None:
    slots, waiting = UploadSlots(limit), set[int]()
    for move, member in moves:
        if move == "ask":
            if slots.ask(member):
                waiting.discard(member)
            else:
                waiting.add(member)
        else:
            waiting.discard(member)
            following = slots.release(member)
            if following is not None:
                assert following in waiting
                waiting.discard(following)
        held = {m for m in range(6) if slots.holds(m)}
        assert len(held) <= limit
        assert not held & waiting
        assert not (waiting and len(held) < limit)
