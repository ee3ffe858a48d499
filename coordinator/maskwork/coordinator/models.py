"""Models on disk: one file for each, named after the SHA-256 of the model, and encrypted where there is a vault.

NOT here: what is inside the model (`maskwork.tensors` reads safetensors), which models are needed (the store's rows
say so; `sweep` is told), and how a file is encrypted (`sealed`). The name is the plain model's digest in either case.

Rules
1. `<digest>.safetensors` exists only complete: written under a temporary name in the same directory, fsynced, renamed,
   the directory fsynced. Only after that does `put` return, and only then may a row refer to it (DESIGN section 6).
2. Nothing is trusted for its name alone: `verify` hashes again. With a vault no plain byte of a model is written, and
   a plain file is not read unless the vault accepts those of before.
3. `sweep` never touches what this process is writing or has put: it cannot race the row that is about to refer to it.
   Nor does it touch a model older than all that are referred to: that is of another database, one that was lost, moved
   away or not configured, and may be back tomorrow.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import structlog

from maskwork.coordinator.sealed import NotSealed, SealDamaged, SealedWriter, pieces
from maskwork.coordinator.vault import Vault, not_accepted
from maskwork.errors import StoreError
from maskwork.tensors import ModelSource

log = structlog.get_logger("maskwork.coordinator")

_TEMPORARY = ".incoming-"
_NAMED_BY_DIGEST = re.compile(r"([0-9a-f]{64})\.safetensors")


def fsync(path: str | Path) -> None:
    """Return once the bytes of a file, or the names in a directory, are on the disk.

    Raises:
        OSError: If they may not be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ModelDamaged(StoreError):
    """A model file is missing, or its bytes are no longer those of its name."""


class ModelTooLarge(ValueError):
    """A model that somebody sent is larger than allowed; nothing of it was kept."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model of the store, to be read as it is, whatever lies on the disk; as text, the file's path."""

    path: Path
    digest: bytes
    vault: Vault | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        """Open it for reading.

        Raises:
            ModelDamaged: It is missing, or not what was encrypted under its name.
            StoreError: It is encrypted and its key is not there, or it is plain and should not be.
            OSError: It cannot be read.
        """
        try:
            if self.vault is None:
                return self.path.open("rb")
            return cast("BinaryIO", self.vault.open(self.path, self.vault.model(self.digest)))
        except FileNotFoundError:
            raise _missing(self.path) from None
        except SealDamaged as damage:
            raise ModelDamaged(damage.what, file=damage.file, remedy=damage.remedy) from None
        except NotSealed as plain:
            if self.vault is not None and self.vault.accept_plain:
                return self.path.open("rb")
            raise not_accepted(plain.what, self.path) from None

    @property
    def size(self) -> int:
        """Bytes of the model. Raises as `open`."""
        if self.vault is None:
            return self.path.stat().st_size
        with self.open() as file:
            return file.seek(0, os.SEEK_END)

    def read_bytes(self) -> bytes:
        """All of it. Raises as `open`."""
        with self.open() as file:
            return file.read()


