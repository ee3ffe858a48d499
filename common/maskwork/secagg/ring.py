"""Arithmetic modulo 2^r on uint32 vectors, and their bit-packed form on the wire (8 <= r <= 32).

A vector travels as one little-endian bit string: coordinate ``i`` occupies bits ``i*r .. i*r + r - 1``, bit ``j`` of
the string is bit ``j % 8`` of byte ``j // 8``, and the unused high bits of the last byte are zero. Its length is
``ceil(count * r / 8)`` bytes. A tile whose coordinate count is a multiple of 8 ends on a byte boundary, so tiles can be
packed one after the other into one buffer.

What this deliberately is not: it holds no keys, does no masking and knows no floats. It never reduces an accumulator
on the way: sums run modulo 2^32, and because 2^r divides 2^32 one reduction at the end is enough.

Rules:
 1. The cost per coordinate does not depend on its value: nothing branches on data.
 2. Scratch memory is a few tiles, whatever the length of the vector.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

MIN_BITS = 8
MAX_BITS = 32
TILE = 1 << 16
"""Coordinates per tile: 256 KiB of uint32, so that a tile and its scratch stay in the L2 cache."""

CACHE_LINE = 64  # bytes
_GROUP = 64  # coordinates; 64 * r bits are whole 64-bit words for every r

UInt8Array = NDArray[np.uint8]
UInt32Array = NDArray[np.uint32]
UInt64Array = NDArray[np.uint64]
Int32Array = NDArray[np.int32]
ScalarT = TypeVar("ScalarT", bound=np.generic)


def scratch(count: int, dtype: type[ScalarT]) -> NDArray[ScalarT]:
    """A zeroed vector that starts on a cache line: wide loads that straddle two lines cost a quarter of the speed."""
    wanted = count * np.dtype(dtype).itemsize
    raw = np.zeros(wanted + CACHE_LINE, np.uint8)
    skipped = -raw.ctypes.data % CACHE_LINE
    return raw[skipped : skipped + wanted].view(dtype)


def check_bits(bits: int) -> None:
    """Raises ValueError unless ``bits`` is a ring width from 8 to 32."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"ring width must be {MIN_BITS} to {MAX_BITS} bits, got {bits}")


