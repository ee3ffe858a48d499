"""Writing a small file of an identity so that it is there whole or not at all, even after a power cut.

Keys, certificates and revocation lists are written by this. It is NOT for models, which are larger and named by what
they hold (`maskwork.tensors`), and decides nothing about replacing what is there: it does replace it.
"""

import os
import tempfile
from pathlib import Path


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
