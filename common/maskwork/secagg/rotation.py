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

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from maskwork.secagg.prg import KEY_BYTES, KeystreamReader
from maskwork.secagg.ring import scratch

SEED_BYTES = 2 * KEY_BYTES
MAX_BLOCK = 1 << 16

Float32Array = NDArray[np.float32]

_BUFFER_ELEMENTS = 256
# Rows of a power of two bytes would all fall into the same few cache sets when they are read column by column.
_PADDING = 16
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
        self._padded = scratch(self._block + _PADDING * 2 * math.isqrt(self._block), np.float32)
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
        # Each half of the index is transformed along the first axis of a matrix, where every butterfly is one wide
        # vector operation; the two transpositions are cheaper than butterflies between close neighbours.
        with np.errstate():  # also brings the buffer size back
            # numpy copies strided operands whose rows are shorter than its buffer: four times the time of the addition.
            np.setbufsize(_BUFFER_ELEMENTS)
            self._transform_rows(block.reshape(high, low), self._scratch.reshape(low, high))
            self._transform_rows(self._scratch.reshape(low, high), block.reshape(high, low))
        np.multiply(block, np.float32(1 / math.sqrt(size)), out=block)

    def _transform_rows(self, source: Float32Array, out: Float32Array) -> None:
        """Writes the transpose of the unnormalised transform along the first axis; ``source`` is overwritten."""
        rows, columns = source.shape
        padded = self._padded[: rows * (columns + _PADDING)].reshape(rows, -1)[:, :columns]
        spare = out.reshape(rows, columns)
        half = rows // 2
        while half > 1:
            _butterfly(source, spare, half)
            source, spare = spare, source
            half //= 2
        if half:
            _butterfly(source, padded, half)
        else:
            padded[...] = source
        out[...] = padded.T


def _butterfly(source: Float32Array, target: Float32Array, half: int) -> None:
    """One stage along the first axis: sums and differences of the rows that lie ``half`` rows apart."""
    rows, columns = source.shape
    groups = rows // (2 * half)
    a, b = source.reshape(groups, 2, half, columns), target.reshape(groups, 2, half, columns)
    np.add(a[:, 0], a[:, 1], out=b[:, 0])
    np.subtract(a[:, 0], a[:, 1], out=b[:, 1])