def ring_modulus(bits: int) -> int:
    """The modulus 2^bits."""
    check_bits(bits)
    return 1 << bits


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` coordinates of ``bits`` bits take on the wire: ceil(count * bits / 8)."""
    check_bits(bits)
    if count < 0:
        raise ValueError(f"a vector cannot have {count} coordinates")
    return (count * bits + 7) // 8


def reduce_in_place(values: UInt32Array, bits: int) -> None:
    """Reduces every coordinate modulo 2^bits, in place."""
    np.bitwise_and(values, np.uint32(ring_modulus(bits) - 1), out=values)


def centre(values: UInt32Array, bits: int, out: Int32Array) -> None:
    """Writes the representative in [-2^(bits-1), 2^(bits-1)) of each coordinate modulo 2^bits.

    Args:
        values: uint32, any representatives modulo 2^bits (bits above ``bits`` are ignored).
        bits: ring width r.
        out: int32 of the same length; may share memory with ``values`` when it starts at the same address.
    """
    check_bits(bits)
    if out.shape != values.shape:
        raise ValueError(f"out has shape {out.shape}, values have {values.shape}")
    shift = MAX_BITS - bits
    # The shift left drops the foreign bits, the arithmetic shift right brings the sign back.
    np.left_shift(values, np.uint32(shift), out=out.view(np.uint32))
    np.right_shift(out, np.int32(shift), out=out)


def pack(values: UInt32Array, bits: int, out: UInt8Array) -> None:
    """Packs the low ``bits`` bits of every coordinate; see :meth:`BitPacker.pack`."""
    BitPacker(bits, tile=_tile_for(len(values))).pack(values, out)


def unpack(packed: UInt8Array, bits: int, out: UInt32Array) -> None:
    """Unpacks into ``out``, whose length says how many coordinates there are; see :meth:`BitPacker.unpack`."""
    BitPacker(bits, tile=_tile_for(len(out))).unpack(packed, out)


def _tile_for(count: int) -> int:
    return min(TILE, _round_up(max(count, 1)))


def _round_up(count: int) -> int:
    return -(-count // _GROUP) * _GROUP


class BitPacker:
    """Packs and unpacks vectors of one ring width through scratch memory that it reuses.

    Two neighbours first become one unit of ``2r`` bits in a 64-bit lane. A group of 4 coordinates (8, where 4 do not
    fill whole bytes or fill fewer than 8) is then put together as 64-bit words, one column of all groups at a time, and
    each column is stored at the stride of a group. The last word of a group reaches into the next group, so columns
    are stored from the last to the first: what a word spoils is stored after it.
    """

    def __init__(self, bits: int, *, tile: int = TILE) -> None:
        """Allocates scratch for tiles of ``tile`` coordinates, a multiple of 64."""
        check_bits(bits)
        if tile <= 0 or tile % _GROUP:
            raise ValueError(f"tile must be a positive multiple of {_GROUP} coordinates, got {tile}")
        self._bits = bits
        self._tile = tile
        self._whole = {8: "u1", 16: "<u2", 32: "<u4"}.get(bits)
        if self._whole is not None:
            return
        self._together = 4 if bits % 2 == 0 and bits >= 16 else 8
        self._stride = self._together * bits // 8
        self._words = -(-self._stride // 8)
        self._padded = scratch(tile, np.uint32)
        self._units = scratch(tile // 2, np.uint64)
        self._other = scratch(tile // 2, np.uint64)
        self._bytes = scratch(packed_size(tile, bits) + 8, np.uint8)

    def pack(self, values: UInt32Array, out: UInt8Array) -> None:
        """Packs the low bits of every coordinate.

        Args:
            values: uint32[count], C-contiguous; bits above the ring width are ignored.
            out: uint8[packed_size(count, bits)], C-contiguous; every byte is written.

        Raises:
            ValueError: A length, dtype or layout does not fit.
        """
        check_vector("values", values, np.dtype(np.uint32))
        check_vector("packed", out, np.dtype(np.uint8))
        self._check_lengths(len(values), len(out))
        for start in range(0, len(values), self._tile):
            tile = values[start : start + self._tile]
            at = start * self._bits // 8
            self._pack_tile(tile, out[at : at + packed_size(len(tile), self._bits)])

    def unpack(self, packed: UInt8Array, out: UInt32Array) -> None:
        """Unpacks as many coordinates as ``out`` holds.

        Args:
            packed: uint8[packed_size(count, bits)], C-contiguous. Unused bits of the last byte are ignored.
            out: uint32[count], C-contiguous; every value written is below 2^bits.

        Raises:
            ValueError: A length, dtype or layout does not fit.
        """
        check_vector("packed", packed, np.dtype(np.uint8))
        check_vector("out", out, np.dtype(np.uint32))
        self._check_lengths(len(out), len(packed))
        for start in range(0, len(out), self._tile):
            tile = out[start : start + self._tile]
            at = start * self._bits // 8
            self._unpack_tile(packed[at : at + packed_size(len(tile), self._bits)], tile)

    def _check_lengths(self, count: int, size: int) -> None:
        expected = packed_size(count, self._bits)
        if size != expected:
            raise ValueError(f"{count} coordinates of {self._bits} bits take {expected} bytes, the buffer has {size}")

    def _pack_tile(self, values: UInt32Array, out: UInt8Array) -> None:
        if self._whole is not None:
            np.copyto(out.view(self._whole), values, casting="unsafe")
            return
        count = _round_up(len(values))
        if count != len(values):
            padded = self._padded[:count]
            padded[: len(values)] = values
            padded[len(values) :] = 0
            values = padded
        units = self._join_pairs(values.view(np.uint64)).reshape(-1, self._together // 2)
        for j in range(self._words - 1, -1, -1):
            self._column(j, len(units))[...] = self._word_of_units(units, j)
        out[...] = self._bytes[: len(out)]

    def _unpack_tile(self, packed: UInt8Array, out: UInt32Array) -> None:
        if self._whole is not None:
            np.copyto(out, packed.view(self._whole))
            return
        count = _round_up(len(out))
        target = out if count == len(out) else self._padded[:count]
        self._bytes[: len(packed)] = packed  # coordinates past the end come out as rubbish and are not copied on
        units = self._units[: count // 2]
        self._units_of_words(units.reshape(-1, self._together // 2))
        self._split_pairs(units, target.view(np.uint64))
        if target is not out:
            out[...] = target[: len(out)]

    def _column(self, word: int, groups: int) -> UInt64Array:
        """The ``word``-th 64 bits of every group, where they stand in the packed bytes: unaligned, one group apart."""
        return np.ndarray((groups,), np.dtype("<u8"), self._bytes.data, 8 * word, (self._stride,))

    def _join_pairs(self, lanes: UInt64Array) -> UInt64Array:
        """Lanes ``low | high << 32`` of two coordinates become units ``low | high << r`` with zeros above."""
        bits, low = self._bits, (1 << self._bits) - 1
        units, other = self._units[: len(lanes)], self._other[: len(lanes)]
        np.bitwise_and(lanes, np.uint64(low), out=units)
        np.right_shift(lanes, np.uint64(32 - bits), out=other)
        np.bitwise_and(other, np.uint64(low << bits), out=other)
        np.bitwise_or(units, other, out=units)
        return units

    def _split_pairs(self, units: UInt64Array, lanes: UInt64Array) -> None:
        """The inverse of ``_join_pairs``; whatever stands above the 2r bits of a unit is dropped."""
        bits, low = self._bits, (1 << self._bits) - 1
        other = self._other[: len(units)]
        np.left_shift(units, np.uint64(32 - bits), out=other)
        np.bitwise_and(other, np.uint64(low << 32), out=other)
        np.bitwise_and(units, np.uint64(low), out=lanes)
        np.bitwise_or(lanes, other, out=lanes)

    def _word_of_units(self, units: UInt64Array, j: int) -> UInt64Array:
        """Bits 64 j .. 64 j + 63 of every group; ``units`` has a row for each group."""
        width, groups = 2 * self._bits, len(units)
        first, last = 64 * j // width, min(-(-64 * (j + 1) // width), units.shape[1])
        word, part = self._other[:groups], self._other[groups : 2 * groups]
        np.right_shift(units[:, first], np.uint64(64 * j - width * first), out=word)
        for k in range(first + 1, last):
            np.left_shift(units[:, k], np.uint64(width * k - 64 * j), out=part)
            np.bitwise_or(word, part, out=word)
        return word

    def _units_of_words(self, units: UInt64Array) -> None:
        """The inverse: fills the units of every group from its words, with rubbish above their 2r bits."""
        width, groups = 2 * self._bits, len(units)
        word, part = self._other[:groups], self._other[groups : 2 * groups]
        for k in range(units.shape[1]):
            j, shift = divmod(width * k, 64)
            np.right_shift(self._column(j, groups), np.uint64(shift), out=word)
            if shift + width > 64:
                np.left_shift(self._column(j + 1, groups), np.uint64(64 - shift), out=part)
                np.bitwise_or(word, part, out=word)
            units[:, k] = word


def check_vector(name: str, array: NDArray[np.generic], dtype: np.dtype[np.generic]) -> None:
    """Raises ValueError unless ``array`` is a contiguous vector of that dtype."""
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a contiguous 1-d {dtype} array, got {array.ndim}-d {array.dtype}")