class IncomingModel:
    """A model that arrives in chunks. Leaving the `with` block without `commit` leaves no trace of it."""

    def __init__(self, store: "ModelStore", max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._path = store._new_temporary()
        self._size = 0
        self._digest: bytes | None = None
        self._sealing: SealedWriter | None = None
        with _world_failures(self._path):
            self._file: BinaryIO = self._path.open("x+b", buffering=0 if store.vault is not None else -1)
            if store.vault is not None:
                self._sealing = SealedWriter(self._file)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._size

    def write(self, chunk: bytes | memoryview) -> None:
        """Append one chunk.

        Raises:
            ModelTooLarge: If it would pass the bound; the chunk is not written.
            StoreError: If the disk fails.
        """
        size = self._size + len(chunk)
        if size > self._max_bytes:
            raise ModelTooLarge(f"the model is larger than the {self._max_bytes} bytes allowed; send a smaller one")
        with _world_failures(self._path):
            (self._file if self._sealing is None else self._sealing).write(chunk)
        self._hash.update(chunk)
        self._size = size

    def written(self) -> ModelSource:
        """What has been written, to be read and judged before `commit`; with a vault, nothing more can be written.

        Raises:
            StoreError: If the disk fails.
        """
        with _world_failures(self._path):
            if self._sealing is None:
                self._file.flush()
                return self._path
            self._sealing.finish()
        return _Unnamed(self._path, self._sealing)

    def digest_so_far(self) -> bytes:
        """The SHA-256 of what was written until now."""
        return self._hash.digest()

    def commit(self) -> bytes:
        """Make it durable under its digest, and return that (32 bytes)."""
        if self._digest is not None:
            raise RuntimeError("this model was committed before; a model is committed once")
        digest, vault = self._hash.digest(), self._store.vault
        with _world_failures(self._path):
            if self._sealing is not None and vault is not None:
                self._sealing.seal(vault.model(digest), vault.keys.current)
            self._file.close()
        self._digest = digest
        self._store._keep(self._path, digest)
        return digest

    def __enter__(self) -> "IncomingModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _world_failures(self._path):
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._store._forget_temporary(self._path)


@dataclass(frozen=True, slots=True)
class _Unnamed:
    """A sealed model that has no digest yet, while whoever writes it still holds its key."""

    path: Path
    sealing: SealedWriter

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        return cast("BinaryIO", self.sealing.reader(self.path.open("rb", buffering=0)))


class ModelStore:
    """A directory of models named by their digests."""

    def __init__(
        self, directory: str | Path, *, fsync: Callable[[Path], None] = fsync, vault: Vault | None = None
    ) -> None:
        """Open `directory`, creating it if it is missing.

        Args:
            directory: Where the models are.
            fsync: Makes a file's bytes, or a directory's names, durable.
            vault: What they are encrypted with; None: they are not.

        Raises:
            StoreError: If it cannot be created.
        """
        self.directory = Path(directory)
        self.vault = vault
        self._fsync = fsync
        self._own: set[str] = set()  # names that this process has put or is writing; `sweep` leaves them
        with _world_failures(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)

    def put(self, write: Callable[[Path], object]) -> bytes:
        """Keep the file that `write` writes at the path it is given; returns its SHA-256, 32 bytes.

        Not with a vault: the path would hold the plain model. There, `write_in_order` takes its place.

        Raises:
            StoreError: If the disk fails; nothing is kept.
        """
        if self.vault is not None:
            raise RuntimeError("an encrypted store takes no plain files: use write_in_order")
        temporary = self._new_temporary()
        try:
            with _world_failures(temporary):
                write(temporary)
                digest = _digest_of(temporary)
            self._keep(temporary, digest)
        finally:
            with _world_failures(temporary):
                temporary.unlink(missing_ok=True)
            self._forget_temporary(temporary)
        return digest

    def write_in_order(self, write: Callable[["IncomingModel"], object], *, max_bytes: int) -> bytes:
        """Keep what `write` writes, from the first byte to the last; returns its SHA-256, 32 bytes.

        Raises:
            ModelTooLarge: If there is more than `max_bytes` of it; nothing is kept.
            StoreError: If the disk fails; nothing is kept.
        """
        with self.incoming(max_bytes=max_bytes) as model:
            write(model)
            return model.commit()

    def put_file(self, source: str | Path) -> bytes:
        """Keep a copy of `source`; returns its SHA-256, 32 bytes.

        Raises:
            StoreError: If it cannot be read, or the disk fails.
        """
        with _world_failures(source), Path(source).open("rb") as opened:
            return self.import_stream(pieces(opened), max_bytes=os.fstat(opened.fileno()).st_size)

    def import_stream(self, chunks: Iterable[bytes], *, max_bytes: int) -> bytes:
        """Keep a model that arrives in chunks; returns its SHA-256, 32 bytes.

        Raises:
            ModelTooLarge: If there is more than `max_bytes` of it; nothing is kept.
            StoreError: If the disk fails; nothing is kept.
        """
        with self.incoming(max_bytes=max_bytes) as model:
            for chunk in chunks:
                model.write(chunk)
            return model.commit()

    def incoming(self, *, max_bytes: int) -> IncomingModel:
        """Open a model to be written chunk by chunk, for callers that receive asynchronously."""
        return IncomingModel(self, max_bytes)

    def path(self, digest: bytes) -> Path:
        """The file of a model.

        Raises:
            ModelDamaged: If there is none.
        """
        path = self._named(digest)
        if not path.is_file():
            raise _missing(path)
        return path

    def file(self, digest: bytes) -> ModelFile:
        """A model, to be read as it is.

        Raises:
            ModelDamaged: If there is none.
        """
        return ModelFile(self.path(digest), digest, self.vault)

    def verify(self, digest: bytes) -> Path:
        """Hash a model again and return the path of its file.

        Raises:
            ModelDamaged: If it is missing, or its bytes are not those of its name.
            StoreError: If it cannot be read, or its key is not there.
        """
        path = self.path(digest)
        try:
            with _world_failures(path), self.file(digest).open() as opened:
                found = _digest_of_open(opened)
        except SealDamaged as damage:
            raise ModelDamaged(damage.what, file=path, remedy=damage.remedy) from None
        if found != digest:
            remedy = "Restore it from a backup; participants would refuse it."
            raise ModelDamaged(f"is damaged: its SHA-256 is {found.hex()}", file=path, remedy=remedy)
        return path

    def sweep(self, keep: Collection[bytes]) -> tuple[str, ...]:
        """Delete what an earlier process left half-written, and models that nothing refers to.

        Args:
            keep: Digests of every model that a row refers to.

        Returns:
            The names of the files deleted, sorted. Files with names of other kinds stay, and so do models of another
            database, of which the log tells.
        """
        kept = {f"{digest.hex()}.safetensors" for digest in keep}
        deleted, strangers = [], 0
        with _world_failures(self.directory):
            names = sorted(os.listdir(self.directory))
            oldest = min((self._written_at(name) for name in names if name in kept), default=None)
            for name in names:
                unreferenced = _NAMED_BY_DIGEST.fullmatch(name) is not None and name not in kept
                if name in self._own or not (unreferenced or name.startswith(_TEMPORARY)):
                    continue
                if unreferenced and (oldest is None or self._written_at(name) < oldest):
                    strangers += 1
                    continue
                (self.directory / name).unlink(missing_ok=True)
                deleted.append(name)
        if strangers:
            log.warning(
                "models that the database does not know were left where they are",
                directory=str(self.directory),
                models=strangers,
                remedy="if the database was lost, moved away or is another one now, restore it; else delete them",
            )
        return tuple(deleted)

    def _written_at(self, name: str) -> int:
        return (self.directory / name).stat().st_mtime_ns

    def _named(self, digest: bytes) -> Path:
        if len(digest) != 32:
            raise RuntimeError(f"a model digest has 32 bytes, this one has {len(digest)}")
        return self.directory / f"{digest.hex()}.safetensors"

    def _new_temporary(self) -> Path:
        path = self.directory / f"{_TEMPORARY}{secrets.token_hex(16)}"
        self._own.add(path.name)
        return path

    def _forget_temporary(self, path: Path) -> None:
        self._own.discard(path.name)

    def _keep(self, temporary: Path, digest: bytes) -> None:
        path = self._named(digest)
        self._own.add(path.name)
        with _world_failures(path):
            self._fsync(temporary)
            temporary.replace(path)  # also over an older copy: if that was damaged, it is whole again
            self._fsync(self.directory)


def _missing(path: Path) -> ModelDamaged:
    return ModelDamaged("is missing", file=path, remedy="Restore the models directory from a backup.")


def _digest_of(path: Path) -> bytes:
    with path.open("rb") as opened:
        return _digest_of_open(opened)


def _digest_of_open(opened: BinaryIO) -> bytes:
    found = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while length := opened.readinto(buffer):  # type: ignore[attr-defined]  # BinaryIO lacks it, every file here has it
        found.update(buffer[:length])
    return found.digest()


class _world_failures:  # noqa: N801  (a with-block, used as one)
    """Turn an `OSError` into a `StoreError` that names the file."""

    def __init__(self, file: str | Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(value, OSError):
            raise StoreError.from_cause(value, file=str(self._file)) from value
