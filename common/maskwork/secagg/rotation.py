"""Seeded random signs and a blockwise Walsh–Hadamard transform: the public rotation of the rotated encodings.

With ``B = min(2^16, largest power of two <= d)`` the vector is cut into ``d // B`` blocks. Each block is multiplied by
random signs and transformed by the orthonormal Walsh–Hadamard matrix ``H_B / sqrt(B)`` in natural (Sylvester) order.
If ``B`` does not divide ``d``, a second transform with fresh signs goes over the last ``B`` coordinates, the tail
included, so that the length stays ``d``. The whole map is orthogonal: norms and distances are kept.

The sign of coordinate ``i`` is the top bit of the ``i``-th little-endian uint32 of AES-128-CTR under the first 16 bytes
of the 32-byte seed (1 = minus); the second transform uses the last 16 bytes and counts from its own first coordinate.

What this deliberately is not: the rotation hides nothing. Its seed is public; it only spreads large coordinates.

Rules:
 1. Only float32 additions, subtractions and one multiplication by 1/sqrt(B), in an order fixed by this module: every
    IEEE 754 machine gets the same bytes, whatever its BLAS or thread count. A session that encodes again sends what it
    sent before.
 2. Pieces are independent, so a vector can be rotated while it streams, and split over processes.

Source: Suresh, Yu, Kumar, McMahan, "Distributed Mean Estimation with Limited Communication", ICML 2017, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from maskwork.secagg.prg import KEY_BYTES, KeystreamReader
from numpy.typing import NDArray

SEED_BYTES = 2 * KEY_BYTES
MAX_BLOCK = 1 << 16

Float32Array = NDArray[np.float32]

_SIGN_BIT = np.uint32(0x80000000)


def block_length(length: int) -> int:
    """B: the largest power of two that is at most ``length`` and at most 2^16."""
    if length < 1:
        raise ValueError(f"a vector to rotate has at least one coordinate, got {length}")
    return min(MAX_BLOCK, 1 << (length.bit_length() - 1))


def pieces(length: int) -> Iterator[tuple[int, int]]:
    """The ranges [start, stop) that rotate independently: one block each, the last one together with the tail."""
    block = block_length(length)
    last = (length // block - 1) * block
    for start in range(0, last, block):
        yield start, start + block
    yield last, length


class BlockRotation:
    """Rotates the pieces of one vector forwards or back, through scratch memory that it reuses."""

    def __init__(self, length: int, seed: bytes) -> None:
        """For a vector of ``length`` coordinates and a public 32-byte seed."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a rotation seed has {SEED_BYTES} bytes, got {len(seed)}")
        self._block = block_length(length)
        self._length = length
        self._seed = seed
        self._scratch = scratch(self._block, np.float32)
        self._words = scratch(self._block, np.uint32)
        self._signs: KeystreamReader | None = None
        self._signs_at = -1

    def rotate(self, piece: Float32Array, start: int) -> None:
        """Rotates, in place, the piece that begins at coordinate ``start`` (one of :func:`pieces`)."""
        block = self._check_piece(piece, start)
        self._flip(piece[:block], start)
        self._transform(piece[:block])
        if len(piece) != block:
            tail = piece[-block:]
            self._flip_tail(tail)
            self._transform(tail)

    def unrotate(self, piece: Float32Array, start: int) -> None:
        """The inverse of :meth:`rotate`."""
        block = self._check_piece(piece, start)
        if len(piece) != block:
            tail = piece[-block:]
            self._transform(tail)
            self._flip_tail(tail)
        self._transform(piece[:block])
        self._flip(piece[:block], start)

    def _check_piece(self, piece: Float32Array, start: int) -> int:
        block = self._block
        last = (self._length // block - 1) * block
        expected = block if start < last else self._length - last
        if start % block or not 0 <= start <= last or len(piece) != expected:
            raise ValueError(
                f"[{start}, {start + len(piece)}) is not a piece of a rotation of {self._length} coordinates"
            )
        return block

    def _flip(self, block: Float32Array, start: int) -> None:
        if self._signs is None or self._signs_at != start:
            self._signs = KeystreamReader(self._seed[:KEY_BYTES], 4 * start)
        self._signs_at = start + len(block)
        self._apply(self._signs, block)

    def _flip_tail(self, block: Float32Array) -> None:
        self._apply(KeystreamReader(self._seed[KEY_BYTES:]), block)

    def _apply(self, signs: KeystreamReader, block: Float32Array) -> None:
        signs.read_into(self._words.view(np.uint8))
        np.bitwise_and(self._words, _SIGN_BIT, out=self._words)
        bits = block.view(np.uint32)
        np.bitwise_xor(bits, self._words, out=bits)

    def _transform(self, block: Float32Array) -> None:
        """Orthonormal Walsh–Hadamard transform of one block, in place."""
        size = len(block)
        low = 1 << ((size.bit_length() - 1) // 2)
        high = size // low
        # Both halves of the index are transformed along the first axis of a matrix, where rows are long and every
        # butterfly is one wide vector operation; the transposition between them is cheaper than short butterflies.
        rows = _butterflies(block.reshape(high, low), self._scratch.reshape(high, low))
        other = self._scratch if np.shares_memory(rows, block) else block
        columns = other.reshape(low, high)
        columns[...] = rows.T
        free = rows.reshape(low, high)
        result = _butterflies(columns, free)
        spare = free if result is columns else columns
        back = spare.reshape(high, low)
        back[...] = result.T
        np.multiply(back, np.float32(1 / np.sqrt(size)), out=block.reshape(high, low))


def _butterflies(source: Float32Array, spare: Float32Array) -> Float32Array:
    """Unnormalised transform along the first axis; returns whichever of the two matrices holds the result."""
    rows, columns = source.shape
    half = rows // 2
    while half:
        a = source.reshape(rows // (2 * half), 2, half * columns)
        b = spare.reshape(a.shape)
        np.add(a[:, 0], a[:, 1], out=b[:, 0])
        np.subtract(a[:, 0], a[:, 1], out=b[:, 1])
        source, spare = spare, source
        half //= 2
    return source
