"""Errors whose text is meant for the person at the terminal.

A `UserError` says what happened, where, and what to do about it, in one line or a few. The command line
prints that text alone and ends with exit code 1; any other exception is a fault of ours and keeps its
traceback. It is NOT the root of the protocol's error tree: peers and rounds have `maskwork.secagg.errors`.

Rule: the text never carries a secret (a key, a share, a mask), since it is printed and logged.
"""

import errno
import os
from collections.abc import Callable
from pathlib import PurePath


class UserError(Exception):
    """Something that the person at the terminal can put right; its text says how."""


class StoreError(UserError):
    """A file that must last could not be read or written: the disk, its rights, another process, damage.

    Attributes:
        what: What is the matter with it.
        file: The database, model file or directory concerned.
        remedy: What the operator can do.
    """

    def __init__(self, what: str, *, file: str | PurePath, remedy: str) -> None:
        super().__init__(f"{file}: {what}. {remedy}")
        self.what = what
        self.file = str(file)
        self.remedy = remedy

    def __reduce__(self) -> tuple[Callable[..., "StoreError"], tuple[type["StoreError"], str, str, str]]:
        """Pickle by its parts, so that it arrives from a worker process as what it is."""
        return _store_error, (type(self), self.what, self.file, self.remedy)

    @classmethod
    def from_cause(cls, cause: BaseException, *, file: str | PurePath) -> "StoreError":
        """Say what an `OSError` or a database driver's error means for the operator.

        Args:
            cause: As caught; SQLite's primary result code or the errno decides.
            file: The file that was being worked on.
        """
        sqlite_code: object = getattr(cause, "sqlite_errorcode", None)
        if isinstance(sqlite_code, int):
            said = _SQLITE_SAYS.get(sqlite_code & 0xFF)  # the upper bits only refine the primary code
        elif isinstance(cause, OSError):
            said = _ERRNO_SAYS.get(cause.errno or 0)
        else:
            said = None
        if said is None:
            return cls(f"could not be used ({cause})", file=file, remedy="Check the disk and the system's log.")
        if said is _NO_ACCESS and _no_descriptor_is_left():
            said = _NO_DESCRIPTORS  # SQLite says no more than that it cannot open the file
        what, remedy = said
        kind = StorageUnavailable if said in _PASSING else cls
        return kind(f"{what} ({cause})", file=file, remedy=remedy)


class StorageUnavailable(StoreError):
    """The disk is full or read-only, or no file can be opened any more: mended, the same can be done again."""


def storage_unavailable(cause: BaseException, *, file: str | PurePath) -> StorageUnavailable | None:
    """What an error says about storage that may be there again later; None if it says something else."""
    if isinstance(cause, StorageUnavailable):
        return cause
    told = StoreError.from_cause(cause, file=file) if isinstance(cause, OSError) else None
    return told if isinstance(told, StorageUnavailable) else None


def _store_error(kind: type[StoreError], what: str, file: str, remedy: str) -> StoreError:
    return kind(what, file=file, remedy=remedy)


def _no_descriptor_is_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


_DISK_FULL = ("the disk is full", "Free some space on it; nothing half-written is kept, so a restart is safe.")
_READ_ONLY = ("is read-only", "Give the service's user the right to write it, and mount its file system writable.")
_NO_ACCESS = ("cannot be opened", "Check that its directory exists and that the service's user may write there.")
_NO_DESCRIPTORS = (
    "cannot be opened: this process has as many files open as it may",
    "Raise its limit (LimitNOFILE= in a systemd unit, ulimit -n in a shell), then start it again.",
)
_PASSING = (_DISK_FULL, _READ_ONLY, _NO_DESCRIPTORS)
_LOCKED = ("is locked by another process", "Stop the other process that has it open, then start again.")
_DAMAGED = ("is damaged or not a database", "Move it away and restore the last backup; do not delete its -wal file.")
_FAULTY = ("the disk reported a fault", "Check the disk and the system's log before starting again.")

# SQLite's primary result codes (sqlite.org/rescode.html) as numbers, so that `sqlite3` is not imported here.
_SQLITE_SAYS = {
    3: _NO_ACCESS,  # SQLITE_PERM
    5: _LOCKED,  # SQLITE_BUSY
    6: _LOCKED,  # SQLITE_LOCKED
    8: _READ_ONLY,  # SQLITE_READONLY
    10: _FAULTY,  # SQLITE_IOERR
    11: _DAMAGED,  # SQLITE_CORRUPT
    13: _DISK_FULL,  # SQLITE_FULL
    14: _NO_ACCESS,  # SQLITE_CANTOPEN
    26: _DAMAGED,  # SQLITE_NOTADB
}
_ERRNO_SAYS = {
    errno.ENOSPC: _DISK_FULL,
    errno.EDQUOT: _DISK_FULL,
    errno.EFBIG: _DISK_FULL,
    errno.EMFILE: _NO_DESCRIPTORS,
    errno.ENFILE: _NO_DESCRIPTORS,
    errno.EROFS: _READ_ONLY,
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.ENOENT: _NO_ACCESS,
    errno.ENOTDIR: _NO_ACCESS,
    errno.EEXIST: _NO_ACCESS,
    errno.EIO: _FAULTY,
}
