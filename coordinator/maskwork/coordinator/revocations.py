"""The revocation list that this coordinator enforces: a file that its operator replaces, looked at every second.

A list that is newer, and signed by the federation's CA, is put in force and everybody who asked is told, in the order
of asking. Any other is refused with a line in the log, and the one before stays in force. The newest is kept in the
state directory too: neither a restart nor an old backup of the file brings a withdrawn certificate back.

It cuts nobody's connection: the guard and the driver do, when they are told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog
from cryptography import x509

from maskwork.errors import StorageUnavailable, UserError
from maskwork.net.identity import TrustRoots, serial_bytes
from maskwork.net.kept_list import KeptList
from maskwork.net.revocation import (
    MAX_LIST_BYTES,
    NO_LIST,
    ListProblem,
    RevocationError,
    RevocationList,
)

log = structlog.get_logger("maskwork.coordinator")

LOOK_S: Final = 1.0
TELL_AGAIN_S: Final = 3600.0

Told = Callable[[RevocationList], Awaitable[None]]
Pause = Callable[[float], Awaitable[None]]


def withdrawn(certificate: bytes, revocations: RevocationList) -> str:
    """Why a certificate (DER, of a verified peer) is not good any more, for people; empty if it is."""
    entry = revocations.revoked.get(serial_bytes(x509.load_der_x509_certificate(certificate)))
    return "" if entry is None else f"its certificate is on revocation list {revocations.number}: {entry.reason}"


class RevocationFile:
    """The operator's file, and the list in force."""

    def __init__(
        self,
        path: Path,
        kept: KeptList,
        roots: TrustRoots,
        *,
        clock: Callable[[], float] = time.time,
        pause: Pause = asyncio.sleep,
    ) -> None:
        self._path = path
        self._kept = kept
        self._roots = roots
        self._clock = clock
        self._pause = pause
        self._seen: tuple[int, int, int] | None = None
        self._told_trouble = ""
        self._told_overdue: float | None = None
        self._listeners: list[Told] = []

    @property
    def current(self) -> RevocationList:
        """The list in force."""
        return self._kept.current

    def __contains__(self, name: object) -> bool:
        return name in self.current

    def tell(self, listener: Told) -> None:
        """Have `listener` told of every list that is put in force from now on."""
        self._listeners.append(listener)

    def begin(self, *, required: bool) -> None:
        """Take in the file as it is at the start.

        Args:
            required: The file was configured, so it has to be there.

        Raises:
            UserError: It is not there, or cannot be used and no list of before is known; or the list that was kept is
                damaged: only that one says that the file is not older, which would bring withdrawn certificates back.
        """
        if self._kept.damaged:
            raise UserError(
                f"the revocation list that was kept cannot be used: {self._kept.problem}. Put the newest list of the CA"
                " there, and where this coordinator reads it, then start again: else an older one could take effect"
            )
        if self._kept.problem:
            log.warning("the revocation list that was kept is left aside", detail=self._kept.problem)
        try:
            self._take_in()
        except (UserError, OSError) as error:
            if self.current is NO_LIST and (required or not isinstance(error, FileNotFoundError)):
                raise UserError(f"the revocation list cannot be used: {self._why(error)}") from error
            self._refused(error)

    async def run(self) -> None:
        """Look at the file until cancelled.

        Raises:
            UserError: Whatever a listener raised.
        """
        while True:
            await self._pause(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Take in the file if it has changed, and tell everybody of a new list."""
        before = self.current
        try:
            await asyncio.to_thread(self._take_in)
        except (UserError, OSError) as error:
            self._refused(error)
        self._tell_overdue()
        if self.current is not before:
            for listener in self._listeners:
                await listener(self.current)

    def _take_in(self) -> None:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            if self._seen == (0, 0, 0):
                return
            self._seen = (0, 0, 0)
            raise
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if mark == self._seen:
            return
        try:
            self._read(found.st_size)
        except RevocationError:
            self._seen = mark  # another file is needed
            raise
        self._seen, self._told_trouble = mark, ""

    def _read(self, size: int) -> None:
        """Put the file's list in force; after an `OSError` or a `StoreError` the same file is read again."""
        if size > MAX_LIST_BYTES:
            raise RevocationError(ListProblem.TOO_LONG, f"it has {size} bytes, at most {MAX_LIST_BYTES} are read")
        new = RevocationList.parse(self._path.read_bytes(), self._roots, now=self._clock())
        if new.digest == self.current.digest:
            return
        try:
            self._kept.keep(new)
        except StorageUnavailable as error:
            # Better in force now and read from the operator's file again after a restart than not in force.
            self._kept.hold(new)
            log.error("the revocation list cannot be kept", detail=str(error))
        log.info("revocation list in force", number=new.number, entries=len(new.revoked), digest=new.digest.hex())

    def _refused(self, error: Exception) -> None:
        number = self.current.number
        if isinstance(error, FileNotFoundError):
            if number:
                log.warning("the revocation list's file is gone", file=str(self._path), in_force=number)
            return
        detail = self._why(error)
        trouble = "" if isinstance(error, RevocationError) else detail  # which is met again at every look
        if not trouble or trouble != self._told_trouble:
            log.error("revocation list refused", file=str(self._path), detail=detail, in_force=number)
        self._told_trouble = trouble

    def _why(self, error: Exception) -> str:
        said = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        return f"{self._path}: {said}"

    def _tell_overdue(self) -> None:
        now = self._clock()
        try:
            self.current.check_dates(now)
        except RevocationError as error:
            if self._told_overdue is None or now >= self._told_overdue + TELL_AGAIN_S:
                self._told_overdue = now
                log.warning("sites refuse the revocation list", detail=str(error))
        else:
            self._told_overdue = None
