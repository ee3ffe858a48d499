"""The file: what a crash in the middle of a write leaves, at every byte; what is damage; what is durable when."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.audit.recorded import recorded, reopened
from tests.simulation.identities import COORDINATOR_CERTIFICATE, COORDINATOR_SIGNER, FEDERATION, ROOTS

from maskwork.audit import chain
from maskwork.audit.lines import decode_line
from maskwork.audit.log import AuditLog, read_lines
from maskwork.audit.records import Certificate, JobEnded, Opened, Service
from maskwork.audit.verify import verify_chain
from maskwork.errors import StorageUnavailable, StoreError

LOG = recorded().coordinator
NOW = 1_800_000_000.0
OPENED: list[AuditLog] = []
some = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def a_log(path: Path, fsync: Callable[[int], None] = lambda _: None) -> AuditLog:
    log = AuditLog.open(path, FEDERATION, COORDINATOR_SIGNER, fsync=fsync)
    OPENED.append(log)
    return log


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def started(path: Path, fsync: Callable[[int], None] = lambda _: None) -> AuditLog:
    log = a_log(path, fsync)
    log.append([Opened(federation=FEDERATION, certificate=COORDINATOR_CERTIFICATE)], at=NOW)
    return log


def test_what_is_appended_verifies_and_is_there_after_a_restart(tmp_path: Path) -> None:
    log = started(tmp_path / "log")
    log.append([Service(event="started"), JobEnded(job="job", state="failed")], at=NOW)
    size, head, signed = log.size, log.head, log.signed
    log.close()
    chained = verify_chain(read_lines(tmp_path / "log"), ROOTS)
    assert chained.problems == []
    assert chained.heads[-1] == head
    again = a_log(tmp_path / "log")
    assert (again.size, again.head, again.signed) == (size, head, signed)
    assert again.digests(0, size) == b"".join(entry.digest for entry in chained.entries)
    assert chain.fold(chain.EMPTY_HEAD, 0, again.digests(0, size)) == head
    assert again.read(0, again.length) == (tmp_path / "log").read_bytes()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


@some
@given(whole=st.integers(min_value=0, max_value=len(LOG) - 1), data=st.data())
def test_killed_at_any_byte_of_a_line_only_that_line_is_lost(whole: int, data: st.DataObject, tmp_path: Path) -> None:
    """Of a line of which any number of bytes but the last were written nothing remains; all before it do."""
    part = data.draw(st.integers(min_value=1, max_value=len(LOG[whole]) - 1))
    log = reopened(tmp_path, [*LOG[:whole], LOG[whole][:part]])
    assert (log.size, log.dropped) == (whole, part)
    log.append([Service(event="after the crash")], at=NOW)
    log.close()
    lines = list(read_lines(tmp_path / "audit.log"))
    assert lines[:whole] == list(LOG[:whole])
    assert len(lines) == whole + 1
    if whole:
        assert verify_chain(lines, ROOTS).problems == []


@some
@given(place=st.integers(min_value=0, max_value=len(LOG) - 2), data=st.data())
def test_anything_else_is_an_error_that_names_the_record(place: int, data: st.DataObject, tmp_path: Path) -> None:
    """Damage in the middle, and the file is left as it is."""
    line = bytearray(LOG[place])
    record_at = 86  # after the opening and the head
    line[data.draw(st.integers(min_value=record_at, max_value=len(line) - 140))] ^= 1
    lines = [*LOG[:place], bytes(line), *LOG[place + 1 :]]
    with pytest.raises(StoreError, match=rf"record {place}\b"):
        reopened(tmp_path, lines)
    assert (tmp_path / "audit.log").read_bytes() == b"".join(lines)


def test_records_that_were_removed_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"record 4 \(certificate\) does not follow"):
        reopened(tmp_path, [*LOG[:4], *LOG[5:]])


def test_a_record_that_may_be_there_once_is_there_once(tmp_path: Path) -> None:
    log = started(tmp_path / "log")
    ended = JobEnded(job="job", state="failed")
    log.append([ended, ended], at=NOW)
    log.append([ended, JobEnded(job="job", state="completed")], at=NOW + 1)
    log.close()
    again = a_log(tmp_path / "log")
    again.append([ended, Opened(federation=FEDERATION, certificate=b"")], at=NOW + 2)
    assert again.size == 2
    assert again.has(("job-ended", "job"))


def test_append_makes_durable_before_it_returns_unless_told_otherwise(tmp_path: Path) -> None:
    synced: list[int] = []
    log = started(tmp_path / "log", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    before = len(synced)
    log.append([Service(event="a")], at=NOW, durable=False)
    assert len(synced) == before
    log.append([Service(event="b")], at=NOW)
    assert synced[-1] == log.length
    log.append([], at=NOW)
    assert len(synced) == before + 1


def test_a_new_log_has_its_name_on_the_disk(tmp_path: Path) -> None:
    synced: list[bool] = []
    started(tmp_path / "log", lambda descriptor: synced.append(os.path.isdir(f"/proc/self/fd/{descriptor}")))
    assert True in synced


class FullDisk:
    """A file that takes so many bytes of a write and then fails, as a full disk does."""

    def __init__(self, log: AuditLog, takes: int) -> None:
        assert log._file is not None
        self._file, self._takes = log._file, takes

    def write(self, data: memoryview) -> int:
        if self._takes <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._file.write(data[: self._takes])
        self._takes -= written
        return written

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


@pytest.mark.parametrize("takes", [0, 1, 200, 500])
def test_a_full_disk_leaves_the_log_as_it_was(takes: int, tmp_path: Path) -> None:
    log = started(tmp_path / "log")
    before, head = (tmp_path / "log").read_bytes(), log.head
    file = log._file
    log._file = FullDisk(log, takes)  # type: ignore[assignment]  # a port that has no name of its own
    with pytest.raises(StorageUnavailable, match="disk is full") as caught:
        log.append([Service(event="a"), Service(event="b")], at=NOW)
    assert caught.value.file == str(tmp_path / "log"), "not the number of a descriptor"
    assert (tmp_path / "log").read_bytes() == before
    assert (log.size, log.head) == (1, head)
    log._file = file
    log.append([Service(event="c")], at=NOW)
    log.close()
    assert verify_chain(read_lines(tmp_path / "log"), ROOTS).problems == []


def test_a_disk_that_does_not_sync_is_an_error(tmp_path: Path) -> None:
    log = started(tmp_path / "log")

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    log._fsync = fails
    with pytest.raises(StoreError, match="Input/output error") as caught:
        log.append([Service(event="a")], at=NOW)
    assert caught.value.file == str(tmp_path / "log")
    log._fsync = lambda _: None


def test_one_process_writes_a_log(tmp_path: Path) -> None:
    log = started(tmp_path / "log")
    with pytest.raises(StoreError, match="written by another process"):
        a_log(tmp_path / "log")
    log.close()
    log.close()
    a_log(tmp_path / "log").close()


def test_every_kind_of_record_comes_back_as_it_was() -> None:
    for line in (*LOG, *recorded().sites["site-5"]):
        entry = decode_line(line)
        assert type(entry.record).model_validate(entry.record.model_dump(mode="json")) == entry.record


def test_a_number_that_is_none_is_not_written() -> None:
    with pytest.raises(ValueError, match="finite"):
        recorded().entries[recorded().index_of("committed")].record.__class__.model_validate(
            {
                **recorded().entries[recorded().index_of("committed")].record.model_dump(),
                "statistics": {"train.loss": float("nan")},
            }
        )


def test_a_certificate_has_the_fingerprint_as_its_key() -> None:
    one = Certificate(certificate=b"x", fingerprint=bytes(32))
    assert one.key == ("certificate", "00" * 32)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20), st.integers(min_value=0, max_value=20))
def test_folding_in_two_parts_is_folding_at_once(digests: list[bytes], cut: int) -> None:
    cut = min(cut, len(digests))
    first = chain.fold(chain.EMPTY_HEAD, 0, b"".join(digests[:cut]))
    assert chain.fold(first, cut, b"".join(digests[cut:])) == chain.fold(chain.EMPTY_HEAD, 0, b"".join(digests))


@given(st.binary(min_size=32, max_size=32), st.integers(min_value=0, max_value=2**40))
def test_a_head_stands_for_its_place(digest: bytes, index: int) -> None:
    assert chain.next_head(chain.EMPTY_HEAD, index, digest) != chain.next_head(chain.EMPTY_HEAD, index + 1, digest)


def test_digests_that_are_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        chain.fold(chain.EMPTY_HEAD, 0, bytes(33))


def test_a_signed_head_is_of_one_federation_size_and_head() -> None:
    key = ROOTS.verify(COORDINATOR_CERTIFICATE, now=NOW).public_key
    signed = chain.sign_head(COORDINATOR_SIGNER, FEDERATION, 7, bytes(32))
    assert chain.is_signed_by(signed, FEDERATION, key)
    assert not chain.is_signed_by(signed, "elsewhere", key)
    assert not chain.is_signed_by(chain.SignedHead(8, signed.head, signed.signature), FEDERATION, key)
    assert not chain.is_signed_by(chain.SignedHead(7, bytes(31) + b"\1", signed.signature), FEDERATION, key)
