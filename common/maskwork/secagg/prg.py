"""The PRG of the protocol: a 16-byte key becomes a vector of masks (AES-128 in counter mode, NIST SP 800-38A).

The keystream of a key is AES-128-CTR over zeros with an all-zero initial counter block and the full 128-bit big-endian
counter. A ring coordinate takes one little-endian uint32 of it (the ring keeps the low r bits, so every value up to
2^r - 1 occurs), a statistic one little-endian uint64. Coordinate ``i`` therefore starts at byte ``4 i`` (``8 i``).

What this deliberately is not: it derives no keys (``keys.py`` does), and it never draws randomness of its own.

Rules:
 1. A key makes one stream, once: the zero IV is safe only because every key is fresh (one per session, pair, segment).
 2. Work goes tile by tile: one tile of one key is expanded into a reused buffer that stays in the L2 cache, added or
    subtracted in place, then comes the next key, then the next tile.
 3. Key bytes are never part of a repr or of an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from maskwork.secagg.ring import CACHE_LINE, TILE, UInt8Array, UInt32Array, UInt64Array, scratch

KEY_BYTES = 16
MAX_STREAM_BYTES = 1 << 36
"""A stream longer than this (2^34 coordinates) is refused; it keeps far away from any bound of the block cipher."""

_BLOCK = 16
_TILE_BYTES = 4 * TILE
_CIPHERS_AT_A_TIME = 1024
_ZEROS = scratch(_TILE_BYTES, np.uint8).data


@dataclass(frozen=True, slots=True)
class SignedKey:
    """A mask key and the sign of its keystream in the masked vector.

    Attributes:
        key: 16 secret bytes.
        negative: True where the owner of the vector subtracts the keystream (the higher roster index of a pair).
    """

    key: bytes = field(repr=False)
    negative: bool

    def __post_init__(self) -> None:
        check_key(self.key)


def check_key(key: bytes) -> None:
    """Raises ValueError unless ``key`` has 16 bytes: a shorter seed is never stretched."""
    if len(key) != KEY_BYTES:
        raise ValueError(f"a PRG key has {KEY_BYTES} bytes, got {len(key)}")


def _stream(key: bytes, start_byte: int) -> CipherContext:
    """The cipher of one keystream, placed at ``start_byte``."""
    check_key(key)
    block, skipped = divmod(start_byte, _BLOCK)
    # The zero IV plus the block number: that is all that a seek is in counter mode.
    context = Cipher(algorithms.AES(key), modes.CTR(block.to_bytes(_BLOCK, "big"))).encryptor()
    context.update(bytes(skipped))
    return context


def _check_range(start_byte: int, length: int) -> None:
    if start_byte < 0 or length < 0 or start_byte + length > MAX_STREAM_BYTES:
        raise ValueError(
            f"{length} keystream bytes from offset {start_byte} are not within 0..{MAX_STREAM_BYTES}: "
            "one key masks no longer vector"
        )


class KeystreamReader:
    """Reads one keystream from a byte offset onwards, in order."""

    def __init__(self, key: bytes, start_byte: int = 0) -> None:
        """Seeks to ``start_byte`` of the stream of ``key`` (16 bytes)."""
        _check_range(start_byte, 0)
        self._context = _stream(key, start_byte)
        self._at = start_byte

    def read_into(self, out: UInt8Array) -> None:
        """Fills ``out`` (uint8, contiguous) with the next bytes of the stream.

        Raises:
            ValueError: The stream would become longer than ``MAX_STREAM_BYTES``.
        """
        _check_range(self._at, len(out))
        self._at += len(out)
        for at in range(0, len(out), _TILE_BYTES):
            part = out[at : at + _TILE_BYTES]
            self._context.update_into(_ZEROS[: len(part)], part.data)


class MaskStreams:
    """The keystreams of several signed keys, walked together over one vector, tile by tile."""

    def __init__(self, keys: Sequence[SignedKey], *, item_bytes: int, start: int = 0) -> None:
        """Places every stream at coordinate ``start``.

        Args:
            keys: The signed keys; none is fine.
            item_bytes: 4 for ring coordinates, 8 for statistics.
            start: Coordinate at which the first call of ``add_to`` begins.
        """
        if item_bytes not in (4, 8):
            raise ValueError(f"a coordinate takes 4 or 8 keystream bytes, not {item_bytes}")
        _check_range(start * item_bytes, 0)
        self._dtype = np.dtype(f"<u{item_bytes}")
        self._at = start * item_bytes
        self._streams = [
            (_stream(key.key, self._at).update_into, np.subtract if key.negative else np.add) for key in keys
        ]
        self._buffer = scratch(_TILE_BYTES, np.uint8)

    def add_to(self, acc: UInt32Array | UInt64Array) -> None:
        """Adds (or subtracts) the next ``len(acc)`` coordinates of every stream, in place, modulo 2^32 or 2^64.

        Raises:
            ValueError: Wrong dtype or shape, or a stream would become longer than ``MAX_STREAM_BYTES``; ``acc`` is as
                it was.
        """
        if acc.dtype != self._dtype or acc.ndim != 1 or not acc.flags.c_contiguous:
            raise ValueError(f"accumulator must be a contiguous 1-d {self._dtype} array, got {acc.ndim}-d {acc.dtype}")
        _check_range(self._at, acc.nbytes)
        self._at += acc.nbytes
        per_tile = _TILE_BYTES // acc.itemsize
        # The first tile is a little shorter where that puts all others on cache lines: worth 7 % of the whole.
        stop = per_tile - acc.ctypes.data % CACHE_LINE // acc.itemsize
        at = 0
        while at < len(acc):
            self._add_tile(acc[at:stop])
            at, stop = stop, stop + per_tile

    def _add_tile(self, tile: UInt32Array | UInt64Array) -> None:
        expanded = self._buffer[: tile.nbytes]
        masks, zeros, target = expanded.view(self._dtype), _ZEROS[: tile.nbytes], expanded.data
        for update_into, combine in self._streams:
            update_into(zeros, target)
            combine(tile, masks, out=tile)


def add_keystreams_u32(acc: UInt32Array, keys: Sequence[SignedKey], start: int = 0) -> None:
    """Adds coordinates [start, start + len(acc)) of every keystream to ``acc`` in place, modulo 2^32.

    Args:
        acc: uint32[count]; a slice of a larger vector or a memory map is fine.
        keys: Signed keys; a negative one is subtracted.
        start: Coordinate of ``acc[0]`` in the whole vector; need not be block aligned.

    Raises:
        ValueError: Wrong dtype, negative start, or a stream longer than ``MAX_STREAM_BYTES``.
    """
    _add_keystreams(acc, keys, item_bytes=4, start=start)


def add_keystreams_u64(acc: UInt64Array, keys: Sequence[SignedKey], start: int = 0) -> None:
    """The same for statistics: uint64, modulo 2^64, eight keystream bytes per coordinate."""
    _add_keystreams(acc, keys, item_bytes=8, start=start)


def _add_keystreams(acc: UInt32Array | UInt64Array, keys: Sequence[SignedKey], *, item_bytes: int, start: int) -> None:
    # Hundreds of thousands of masks are left after a large round with dropouts, and a cipher takes half a kilobyte.
    for at in range(0, max(len(keys), 1), _CIPHERS_AT_A_TIME):
        MaskStreams(keys[at : at + _CIPHERS_AT_A_TIME], item_bytes=item_bytes, start=start).add_to(acc)


def keystream(key: bytes, start_byte: int, length: int) -> bytes:
    """Bytes [start_byte, start_byte + length) of the keystream of ``key`` (16 bytes).

    Raises:
        ValueError: Wrong key length, negative length, or a range beyond ``MAX_STREAM_BYTES``.
    """
    _check_range(start_byte, length)
    out = np.zeros(length, np.uint8)
    KeystreamReader(key, start_byte).read_into(out)
    return out.tobytes()
