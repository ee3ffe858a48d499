"""Small files of identities and of a CA: written whole or not at all, even after a power cut; keys read; locks held.

Keys, certificates and revocation lists are written by this, and every file with a key is read by this. It is NOT for
models, which are larger and named by what they hold (`maskwork.tensors`), and decides nothing about replacing what is
there: it does replace it.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskwork.errors import UserError


class OpenToOthers(UserError):
    """A secret in a file that others than its owner can read or write."""


def read_private(path: Path, *, most: int = -1) -> bytes:
    """Read a file with a secret, if it is its owner's alone.

    Args:
        path: What is read.
        most: Bytes that are read at most; all of them if negative.

    Raises:
        OpenToOthers: Its mode lets others read or write it; nothing was read.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        if open_to_others(os.fstat(file.fileno())):
            raise OpenToOthers(f"{path}: others can read or write this key: run `chmod 600 {path}`")
        return file.read(most)


@contextmanager
def locked(path: Path, failure: type[UserError]) -> Iterator[None]:
    """Hold the lock file `path`, whose directory is made if missing; whoever else wants it waits, in any process.

    Raises:
        UserError: Of the type `failure`: the file cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise failure(f"{path} cannot be opened ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def open_to_others(found: os.stat_result) -> bool:
    """Whether others than a file's owner have any right to it."""
    return bool(found.st_mode & 0o077)


def write_whole(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write `content` aside, sync it, and rename it to `path`, whose directory is made if missing.

    Args:
        path: What is written, or replaced.
        content: All of it.
        private: Readable by its owner alone, at every instant; otherwise by everybody.

    Raises:
        OSError: It cannot be written; what was there is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp opens with O_EXCL and mode 0600, so that a key is at no instant readable by others.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            if not private:
                os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
