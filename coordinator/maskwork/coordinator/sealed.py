"""Encrypted files and values: the format alone, `maskwork/at-rest/v1`.

A sealed file has a data key of its own, drawn for it and used for nothing else. Its content is cut into chunks, each
under AES-256-GCM with its number and "this is the last one" in the nonce (the STREAM construction of Hoang,
Reyhanitabar, Rogaway and Vizár, CRYPTO 2015, as age and Tink use it): chunks cannot be reordered, dropped, repeated or
carried over to another file, and a file cannot end early. The data key stands in the header, wrapped by a master key;
the wrap also holds the content's length and binds what the file is (`Binding`), so that it opens under no other name.

The header has two slots for a wrap, in two disk sectors. Changing the master key writes the free slot and then clears
the other: at any moment one of them is whole, the content is never copied, and the same can be done again.

NOT here: where keys come from (`at_rest_key`), which files there are and what they are called (`vault`, `rotation`).

Rules
1. No nonce is ever used twice under one key: a data key seals one content, in order, once; a wrap's key is derived from
   the master key and a fresh salt (HKDF-SHA256, RFC 5869), and so is the key of a sealed value.
2. No byte of a chunk leaves before the chunk is authenticated.
3. Memory is one chunk, whatever the file.
4. A rolled-back disk is not noticed: an older sealed file in the place of a newer one of the same name opens.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from maskwork.errors import StoreError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

KEY_BYTES: Final = 32
CHUNK_BYTES: Final = 1 << 20
HEADER_BYTES: Final = 1024
_LEAST_CHUNK: Final = 1 << 12
_MAGIC: Final = b"maskwork/sealed\x01"
_VALUE_MAGIC: Final = b"maskwork/value\x00\x01"
_SLOTS: Final = (64, 512)  # in different sectors of a disk: a torn write costs one of them at most
_ID_BYTES: Final = 8
_SALT_BYTES: Final = 32
_TAG_BYTES: Final = 16
_SIZE_BYTES: Final = 8
_SLOT_BYTES: Final = _ID_BYTES + _SALT_BYTES + KEY_BYTES + _SIZE_BYTES + _TAG_BYTES
_ONCE: Final = bytes(12)  # the nonce under a key that is used once
_CHUNK_LABEL: Final = b"maskwork/at-rest/v1/chunk\0"
_COPY_BACK: Final = "Restore it from a backup."


class SealDamaged(StoreError):
    """A sealed file or value is not what was sealed: cut, changed, or another one's under this name."""


class WrongKey(StoreError):
    """A sealed file or value needs a master key that is not there."""


class NotSealed(StoreError):
    """A plain file or value where a sealed one is expected."""


@dataclass(frozen=True, slots=True)
class MasterKey:
    """A key that wraps data keys; 32 bytes, never printed. Its id is public and tells keys apart."""

    raw: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, this one has {len(self.raw)}")

    @property
    def id(self) -> bytes:
        """Eight public bytes."""
        return _hkdf(self.raw, b"", b"maskwork/at-rest/v1/key-id\0", _ID_BYTES)


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """The key that seals, and the one before it, which still opens."""

    current: MasterKey
    old: MasterKey | None = None

    def by_id(self, wanted: bytes) -> MasterKey | None:
        """The key of that id, if it is one of these."""
        candidates = (self.current,) if self.old is None else (self.current, self.old)
        return next((key for key in candidates if key.id == wanted), None)


@dataclass(frozen=True, slots=True)
class Binding:
    """What a sealed thing is: it opens as nothing else.

    Attributes:
        kind: Such as "model".
        federation: Whose.
        name: Of all of its kind, which: a digest, a session.
    """

    kind: str
    federation: str
    name: bytes

    def encoded(self, label: bytes) -> bytes:
        """Each part with its length, so that no two bindings are encoded alike."""
        parts = (self.kind.encode(), self.federation.encode(), self.name)
        return label + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


