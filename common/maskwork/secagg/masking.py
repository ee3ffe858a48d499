"""The data path of both sides: encode, mask and pack an update; add packed updates up; take masks off the sum.

Each tile of the update goes through all stages while it is in the cache, so that the vector is read twice (once to
check it and take its norm, once to encode it) and the packed bytes are written once.

What this deliberately is not: it derives no keys, knows no protocol state and decides nothing about who is in the sum.

Rules:
 1. Bad input is refused before the first byte of output is written.
 2. Memory beyond the caller's buffers is a few tiles, whatever d and however many keys.
 3. Keys are never part of a repr or of an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from maskwork.secagg.encoding import Encoding, EncodingError, TileEncoder, check_weight, checked_norm
from maskwork.secagg.prg import MaskStreams, SignedKey, add_keystreams_u32, add_keystreams_u64, check_key
from maskwork.secagg.ring import (
    TILE,
    BitPacker,
    Int32Array,
    UInt8Array,
    UInt32Array,
    UInt64Array,
    check_vector,
    packed_size,
    scratch,
)
from maskwork.secagg.rotation import Float32Array


@dataclass(frozen=True, slots=True)
class MaskingKeys:
    """Everything secret that goes into one participant's masked vectors of one session.

    Attributes:
        update: Self mask and pair masks of the segment ``update``.
        statistics: The same for the segment ``statistics``.
        rounding_key: 16 bytes, fresh for this session: the noise of stochastic rounding.
    """

    update: tuple[SignedKey, ...] = field(repr=False)
    statistics: tuple[SignedKey, ...] = field(repr=False)
    rounding_key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_key(self.rounding_key)


MOST_ROUNDINGS = 16
"""A bound that fits the encoding is missed with probability 2^-40 each time."""


class NoiseSource(Protocol):
    """Integer noise, read in order; `maskwork.privacy.noise` has it. A port: which noise it is, privacy decides."""

    def add_to(self, acc_i32: Int32Array) -> None:
        """Add the next len(acc) draws in place."""
        ...


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a differentially private plan asks of a participant's rounded update, before it is masked.

    Attributes:
        bound: The norm that the rounded update must not exceed, in integer units; it is rounded again if it does.
        order: Of that norm, 1 or 2.
        noise: Begins a fresh reading of the participant's noise at coordinate 0; None where the coordinator adds noise.
    """

    bound: float
    order: int
    noise: Callable[[], NoiseSource] | None = field(repr=False)

    def admits(self, norm: int) -> bool:
        """Whether sum |q| (order 1) or sum q² (order 2) is within the bound."""
        return norm <= (self.bound if self.order == 1 else self.bound * self.bound)


class MaskedTiles:
    """One update, encoded, masked and packed, tile by tile in order: for whoever writes it away as it comes.

    Iterating gives uint8 vectors, together the packed update of packed_size(d, ring_bits) bytes; each is overwritten by
    the next. Every iteration gives the same bytes.

    Attributes:
        clamped: How many coordinates were clamped, after a whole iteration.
    """

    def __init__(
        self,
        update_f32: Float32Array,
        weight: int,
        *,
        encoding: Encoding,
        keys: MaskingKeys,
        rotation_seed: bytes,
        contribution: Contribution | None = None,
    ) -> None:
        """Check the update; see :func:`mask_update`.

        Raises:
            EncodingError: The update, the weight or a length is refused.
        """
        check_weight(weight, encoding.weight_cap)
        self._norm = checked_norm(update_f32, order=2 if contribution is None else contribution.order)
        self._update, self._weight = update_f32, weight
        self._encoding, self._keys, self._rotation_seed = encoding, keys, rotation_seed
        self._contribution, self._attempt = contribution, 0
        self._encoder()  # refuses a rotation seed that is none, now rather than at the first tile
        if contribution is not None:  # before a byte is masked: what is masked is sent
            self._attempt = self._first_within(contribution)
        self.clamped = 0

    def __iter__(self) -> Iterator[UInt8Array]:
        """The packed tiles."""
        update, bits = self._update, self._encoding.ring_bits
        encoder, masks, packer = self._encoder(), MaskStreams(self._keys.update, item_bytes=4), BitPacker(bits)
        room = min(2 * TILE, len(update))
        ring, packed = scratch(room, np.uint32), scratch(packed_size(room, bits), np.uint8)
        noise = None if self._contribution is None or self._contribution.noise is None else self._contribution.noise()
        self.clamped = 0
        for start, stop in encoder.tiles():
            tile = ring[: stop - start]
            self.clamped += encoder.encode(update[start:stop], start, tile.view(np.int32))
            if noise is not None:
                noise.add_to(tile.view(np.int32))
            masks.add_to(tile)
            out = packed[: packed_size(len(tile), bits)]
            packer.pack(tile, out)
            yield out

    def _first_within(self, contribution: Contribution) -> int:
        """Conditional rounding (Kairouz, Liu, Steinke 2021, section 4.1): the first attempt within the bound."""
        for attempt in range(MOST_ROUNDINGS):
            if contribution.admits(self._norm_of(attempt)):
                return attempt
        raise EncodingError(
            f"the rounded update was beyond its bound {MOST_ROUNDINGS} times: that bound does not fit its encoding"
        )

    def _norm_of(self, attempt: int) -> int:
        """The exact sum of |q| or q² of the update as the attempt rounds it."""
        assert self._contribution is not None
        self._attempt = attempt
        encoder, total = self._encoder(), 0
        rounded = scratch(min(2 * TILE, len(self._update)), np.int32)
        for start, stop in encoder.tiles():
            tile = rounded[: stop - start]
            encoder.encode(self._update[start:stop], start, tile)
            wide = tile.astype(np.int64)  # |q| < 2^23, and a tile has at most 2^17 coordinates: their squares fit
            total += int(np.abs(wide).sum() if self._contribution.order == 1 else np.dot(wide, wide))
        return total

    def _encoder(self) -> TileEncoder:
        return TileEncoder(
            self._encoding,
            length=len(self._update),
            norm=self._norm,
            weight=self._weight,
            rotation_seed=self._rotation_seed,
            rounding_key=self._keys.rounding_key,
            attempt=self._attempt,
        )


