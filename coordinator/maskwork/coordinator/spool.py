"""Uploads on their way in: one file each, written in order, with the offset from which to go on.

Bounded by construction: an upload has exactly the length that the plan gives, and only as many are admitted at a time
as there are slots (`UploadSlots`). A spool knows bytes and offsets; it does not authenticate, add up or decide.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from maskwork.coordinator.aggregation import SessionShape
from maskwork.secagg.keys import Segment


class UploadRefused(ValueError):
    """A chunk that does not continue the upload; the text is for our own log."""


class Spool:
    """One participant's upload in one session."""

    def __init__(self, path: Path, shape: SessionShape) -> None:
        self.path = path
        self._shape = shape
        self._received = 0
        self._file: BinaryIO | None = None

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

    def __enter__(self) -> Spool:
        """Open for writing. A stream that is still open belongs to a connection that is gone."""
        if self._file is not None:
            self._file.close()
        self._file = self.path.open("r+b" if self.path.exists() else "x+b", buffering=0)
        self._file.seek(self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, segment: Segment, offset: int, data: bytes) -> None:
        """Append a chunk.

        Raises:
            UploadRefused: it is empty, is not the next one, or goes beyond its segment.
        """
        if self._file is None:
            raise UploadRefused("the upload was taken over by a newer connection")
        base, length = (
            (0, self._shape.update_bytes)
            if segment is Segment.UPDATE
            else (self._shape.update_bytes, self._shape.statistics_bytes)
        )
        if base + offset != self._received:
            raise UploadRefused(f"a chunk at {segment.name} + {offset} where {self._received} bytes are here")
        if not data or offset + len(data) > length:
            raise UploadRefused(f"a chunk of {len(data)} bytes at {segment.name} + {offset} of {length}")
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._received += len(data)

    def discard(self) -> None:
        """Close and delete."""
        self.__exit__(None, None, None)
        self.path.unlink(missing_ok=True)


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
