"""The format of what is encrypted at rest: what goes in comes out, and whatever somebody does to a file is noticed.

Attacks on the disk: a flipped bit anywhere, chunks swapped, repeated, dropped or taken from another file, a file cut or
made longer, one file under another's name, and one of another kind or federation. What is not noticed, and said in
`sealed`: an older file of the very same name in the place of a newer one.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskwork.coordinator import sealed
from maskwork.coordinator.sealed import (
    HEADER_BYTES,
    Binding,
    MasterKey,
    MasterKeys,
    NotSealed,
    SealDamaged,
    SealedWriter,
    WrongKey,
)

CHUNK = 4096
FIRST, SECOND, THIRD = (MasterKey(hashlib.sha256(bytes([i])).digest()) for i in range(3))
KEYS = MasterKeys(FIRST)
MODEL = Binding("model", "ward", b"\x01" * 32)
CONTENT = hashlib.shake_256(b"content").digest(3 * CHUNK + 100)


def seal(path: Path, content: bytes = CONTENT, binding: Binding = MODEL, key: MasterKey = FIRST) -> Path:
    with path.open("x+b", buffering=0) as file:
        writer = SealedWriter(file, chunk_bytes=CHUNK)
        writer.write(content)
        writer.seal(binding, key)
    return path


def read(path: Path, binding: Binding = MODEL, keys: MasterKeys = KEYS) -> bytes:
    with sealed.open_sealed(path, binding, keys) as file:
        content = file.read()
        file.check_end()
    return content


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return seal(tmp_path / "sealed")


# --- what goes in comes out -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.integers(0, 3 * CHUNK), st.sampled_from([0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK])),
    cuts=st.lists(st.integers(1, 2 * CHUNK), max_size=6),
    at=st.integers(0, 3 * CHUNK),
)
def test_any_content_written_in_any_pieces_is_read_from_any_place(
    tmp_path: Path, size: int, cuts: list[int], at: int
) -> None:
    content, file = CONTENT[:size], tmp_path / os.urandom(8).hex()
    with file.open("x+b", buffering=0) as opened:
        writer = SealedWriter(opened, chunk_bytes=CHUNK)
        rest = io.BytesIO(content)
        for cut in cuts:
            writer.write(rest.read(cut))
        writer.write(rest.read())
        assert writer.size == size
        writer.seal(MODEL, FIRST)
    assert read(file) == content
    with sealed.open_sealed(file, MODEL, KEYS) as reader:
        assert reader.size == size
        reader.seek(at)
        assert reader.read(CHUNK + 1) == content[at : at + CHUNK + 1]
        assert reader.seek(0, os.SEEK_END) == size
        assert reader.read() == b""


def test_nothing_of_the_content_and_no_key_is_in_the_file(path: Path) -> None:
    raw = path.read_bytes()
    windows = {CONTENT[at : at + 8] for at in range(len(CONTENT) - 8)}
    assert not any(raw[at : at + 8] in windows for at in range(len(raw) - 8))
    assert FIRST.raw not in raw


def test_the_same_content_is_sealed_differently_each_time(tmp_path: Path) -> None:
    one, other = seal(tmp_path / "one"), seal(tmp_path / "other")
    assert one.read_bytes()[HEADER_BYTES:][:64] != other.read_bytes()[HEADER_BYTES:][:64]


def test_a_content_can_be_judged_before_it_has_a_name(tmp_path: Path) -> None:
    with (tmp_path / "f").open("x+b", buffering=0) as file:
        writer = SealedWriter(file, chunk_bytes=CHUNK)
        writer.write(CONTENT)
        with (tmp_path / "f").open("rb") as early, pytest.raises(RuntimeError, match="not finished"):
            writer.reader(early)
        writer.finish()
        with writer.reader((tmp_path / "f").open("rb")) as reader:
            assert reader.read() == CONTENT
        with pytest.raises(RuntimeError, match="nothing more"):
            writer.write(b"more")
        writer.seal(MODEL, FIRST)
    assert read(tmp_path / "f") == CONTENT


def test_a_file_that_was_never_finished_does_not_open(tmp_path: Path) -> None:
    with (tmp_path / "f").open("x+b", buffering=0) as file:
        SealedWriter(file, chunk_bytes=CHUNK).write(CONTENT)
    with pytest.raises(SealDamaged, match="never finished"):
        read(tmp_path / "f")


def test_after_a_write_that_failed_nothing_more_is_written_under_that_nonce(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        full = False

        def write(self, data: object, /) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(data)  # type: ignore[arg-type]  # whatever BytesIO takes

    disk = Full()
    writer = SealedWriter(disk, chunk_bytes=CHUNK)
    disk.full = True
    with pytest.raises(OSError, match="No space"):
        writer.write(bytes(2 * CHUNK))
    disk.full = False
    for more in (lambda: writer.write(b"x" * 2 * CHUNK), writer.finish):
        with pytest.raises(OSError, match="earlier write"):
            more()


# --- attacks --------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_that_counts_is_noticed(path: Path) -> None:
    """In the header: magic, chunk size and the wrap that opens. In the body: everything."""
    whole = path.read_bytes()
    header = [*range(20), *range(64, 64 + 96)]
    body = [*range(HEADER_BYTES, HEADER_BYTES + 40), *range(HEADER_BYTES, len(whole), 97), len(whole) - 1]
    for at in (*header, *body):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises((SealDamaged, WrongKey, NotSealed)):
            read(path)
    path.write_bytes(whole)
    assert read(path) == CONTENT


def chunks(path: Path) -> tuple[bytes, list[bytes]]:
    raw, step = path.read_bytes(), CHUNK + 16
    return raw[:HEADER_BYTES], [raw[at : at + step] for at in range(HEADER_BYTES, len(raw), step)]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [c[1], c[0], *c[2:]],
        lambda c: [c[0], c[0], *c[2:]],
        lambda c: [*c[:2], c[1], c[3]],
        lambda c: c[:-1],
        lambda c: c[1:],
        lambda c: c[:1],
        lambda c: [],
        lambda c: [*c, c[-1]],
        lambda c: [*c[:-1], c[-1][:-1]],
        lambda c: [*c, b"\0"],
    ],
    ids=["swapped", "repeated", "replaced", "cut", "headless", "first", "none", "longer", "shorter", "byte"],
)
def test_chunks_stay_in_their_places(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    header, kept = chunks(path)
    path.write_bytes(header + b"".join(change(kept)))
    with pytest.raises(SealDamaged, match=r"damaged|were sealed"):
        read(path)


def test_a_file_cut_between_two_chunks_is_refused_before_anything_of_it_is_read(path: Path) -> None:
    header, kept = chunks(path)
    path.write_bytes(header + b"".join(kept[:2]))
    with pytest.raises(SealDamaged, match=r"bytes where .* were sealed"):
        sealed.open_sealed(path, MODEL, KEYS)


def test_a_chunk_of_another_file_is_refused_even_in_its_own_place(path: Path, tmp_path: Path) -> None:
    header, kept = chunks(path)
    _, others = chunks(seal(tmp_path / "other"))
    path.write_bytes(header + b"".join([kept[0], others[1], *kept[2:]]))
    with pytest.raises(SealDamaged, match="chunk 1"):
        read(path)


def test_a_shorter_file_made_of_the_chunks_of_a_longer_one_is_refused(tmp_path: Path) -> None:
    """Same length in bytes, same place, same key: only the flag of the last chunk tells."""
    path = seal(tmp_path / "f", CONTENT[: 2 * CHUNK])
    with path.open("r+b", buffering=0) as file:
        writer = SealedWriter(file, chunk_bytes=CHUNK)
        writer.write(CONTENT)  # chunks 0 to 2, none of them the last
        file.truncate(HEADER_BYTES + 2 * (CHUNK + 16))
        reader = sealed.SealedReader(path.open("rb"), writer._key, 2 * CHUNK, CHUNK)
    with reader, pytest.raises(SealDamaged, match="chunk 1"):
        reader.read()


@pytest.mark.parametrize(
    "claimed",
    [
        Binding("model", "ward", b"\x02" * 32),
        Binding("accumulator", "ward", b"\x01" * 32),
        Binding("model", "clinic", b"\x01" * 32),
        Binding("modelw", "ard", b"\x01" * 32),
    ],
    ids=["name", "kind", "federation", "boundary"],
)
def test_a_file_opens_as_nothing_else(path: Path, claimed: Binding) -> None:
    with pytest.raises(SealDamaged, match=f"is not the {claimed.kind}"):
        read(path, claimed)
    value = sealed.seal_value(b"secret", MODEL, FIRST)
    assert sealed.open_value(value, MODEL, KEYS, where="here") == b"secret"
    with pytest.raises(SealDamaged, match=r"here: holds a .* record that was changed"):
        sealed.open_value(value, claimed, KEYS, where="here")


def test_a_header_does_not_open_another_files_body(path: Path, tmp_path: Path) -> None:
    other = seal(tmp_path / "other")
    path.write_bytes(path.read_bytes()[:HEADER_BYTES] + other.read_bytes()[HEADER_BYTES:])
    with pytest.raises(SealDamaged, match="chunk 0"):
        read(path)


def test_a_plain_file_is_not_taken_for_a_sealed_one(path: Path) -> None:
    path.write_bytes(CONTENT)
    assert not sealed.is_sealed(path)
    with pytest.raises(NotSealed, match="is not encrypted"):
        read(path)
    with pytest.raises(NotSealed, match="not encrypted"):
        sealed.open_value(b"plain", MODEL, KEYS, where="here")


def test_another_key_is_told_by_its_id_and_shown_in_no_other_way(path: Path) -> None:
    with pytest.raises(WrongKey, match=f"with the key {FIRST.id.hex()}.*gives {SECOND.id.hex()}") as caught:
        read(path, keys=MasterKeys(SECOND))
    for secret in (FIRST.raw, SECOND.raw):
        assert secret.hex() not in f"{caught.value!r} {caught.value}"
        assert secret.hex() not in repr(MasterKeys(FIRST, SECOND))
        assert repr(secret)[2:-1] not in repr(MasterKeys(FIRST, SECOND))
    with pytest.raises(WrongKey, match=FIRST.id.hex()):
        sealed.open_value(sealed.seal_value(b"", MODEL, FIRST), MODEL, MasterKeys(SECOND), where="here")


def test_a_key_that_claims_the_id_of_another_opens_nothing(path: Path) -> None:
    """The id only says which key to try; what opens is the key."""
    raw = bytearray(path.read_bytes())
    raw[64:72] = SECOND.id
    path.write_bytes(raw)
    with pytest.raises(SealDamaged, match="is not the model"):
        read(path, keys=MasterKeys(SECOND))


# --- rotation -------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here."""