def mask_update(
    update_f32: Float32Array,
    weight: int,
    *,
    encoding: Encoding,
    keys: MaskingKeys,
    rotation_seed: bytes,
    out_u8: UInt8Array,
    contribution: Contribution | None = None,
) -> int:
    """Encodes, masks and packs one update into memory.

    Args:
        update_f32: float32[d], contiguous.
        weight: n_i, from 1 to the weight cap.
        encoding: The session's encoding.
        keys: The participant's mask keys and rounding key.
        rotation_seed: 32 public bytes; not looked at without rotation.
        out_u8: uint8[packed_size(d, ring_bits)]; every byte is written.
        contribution: The bound and the noise of a differentially private plan.

    Returns:
        How many coordinates were clamped.

    Raises:
        EncodingError: The update, the weight or a length is refused; nothing was written.
    """
    tiles = MaskedTiles(
        update_f32, weight, encoding=encoding, keys=keys, rotation_seed=rotation_seed, contribution=contribution
    )
    _check_packed(out_u8, len(update_f32), encoding.ring_bits)
    at = 0
    for tile in tiles:
        out_u8[at : at + len(tile)] = tile
        at += len(tile)
    return tiles.clamped


def _check_packed(packed: UInt8Array, count: int, ring_bits: int) -> None:
    expected = packed_size(count, ring_bits)
    if packed.dtype != np.uint8 or packed.ndim != 1 or not packed.flags.c_contiguous or len(packed) != expected:
        raise EncodingError(
            f"{count} coordinates of {ring_bits} bits take {expected} bytes, "
            f"the packed buffer is {packed.dtype}{list(packed.shape)}"
        )


def mask_statistics(encoded_u64: UInt64Array, keys: Sequence[SignedKey]) -> bytes:
    """Masks encoded statistics.

    Args:
        encoded_u64: uint64[s], from ``encode_statistics``; left as it is.
        keys: The signed keys of the segment ``statistics``.

    Returns:
        8 s bytes, little-endian.
    """
    masked = encoded_u64.copy()
    add_keystreams_u64(masked, keys)
    return masked.astype("<u8").tobytes()


class Adder:
    """Adds packed vectors of one ring width to accumulators, through scratch memory that it reuses."""

    def __init__(self, ring_bits: int) -> None:
        """For vectors of ``ring_bits`` bits a coordinate."""
        self._bits = ring_bits
        self._packer = BitPacker(ring_bits)
        self._unpacked = scratch(TILE, np.uint32)

    def add(self, acc_u32: UInt32Array, packed_u8: UInt8Array) -> None:
        """Add one packed vector, or a part of one that begins with a byte, in place and modulo 2^32.

        Args:
            acc_u32: uint32[d]; may be a memory map.
            packed_u8: uint8[packed_size(d, ring_bits)]; may be a memory map.

        Raises:
            ValueError: Dtypes or lengths do not fit; the accumulator is as it was.
        """
        acc, packed = acc_u32.view(np.ndarray), packed_u8.view(np.ndarray)
        check_vector("accumulator", acc, np.dtype(np.uint32))
        _check_packed(packed, len(acc), self._bits)
        for start in range(0, len(acc), TILE):
            tile = acc[start : start + TILE]
            at = start * self._bits // 8
            part = self._unpacked[: len(tile)]
            self._packer.unpack(packed[at : at + packed_size(len(tile), self._bits)], part)
            np.add(tile, part, out=tile)


def accumulate(acc_u32: UInt32Array, packed_u8: UInt8Array, ring_bits: int) -> None:
    """Adds one packed vector to the accumulator, in place, modulo 2^32: the low r bits are right. See `Adder.add`."""
    Adder(ring_bits).add(acc_u32, packed_u8)


def accumulate_statistics(acc_u64: UInt64Array, masked: bytes) -> None:
    """Adds one participant's masked statistics to the accumulator, in place, modulo 2^64.

    Raises:
        EncodingError: ``masked`` is not 8 bytes per statistic; the accumulator is as it was.
    """
    check_vector("accumulator", acc_u64, np.dtype(np.uint64))
    if len(masked) != 8 * len(acc_u64):
        raise EncodingError(f"{len(acc_u64)} statistics take {8 * len(acc_u64)} bytes, got {len(masked)}")
    np.add(acc_u64, np.frombuffer(masked, "<u8"), out=acc_u64)


def remove_masks(acc_u32: UInt32Array, keys: Sequence[SignedKey], start: int = 0) -> None:
    """Takes keystreams off coordinates [start, start + len(acc_u32)) of the sum, in place, modulo 2^32.

    Args:
        acc_u32: That range of the accumulator (a slice, a memory map), so that processes can split the work.
        keys: The masks as they stand in the sum: what was added there is subtracted here, and the reverse.
        start: Coordinate of ``acc_u32[0]``.
    """
    add_keystreams_u32(acc_u32.view(np.ndarray), _inverted(keys), start)


def remove_statistics_masks(acc_u64: UInt64Array, keys: Sequence[SignedKey]) -> None:
    """The same for the statistics, modulo 2^64."""
    add_keystreams_u64(acc_u64, _inverted(keys))


def _inverted(keys: Sequence[SignedKey]) -> list[SignedKey]:
    return [SignedKey(key.key, not key.negative) for key in keys]
