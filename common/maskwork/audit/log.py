"""A log as a file: append, make durable, find again after a crash. One writer.

A line is in the log once it is whole. Killed in the middle of one, the next start drops that incomplete last line and
says so; whatever else is wrong with the file is an error that names the record, and nothing is written to it.

It signs what it appends with the owner's key and checks the chain, not signatures, when it is opened: those are
`verify`'s. It keeps every record's digest in memory, 32 bytes each, since sites ask for those they have not seen.

Rule: `append` makes durable before it returns, unless it is told that nothing depends on it yet; then `sync` does.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from maskwork.audit import chain
from maskwork.audit.chain import DIGEST_BYTES, EMPTY_HEAD, SignedHead
from maskwork.audit.lines import Entry, LineError, decode_line, encode_line, record_bytes
from maskwork.audit.records import Record
from maskwork.errors import StoreError
from maskwork.secagg.keys import Signer

MAX_LINE_BYTES = 64 << 20
"""Longest line that is read: a plan for 20,000 sites takes 2 MB, their signatures 5 MB. A longer one is no record."""
_RESTORE = "Keep the file as it is, for whoever looks into it, and restore one from a backup."


class AuditLog:
    """One owner's log. Use `AuditLog.open` for a file or `AuditLog.in_memory`, and `close` it.

    Attributes:
        federation: what every head is signed for.
        name: the file, for people.
        dropped: bytes of an incomplete last line that opening found and dropped.
    """

    def __init__(
        self,
        federation: str,
        signer: Signer,
        *,
        file: BinaryIO | None,
        name: str = "the audit log",
        fsync: Callable[[int], None],
    ) -> None:
        self.federation = federation
        self.name = name
        self.dropped = 0
        self._signer = signer
        self._file = file
        self._fsync = fsync
        self._head = EMPTY_HEAD
        self._signature = b""
        self._digests = bytearray()
        self._keys: set[tuple[str, ...]] = set()
        self._length = 0
        self._durable = True
        self._writing = threading.Lock()

    @classmethod
    def open(
        cls,
        path: Path,
        federation: str,
        signer: Signer,
        *,
        fsync: Callable[[int], None] = os.fsync,
        look: Callable[[Entry], None] = lambda entry: None,
    ) -> AuditLog:
        """Open the log at `path`, creating it if it is missing.

        Args:
            path: the file; its directory exists.
            federation: whose heads are signed.
            signer: the owner's certificate key.
            fsync: makes a descriptor's bytes durable.
            look: is shown every record that is there, in order.

        Raises:
            StoreError: it cannot be read or written, another process has it, or a record in it is damaged.
        """
        try:
            new = not path.exists()
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
        except OSError as error:
            raise StoreError.from_cause(error, file=path) from error
        log = cls(federation, signer, file=file, name=str(path), fsync=fsync)
        try:
            _lock(file, path)
            log._read(path, look)
            if new:
                _sync_directory(path.parent, fsync)
        except BaseException:
            file.close()
            raise
        return log

    @classmethod
    def in_memory(cls, federation: str, signer: Signer) -> AuditLog:
        """A log that ends with its process; for tests and demonstrations."""
        return cls(federation, signer, file=None, fsync=lambda _: None)

    def close(self) -> None:
        """Make durable what is not, and let another process have the file. Calling it again does nothing."""
        if self._file is not None and not self._file.closed:
            self.sync()
            self._file.close()

    @property
    def size(self) -> int:
        """How many records there are."""
        return len(self._digests) // DIGEST_BYTES

    @property
    def length(self) -> int:
        """Bytes of whole lines."""
        return self._length

    @property
    def head(self) -> bytes:
        """The head after the last record."""
        return self._head

    @property
    def signed(self) -> SignedHead:
        """The head after the last record, as the last line signs it; without a signature while there is no record."""
        return SignedHead(self.size, self._head, self._signature)

    def has(self, key: tuple[str, ...]) -> bool:
        """Whether there is a record with this key."""
        return key in self._keys

    def keys(self, kind: str) -> frozenset[tuple[str, ...]]:
        """The keys of every record of a kind."""
        return frozenset(key for key in self._keys if key[0] == kind)

    def digests(self, since: int, until: int) -> bytes:
        """The digests of records `since` to `until` - 1, one after the other."""
        return bytes(self._digests[since * DIGEST_BYTES : until * DIGEST_BYTES])

    def sign_with(self, signer: Signer) -> None:
        """Sign with another key of the owner's from the next record on, which must be the one that says so."""
        self._signer = signer

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, for whoever is shown the log.

        Raises:
            StoreError: it cannot be read.
        """
        if self._file is None:
            raise StoreError("is in memory only", file=self.name, remedy="Give the service a state directory.")
        try:
            return os.pread(self._file.fileno(), length, offset)
        except OSError as error:
            raise StoreError.from_cause(error, file=self.name) from error

    def append(self, records: Sequence[Record], *, at: float, durable: bool = True) -> None:
        """Add records; one whose key is there already is left out.

        Args:
            records: in order.
            at: Unix time, seconds.
            durable: whether they are to be on the disk when this returns.

        Raises:
            StoreError: they cannot be written; none of them is in the log then.
        """
        with self._writing:
            head, size, lines, digests = self._head, self.size, bytearray(), bytearray()
            signed, fresh = SignedHead(size, head, self._signature), set[tuple[str, ...]]()
            for record in records:
                if record.key is not None:
                    if record.key in self._keys or record.key in fresh:
                        continue
                    fresh.add(record.key)
                data = record_bytes(record, index=size, at=at)
                digest = chain.record_digest(data)
                head = chain.next_head(head, size, digest)
                size += 1
                signed = chain.sign_head(self._signer, self.federation, size, head)
                lines += encode_line(data, signed)
                digests += digest
            if lines:
                self._write(bytes(lines))
                self._head, self._signature = head, signed.signature
                self._digests += digests
                self._keys |= fresh
                self._length += len(lines)
                self._durable = False
        if durable:
            self.sync()

    def sync(self) -> None:
        """Make every record durable.

        Raises:
            StoreError: the disk does not take them.
        """
        if self._durable or self._file is None:
            return
        try:
            self._fsync(self._file.fileno())
        except OSError as error:
            raise StoreError.from_cause(error, file=self.name) from error
        self._durable = True

    def _write(self, lines: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.seek(self._length)
            left = memoryview(lines)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):  # else an incomplete line is left, or whole records that nothing refers to
                self._file.truncate(self._length)
            raise StoreError.from_cause(error, file=self.name) from error

    def _read(self, path: Path, look: Callable[[Entry], None]) -> None:
        assert self._file is not None
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as reading:
            for line in reading:
                if not line.endswith(b"\n"):
                    self.dropped = len(line)
                    break
                self._take(line, path, look)
        if self.dropped:
            try:
                self._file.truncate(self._length)
                self._fsync(self._file.fileno())
            except OSError as error:
                raise StoreError.from_cause(error, file=path) from error

    def _take(self, line: bytes, path: Path, look: Callable[[Entry], None]) -> None:
        index = self.size
        try:
            entry = decode_line(line)
        except LineError as error:
            raise StoreError(f"record {index} is damaged: {error}", file=path, remedy=_RESTORE) from None
        head = chain.next_head(self._head, index, entry.digest)
        if entry.index != index or entry.signed.head != head:
            what = f"record {index} ({entry.kind}) does not follow from those before it"
            raise StoreError(what, file=path, remedy=_RESTORE)
        self._head, self._signature = head, entry.signed.signature
        self._digests += entry.digest
        self._length += len(line)
        if entry.record.key is not None:
            self._keys.add(entry.record.key)
        look(entry)


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a log, each with its end; the last may lack it.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                yield line
    except OSError as error:
        raise StoreError.from_cause(error, file=path) from error


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        remedy = "Stop the other process that writes it; to look at it, copy it or use `maskwork audit fetch`."
        raise StoreError("is being written by another process", file=path, remedy=remedy) from error


def _sync_directory(directory: Path, fsync: Callable[[int], None]) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)