# --- writing --------------------------------------------------------------------------------------------------------


class SealedWriter:
    """Seals what is written, in order, to a new file. It opens only once `seal` has said what it is.

    The file is the caller's to open (for reading and writing), to sync and to close. After a write that failed nothing
    more is written: the same chunk number would be used for other bytes.
    """

    def __init__(
        self, file: BinaryIO, *, chunk_bytes: int = CHUNK_BYTES, entropy: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._key = entropy(KEY_BYTES)
        self._aead = AESGCM(self._key)
        self._entropy = entropy
        self._tail = memoryview(bytearray(chunk_bytes))  # made once: fresh pages cost more than the cipher
        self._filled = 0
        self._sealed = memoryview(bytearray(chunk_bytes + _TAG_BYTES))
        self._chunks = 0
        self._size = 0
        self._finished = False
        self._broken = False
        _write_all(file, _first_block(chunk_bytes).ljust(HEADER_BYTES, b"\0"))

    def __repr__(self) -> str:
        return f"SealedWriter({self._size} bytes)"

    @property
    def size(self) -> int:
        """Bytes of content so far."""
        return self._size

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append to the content.

        Raises:
            OSError: The disk fails, or has failed before.
        """
        if self._finished:
            raise RuntimeError("this file is finished: nothing more can be written to it")
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            if self._filled == self._chunk_bytes:  # only now: the last chunk is sealed as the last one
                self._seal_chunk(last=False)
            taken = view[: self._chunk_bytes - self._filled]
            self._tail[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            self._size += len(taken)
            view = view[len(taken) :]
        return total

    def use(self, file: BinaryIO) -> None:
        """Go on with another handle of the same file, which the caller opened since."""
        file.seek(HEADER_BYTES + self._chunks * (self._chunk_bytes + _TAG_BYTES))
        self._file = file

    def finish(self) -> None:
        """Seal the last chunk; what is written can be read through `reader` from now on."""
        if not self._finished:
            self._seal_chunk(last=True)
            self._file.flush()
            self._finished = True
            self._tail = self._sealed = memoryview(b"")

    def seal(self, binding: Binding, key: MasterKey) -> None:
        """Say what the file is and who can open it, and finish it."""
        self.finish()
        payload = self._key + self._size.to_bytes(_SIZE_BYTES, "big")
        slot = _wrapped(payload, binding, key, chunk_bytes=self._chunk_bytes, salt=self._entropy(_SALT_BYTES))
        self._file.seek(_SLOTS[0])
        _write_all(self._file, slot)
        self._file.flush()

    def reader(self, file: BinaryIO) -> SealedReader:
        """Read a finished content through another handle of its file, before it is known what it is."""
        if not self._finished:
            raise RuntimeError("this file is not finished: nobody can read it yet")
        return SealedReader(file, self._key, self._size, self._chunk_bytes)

    def _seal_chunk(self, *, last: bool) -> None:
        if self._broken:
            raise OSError(errno.EIO, "an earlier write to this file failed")
        sealed = self._sealed[: self._filled + _TAG_BYTES]
        nonce = _nonce(self._chunks, last=last)
        self._aead.encrypt_into(nonce, self._tail[: self._filled], _CHUNK_LABEL, sealed)
        self._broken = True
        _write_all(self._file, sealed)
        self._broken = False
        self._chunks += 1
        self._filled = 0


# --- reading --------------------------------------------------------------------------------------------------------


class SealedReader(io.RawIOBase):
    """The content of a sealed file, from anywhere in it; closing it closes the file."""

    def __init__(self, file: BinaryIO, key: bytes, size: int, chunk_bytes: int) -> None:
        super().__init__()
        self._file = file
        self._aead = AESGCM(key)
        self._size = size
        self._chunk_bytes = chunk_bytes
        self._chunks = _chunks_of(size, chunk_bytes)
        self._at = 0
        self._open_chunk = -1
        length = min(size, chunk_bytes)
        self._plain, self._sealed = memoryview(bytearray(length)), memoryview(bytearray(length + _TAG_BYTES))
        found = os.fstat(file.fileno()).st_size
        expected = HEADER_BYTES + size + self._chunks * _TAG_BYTES
        if found != expected:
            raise self._damaged(f"has {found} bytes where {expected} were sealed")

    def __repr__(self) -> str:
        return f"SealedReader({self._file.name}, {self._size} bytes)"

    @property
    def size(self) -> int:
        """Bytes of content."""
        return self._size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere in the content."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the buffer, but for the end of the content.

        Raises:
            SealDamaged: A chunk is not the one that was sealed in its place.
        """
        into = memoryview(buffer).cast("B")
        done = 0
        while done < len(into) and self._at < self._size:
            number, within = divmod(self._at, self._chunk_bytes)
            piece = self._chunk(number)[within : within + len(into) - done]
            into[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)
        return done

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer at the end alone; all that is left without a size. Raises as `readinto`."""
        left = max(0, self._size - self._at)
        wanted = left if size < 0 else min(size, left)
        number, within = divmod(self._at, self._chunk_bytes)
        if 0 < wanted <= self._length_of(number) - within:  # the usual case: one copy
            self._at += wanted
            return bytes(self._chunk(number)[within : within + wanted])
        into = bytearray(wanted)
        self.readinto(into)
        return bytes(into)

    def close(self) -> None:
        """Close the file, and forget the chunk that is open."""
        self._plain = self._sealed = memoryview(b"")
        self._open_chunk = -1
        self._file.close()
        super().close()

    def check_end(self) -> None:
        """Open the last chunk; of an empty content that is the only way to authenticate it.

        Raises:
            SealDamaged: It is not the one that was sealed.
        """
        self._chunk(self._chunks - 1)

    def _chunk(self, number: int) -> memoryview:
        if number != self._open_chunk:
            self._open_chunk = -1  # what is in the buffer is none from here on
            sealed = self._sealed[: self._length_of(number) + _TAG_BYTES]
            self._file.seek(HEADER_BYTES + number * (self._chunk_bytes + _TAG_BYTES))
            if _read_all(self._file, sealed) != len(sealed):
                raise self._damaged("became shorter while it was being read")
            try:
                nonce = _nonce(number, last=number == self._chunks - 1)
                self._aead.decrypt_into(nonce, sealed, _CHUNK_LABEL, self._plain[: len(sealed) - _TAG_BYTES])
            except InvalidTag:
                raise self._damaged(f"is damaged or was changed, in chunk {number}") from None
            self._open_chunk = number
        return self._plain[: self._length_of(number)]

    def _length_of(self, number: int) -> int:
        return min(self._chunk_bytes, self._size - number * self._chunk_bytes)

    def _damaged(self, what: str) -> SealDamaged:
        return SealDamaged(what, file=self._file.name, remedy=_COPY_BACK)


def is_sealed(path: Path) -> bool:
    """Whether a file says of itself that it is sealed.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def open_sealed(path: Path, binding: Binding, keys: MasterKeys) -> SealedReader:
    """Open a sealed file as what `binding` says.

    Raises:
        NotSealed: It is a plain file.
        WrongKey: Another master key is needed.
        SealDamaged: It is not what was sealed under this binding.
        OSError: It cannot be read.
    """
    file = path.open("rb", buffering=0)
    try:
        header = _Header.read(file, path)
        _, payload = header.unwrap(binding, keys, path)
        size = int.from_bytes(payload[KEY_BYTES:], "big")
        return SealedReader(file, payload[:KEY_BYTES], size, header.chunk_bytes)
    except BaseException:
        file.close()
        raise


def rewrap(path: Path, binding: Binding, keys: MasterKeys, *, fsync: Callable[[Path], object]) -> bool:
    """See to it that a sealed file opens with the current key and with no other; say whether it did not before.

    A crash at any point leaves a file that one of the two keys opens, and on which this can be called again.

    Raises:
        NotSealed, WrongKey, SealDamaged, OSError: As `open_sealed`; nothing was changed.
    """
    with path.open("r+b", buffering=0) as file:
        header = _Header.read(file, path)
        opened, payload = header.unwrap(binding, keys, path)
        others = [slot for slot in range(len(_SLOTS)) if slot != opened]
        if header.key_id(opened) == keys.current.id:
            stale = [slot for slot in others if any(header.slots[slot])]
            changed = False
        else:
            salt = os.urandom(_SALT_BYTES)
            wrap = _wrapped(payload, binding, keys.current, chunk_bytes=header.chunk_bytes, salt=salt)
            _write_slot(file, others[0], wrap)
            fsync(path)
            stale, changed = [opened], True
        for slot in stale:
            _write_slot(file, slot, bytes(_SLOT_BYTES))
            fsync(path)
    return changed or bool(stale)


def key_ids(path: Path) -> tuple[bytes, ...]:
    """The ids of the master keys that a sealed file says it opens with; none for one that was never finished.

    Raises:
        NotSealed: It is a plain file.
        OSError: It cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        header = _Header.read(file, path)
    return tuple(header.key_id(slot) for slot in range(len(_SLOTS)) if any(header.slots[slot]))


@dataclass(frozen=True, slots=True)
class _Header:
    chunk_bytes: int
    slots: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def read(cls, file: BinaryIO, path: Path) -> _Header:
        raw = file.read(HEADER_BYTES)
        if not raw.startswith(_MAGIC):
            raise NotSealed("is not encrypted", file=path, remedy=_COPY_BACK)
        chunk_bytes = int.from_bytes(raw[len(_MAGIC) : len(_MAGIC) + 4], "big")
        if len(raw) < HEADER_BYTES or not _LEAST_CHUNK <= chunk_bytes <= CHUNK_BYTES:
            raise SealDamaged("is damaged: its header is not one", file=path, remedy=_COPY_BACK)
        return cls(chunk_bytes, tuple(raw[at : at + _SLOT_BYTES] for at in _SLOTS))

    def key_id(self, slot: int) -> bytes:
        return self.slots[slot][:_ID_BYTES]

    def unwrap(self, binding: Binding, keys: MasterKeys, path: Path) -> tuple[int, bytes]:
        """The slot that opens, and what is in it: data key and length. The current key's, if both do."""
        mine = [(slot, key) for slot in range(len(_SLOTS)) if (key := keys.by_id(self.key_id(slot))) is not None]
        for slot, key in sorted(mine, key=lambda found: found[1] is not keys.current):
            payload = _unwrapped(self.slots[slot], binding, key, chunk_bytes=self.chunk_bytes)
            if payload is not None:
                return slot, payload
        if mine:
            what = f"is not the {binding.kind} that was encrypted under this name, or was changed"
            raise SealDamaged(what, file=path, remedy=_COPY_BACK)
        written = [self.key_id(slot) for slot in range(len(_SLOTS)) if any(self.slots[slot])]
        if not written:
            raise SealDamaged("was never finished: it has no key", file=path, remedy=_COPY_BACK)
        raise wrong_key(written[0], keys, path)


def wrong_key(needed: bytes, keys: MasterKeys, file: str | Path) -> WrongKey:
    """The error for something that a key which is not there has sealed."""
    given = " and ".join(key.id.hex() for key in (keys.current, keys.old) if key is not None)
    return WrongKey(
        f"is encrypted with the key {needed.hex()}, and the configuration gives {given}",
        file=file,
        remedy="Give the right key under [encryption]; during a rotation the one before it too, as old_…",
    )


# --- values ---------------------------------------------------------------------------------------------------------


def seal_value(plain: bytes, binding: Binding, key: MasterKey) -> bytes:
    """Seal something small, such as a database column."""
    salt = os.urandom(_SALT_BYTES)
    sealed = AESGCM(_once_key(key, salt, b"value")).encrypt(
        _ONCE, plain, binding.encoded(b"maskwork/at-rest/v1/value\0")
    )
    return _VALUE_MAGIC + key.id + salt + sealed


def is_sealed_value(value: bytes) -> bool:
    """Whether a value says of itself that it is sealed."""
    return value.startswith(_VALUE_MAGIC)


def value_key_id(value: bytes) -> bytes:
    """The id of the master key that a sealed value opens with."""
    return value[len(_VALUE_MAGIC) :][:_ID_BYTES]


def open_value(value: bytes, binding: Binding, keys: MasterKeys, *, where: str) -> bytes:
    """Open a sealed value as what `binding` says; `where` is for the error.

    Raises:
        NotSealed, WrongKey, SealDamaged: As `open_sealed`.
    """
    if not is_sealed_value(value):
        raise NotSealed(f"holds a {binding.kind} record that is not encrypted", file=where, remedy=_COPY_BACK)
    key = keys.by_id(value_key_id(value))
    if key is None:
        raise wrong_key(value_key_id(value), keys, where)
    body = value[len(_VALUE_MAGIC) + _ID_BYTES :]
    try:
        aead = AESGCM(_once_key(key, body[:_SALT_BYTES], b"value"))
        return aead.decrypt(_ONCE, body[_SALT_BYTES:], binding.encoded(b"maskwork/at-rest/v1/value\0"))
    except InvalidTag:
        what = f"holds a {binding.kind} record that was changed, or is another one's"
        raise SealDamaged(what, file=where, remedy=_COPY_BACK) from None


# --- parts ----------------------------------------------------------------------------------------------------------


def pieces(file: BinaryIO, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """What is left of an open file, piece by piece."""
    while piece := file.read(size):
        yield piece


def _first_block(chunk_bytes: int) -> bytes:
    return _MAGIC + chunk_bytes.to_bytes(4, "big")


def _wrapped(payload: bytes, binding: Binding, key: MasterKey, *, chunk_bytes: int, salt: bytes) -> bytes:
    aead = AESGCM(_once_key(key, salt, b"wrap"))
    return key.id + salt + aead.encrypt(_ONCE, payload, _wrap_data(binding, chunk_bytes))


def _unwrapped(slot: bytes, binding: Binding, key: MasterKey, *, chunk_bytes: int) -> bytes | None:
    salt, sealed = slot[_ID_BYTES : _ID_BYTES + _SALT_BYTES], slot[_ID_BYTES + _SALT_BYTES :]
    try:
        return AESGCM(_once_key(key, salt, b"wrap")).decrypt(_ONCE, sealed, _wrap_data(binding, chunk_bytes))
    except InvalidTag:
        return None


def _wrap_data(binding: Binding, chunk_bytes: int) -> bytes:
    return binding.encoded(b"maskwork/at-rest/v1/wrap\0" + _first_block(chunk_bytes))


def _once_key(key: MasterKey, salt: bytes, purpose: bytes) -> bytes:
    return _hkdf(key.raw, salt, b"maskwork/at-rest/v1/" + purpose + b"-key\0", KEY_BYTES)


def _hkdf(key_material: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=length, salt=salt or None, info=info).derive(key_material)


def _nonce(chunk: int, *, last: bool) -> bytes:
    return chunk.to_bytes(11, "big") + bytes([last])


def _chunks_of(size: int, chunk_bytes: int) -> int:
    return max(1, -(-size // chunk_bytes))


def _write_all(file: BinaryIO, data: ReadableBuffer) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _read_all(file: BinaryIO, into: memoryview) -> int:
    done = 0
    while done < len(into) and (length := file.readinto(into[done:])):  # type: ignore[attr-defined]  # of a FileIO
        done += length
    return done


def _write_slot(file: BinaryIO, slot: int, content: bytes) -> None:
    file.seek(_SLOTS[slot])
    _write_all(file, content)
