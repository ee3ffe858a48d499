"""Integer noise from a keystream: coordinate i of a key is always the same draw, whatever the tiling.

A draw takes 64 bits of AES-128-CTR under the key's first half, at byte 8 i. Its low k bits choose a column of the alias
table, the rest is compared with the column's threshold. Where they are equal, at one draw in 2^(64 - k), 64 bits of the
key's second half, at byte 8 i of that stream, are compared with the threshold's other 64. So a draw is exact to 2^-128.

What this deliberately is not: it knows no privacy parameters and never looks at what the noise is added to.

Rules:
 1. A key makes one vector of noise, once: keys are fresh for each session and segment.
 2. The bits come from a cipher. No general-purpose generator, no float anywhere.
 3. Which columns are read depends on secret bits, so the time of a draw may tell another process *on the same machine*
    something through its caches; nothing of it crosses the network.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from maskwork.privacy.tables import AliasTable
from maskwork.secagg.prg import KEY_BYTES, KeystreamReader, keystream
from maskwork.secagg.ring import TILE, Int32Array, scratch

NOISE_KEY_BYTES: Final = 2 * KEY_BYTES


class IntegerNoise:
    """The noise of one key, read in order."""

    def __init__(self, table: AliasTable, key: bytes, start: int = 0) -> None:
        """Begin at coordinate `start`.

        Args:
            table: The distribution.
            key: 32 secret bytes, fresh.
            start: Coordinate of the first draw.
        """
        if len(key) != NOISE_KEY_BYTES:
            raise ValueError(f"a noise key has {NOISE_KEY_BYTES} bytes, got {len(key)}")
        self._table, self._at = table, start
        self._bits = KeystreamReader(key[:KEY_BYTES], 8 * start)
        self._finer = key[KEY_BYTES:]
        self._mask = np.uint64((1 << table.column_bits) - 1)
        self._drawn, self._against = scratch(TILE, np.uint64), scratch(TILE, np.uint64)
        self._column = scratch(TILE, np.int64)
        self._below, self._values = scratch(TILE, np.bool_), scratch(TILE, np.int32)

    def add_to(self, acc_i32: Int32Array) -> None:
        """Add the next len(acc) draws in place; an int32 must have room for them, and nothing is clamped."""
        for at in range(0, len(acc_i32), TILE):
            tile = acc_i32[at : at + TILE]
            np.add(tile, self._draw(len(tile)), out=tile)

    def _draw(self, count: int) -> Int32Array:
        table = self._table
        drawn, against, below = self._drawn[:count], self._against[:count], self._below[:count]
        column, values = self._column[:count], self._values[:count]
        self._bits.read_into(drawn.view(np.uint8))
        np.bitwise_and(drawn, self._mask, out=column.view(np.uint64))
        # "clip" only because numpy buffers `out` under "raise"; no index is ever out of range.
        np.take(table.high, column, out=against, mode="clip")
        np.less(drawn, against, out=below)
        np.subtract(drawn, against, out=against)
        if against.min() <= self._mask:
            self._decide(np.flatnonzero(against <= self._mask), column, below)
        np.add(column, column, out=column)
        np.add(column, below.view(np.int8), out=column)
        np.take(table.values, column, out=values, mode="clip")
        self._at += count
        return values

    def _decide(self, undecided: NDArray[np.intp], column: NDArray[np.int64], below: NDArray[np.bool_]) -> None:
        """Compare the lower halves of the thresholds whose upper halves were equal."""
        for i in undecided:
            finer = int.from_bytes(keystream(self._finer, 8 * (self._at + int(i)), 8), "little")
            below[i] = finer < int(self._table.low[column[i]])


def noise(table: AliasTable, key: bytes, count: int) -> Int32Array:
    """The first `count` draws of a key: int32[count]."""
    drawn = np.zeros(count, np.int32)
    IntegerNoise(table, key).add_to(drawn)
    return drawn
