"""Uploads on their way in: one file each, written in order, with the offset from which to go on.

Bounded by construction: an upload has exactly the length that the plan gives, and only as many are admitted at a time
as there are slots (`UploadSlots`). A spool knows bytes and offsets; it does not authenticate, add up or decide.
With an `UploadSeal` its file is encrypted, and what goes beyond the last whole chunk is in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from maskwork.coordinator.sealed import SealedWriter
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.vault import UPLOAD_CHUNK_BYTES, UploadSeal
from maskwork.secagg.keys import Segment


class UploadRefused(ValueError):
    """A chunk that does not continue the upload; the text is for our own log."""


class Spool:
    """One participant's upload in one session."""

    def __init__(self, path: Path, shape: SessionShape, seal: UploadSeal | None = None) -> None:
        self.path = path
        self.seal = seal
        self._sealing: SealedWriter | None = None
        self._shape = shape
        self._received = 0
        self._writer: SpoolWriter | None = None

    @property
    def received(self) -> int:
        """Bytes that are here, of both segments."""
        return self._received

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self._received == self._shape.upload_bytes

    @property
    def offsets(self) -> tuple[int, int]:
        """Where each segment goes on: (update, statistics)."""
        update = min(self._received, self._shape.update_bytes)
        return update, self._received - update

    @contextmanager
    def writing(self) -> Iterator[SpoolWriter]:
        """Open for one stream. Another stream that is still open belongs to a connection that is gone, and ends."""
        if self._writer is not None:
            self._writer.close()
        file = self.path.open("r+b" if self.path.exists() else "x+b", buffering=0)
        if self.seal is None:
            file.seek(self._received)
        elif self._sealing is None:
            self._sealing = SealedWriter(file, chunk_bytes=UPLOAD_CHUNK_BYTES)
        else:
            self._sealing.use(file)
        writer = self._writer = SpoolWriter(self, file)
        try:
            yield writer
        finally:
            writer.close()
            if self._writer is writer:
                self._writer = None

    def _continued(self, segment: Segment, offset: int, length: int) -> None:
        """Raise UploadRefused unless a chunk of this length at this place is the next one and within its segment."""
        base, room = (
            (0, self._shape.update_bytes)
            if segment is Segment.UPDATE
            else (self._shape.update_bytes, self._shape.statistics_bytes)
        )
        if base + offset != self._received:
            raise UploadRefused(f"a chunk at {segment.name} + {offset} where {self._received} bytes are here")
        if not length or offset + length > room:
            raise UploadRefused(f"a chunk of {length} bytes at {segment.name} + {offset} of {room}")

    def _append(self, file: BinaryIO, data: bytes) -> None:
        if self._sealing is None or self.seal is None:
            _write_plain(file, data, at=self._received)
        else:
            self._sealing.write(data)
            if self._received + len(data) == self._shape.upload_bytes:
                self._sealing.seal(self.seal.upload, self.seal.vault.keys.current)
        self._received += len(data)

    def discard(self) -> None:
        """Close and delete."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self.path.unlink(missing_ok=True)


class SpoolWriter:
    """One stream into a spool; of two, the newer one counts."""

    def __init__(self, spool: Spool, file: BinaryIO) -> None:
        self._spool = spool
        self._file = file

    @property
    def superseded(self) -> bool:
        """Whether a newer stream took over, or the session ended."""
        return self._spool._writer is not self

    def write(self, segment: Segment, offset: int, data: bytes) -> None:
        """Append a chunk.

        Raises:
            UploadRefused: it is empty, is not the next one, goes beyond its segment, or comes on an older stream.
            OSError: the disk failed.
        """
        if self.superseded:
            raise UploadRefused("the upload was taken over by a newer connection, or is not wanted any more")
        self._spool._continued(segment, offset, len(data))
        self._spool._append(self._file, data)

    def close(self) -> None:
        """End the stream."""
        self._file.close()


def _write_plain(file: BinaryIO, data: bytes, *, at: int) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError:
        file.seek(at)
        raise


class UploadSlots:
    """Who may upload now, and who waits: at most `limit` at a time, first come first served."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._granted: set[int] = set()
        self._waiting: OrderedDict[int, None] = OrderedDict()

    def ask(self, member: int) -> bool:
        """Whether `member` may start at once; otherwise it waits for `release`."""
        if member in self._granted or len(self._granted) < self.limit:
            self._waiting.pop(member, None)
            self._granted.add(member)
            return True
        self._waiting[member] = None
        return False

    def holds(self, member: int) -> bool:
        """Whether `member` may upload now."""
        return member in self._granted

    def release(self, member: int) -> int | None:
        """Give a slot or a place in the queue back; returns who gets the slot, if anyone."""
        self._waiting.pop(member, None)
        if member not in self._granted:
            return None
        self._granted.discard(member)
        if not self._waiting:
            return None
        following, _ = self._waiting.popitem(last=False)
        self._granted.add(following)
        return following