class CrashingDisk:
    """Counts what is made durable, and ends the process at one of them, or right after."""

    def __init__(self, survives: int) -> None:
        self.left = survives

    def __call__(self, path: Path) -> None:
        if self.left == 0:
            raise Crash
        self.left -= 1


def no_crash(_: Path) -> None:
    pass


def test_after_a_rotation_the_new_key_opens_and_the_old_one_does_not(path: Path) -> None:
    body = path.read_bytes()[HEADER_BYTES:]
    assert sealed.rewrap(path, MODEL, MasterKeys(SECOND, FIRST), fsync=no_crash)
    assert read(path, keys=MasterKeys(SECOND)) == CONTENT
    with pytest.raises(WrongKey, match=SECOND.id.hex()):
        read(path)
    assert path.read_bytes()[HEADER_BYTES:] == body  # only the key was wrapped anew
    assert not sealed.rewrap(path, MODEL, MasterKeys(SECOND, FIRST), fsync=no_crash)
    assert sealed.rewrap(path, MODEL, MasterKeys(THIRD, SECOND), fsync=no_crash)
    assert read(path, keys=MasterKeys(THIRD)) == CONTENT


@pytest.mark.parametrize("survives", range(2))
def test_a_rotation_that_is_killed_leaves_a_file_that_opens_and_is_repeated(path: Path, survives: int) -> None:
    both = MasterKeys(SECOND, FIRST)
    with pytest.raises(Crash):
        sealed.rewrap(path, MODEL, both, fsync=CrashingDisk(survives))
    assert read(path, keys=both) == CONTENT
    sealed.rewrap(path, MODEL, both, fsync=no_crash)
    assert read(path, keys=MasterKeys(SECOND)) == CONTENT
    with pytest.raises(WrongKey):
        read(path, keys=MasterKeys(FIRST))


@pytest.mark.parametrize("torn", [1, 8, 50, 95])
def test_a_slot_that_was_torn_by_a_power_cut_does_no_harm(path: Path, torn: int) -> None:
    """What is on the disk of a slot that was being written when the power went is any part of it."""
    before, both = path.read_bytes(), MasterKeys(SECOND, FIRST)
    with pytest.raises(Crash):
        sealed.rewrap(path, MODEL, both, fsync=CrashingDisk(0))
    written = path.read_bytes()[512 : 512 + torn]
    path.write_bytes(before[:512] + written + before[512 + torn :])
    assert read(path, keys=both) == CONTENT
    sealed.rewrap(path, MODEL, both, fsync=no_crash)
    assert read(path, keys=MasterKeys(SECOND)) == CONTENT


def test_the_free_slot_is_durable_before_the_other_is_cleared(path: Path) -> None:
    """Order of the two writes, seen at the moments at which the disk is asked to keep them."""
    seen: list[tuple[bytes, ...]] = []
    sealed.rewrap(path, MODEL, MasterKeys(SECOND, FIRST), fsync=lambda p: seen.append(sealed.key_ids(p)))
    assert seen == [(FIRST.id, SECOND.id), (SECOND.id,)]


def test_a_rotation_without_the_old_key_changes_nothing(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(WrongKey):
        sealed.rewrap(path, MODEL, MasterKeys(SECOND, THIRD), fsync=no_crash)
    assert path.read_bytes() == before


def test_a_key_has_32_bytes() -> None:
    for raw in (b"", b"x" * 31, b"x" * 33):
        with pytest.raises(ValueError, match="32 bytes"):
            MasterKey(raw)
