"""From a float32 update to ring integers and back: clip, weight, (rotate,) scale, round stochastically, clamp.

``x -> round(x * min(1, C / |x|_2) * n_i / n_cap * S / R)`` with ``S = 2^(b-1) - 1``. The range is ``R = C`` without
rotation; with it, ``R = 5 C / sqrt(B)`` where ``B`` is the block length of :mod:`maskwork.secagg.rotation`. The sum of
all encoded updates, divided by the sum of the weights, is the weighted mean: the weights are inside the vector.
Statistics are fixed point with 20 fractional bits in a 64-bit ring, and exact.

Stochastic rounding of a float32 ``y``: ``f = floor(y)``, ``q = f + floor((y - f) + u)``; ``u`` is the top 23 bits
of the coordinate's little-endian uint32 in AES-128-CTR under the session's rounding key, times 2^-23. So the
expectation of ``q`` is ``y`` to float32 precision, and a coordinate's rounding depends on its offset and nothing else.

What this deliberately is not: there is no mask and no noise here, and nothing here decides which bounds are acceptable.

Rules:
 1. A session encodes once: the same update, parameters and rounding key give the same integers, whatever the tiling.
 2. Bad input is refused before the first output is written, and the error says which and where, never the value.
 3. No float64 copy of a vector: float64 exists for one tile at a time, in the norm.
 4. The integers are clamped to [-S, S]; that is what makes ``n * S < 2^(r-1)`` a proof that no sum wraps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import numpy as np

from maskwork.secagg.prg import KeystreamReader
from maskwork.secagg.ring import (
    MAX_BITS,
    MIN_BITS,
    TILE,
    Int32Array,
    UInt32Array,
    UInt64Array,
    centre,
    scratch,
)
from maskwork.secagg.rotation import BlockRotation, Float32Array, block_length, pieces

MIN_VALUE_BITS = 2
MAX_WEIGHT_CAP = (1 << 31) - 1
MIN_CLIP_NORM = 2.0**-60
MAX_CLIP_NORM = 2.0**60
"""Within these the scale and its inverse are ordinary float32 numbers for every ring width and weight."""

ROTATED_RANGE = 5.0
"""Standard deviations of a rotated coordinate that the value range covers."""

STATISTICS_SCALE = 1 << 20

_NORM_TILE = 1 << 13  # float64 scratch of 64 KiB
_NOISE_UNIT = np.float32(2.0**-23)


class EncodingParameterError(ValueError):
    """The parameters of an encoding do not hold together; no session may use them."""


class EncodingError(ValueError):
    """An update, a weight or a statistic cannot be encoded. The message says which and where, never a value."""


class Rotation(Enum):
    """What is done to the update before it is scaled."""

    NONE = "none"
    HADAMARD = "hadamard"


@dataclass(frozen=True, slots=True)
class Encoding:
    """The encoding of one session, as the plan fixes it.

    Attributes:
        clip_norm: C, the largest L2 norm of an unweighted update.
        weight_cap: n_cap, the largest weight (number of examples) of one participant.
        value_bits: b; a participant's integers lie in [-S, S], S = 2^(b-1) - 1.
        ring_bits: r; sums are taken modulo 2^r.
        rotation: Whether coordinates are spread by a public rotation first.

    Raises:
        EncodingParameterError: A field is out of range.
    """

    clip_norm: float
    weight_cap: int
    value_bits: int
    ring_bits: int
    rotation: Rotation

    def __post_init__(self) -> None:
        if type(self.clip_norm) is not float or not MIN_CLIP_NORM <= self.clip_norm <= MAX_CLIP_NORM:
            raise EncodingParameterError(
                f"clip_norm must be a float from {MIN_CLIP_NORM:.3g} to {MAX_CLIP_NORM:.3g}, got {self.clip_norm!r}"
            )
        _check_int("weight_cap", self.weight_cap, 1, MAX_WEIGHT_CAP)
        _check_int("ring_bits", self.ring_bits, MIN_BITS, MAX_BITS)
        _check_int("value_bits", self.value_bits, MIN_VALUE_BITS, self.ring_bits)
        if type(self.rotation) is not Rotation:
            raise EncodingParameterError(f"rotation must be a Rotation, got {self.rotation!r}")

    @property
    def scale(self) -> int:
        """S = 2^(b-1) - 1, the largest integer that one participant contributes to a coordinate."""
        return (1 << (self.value_bits - 1)) - 1

    def value_range(self, length: int) -> float:
        """R: the real number that is encoded as S, for a vector of ``length`` coordinates."""
        if self.rotation is Rotation.NONE:
            return self.clip_norm
        return ROTATED_RANGE * self.clip_norm / math.sqrt(block_length(length))


def _check_int(name: str, value: int, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise EncodingParameterError(f"{name} must be an integer from {least} to {most}, got {value!r}")


def check_capacity(encoding: Encoding, cohort: int) -> None:
    """Refuses an encoding whose sum over ``cohort`` participants could wrap.

    Raises:
        EncodingParameterError: Unless cohort * S < 2^(r-1), or if the cohort is not a positive integer.
    """
    _check_int("cohort", cohort, 1, 1 << MAX_BITS)
    if cohort * encoding.scale >= 1 << (encoding.ring_bits - 1):
        needed = (cohort * encoding.scale).bit_length() + 1
        raise EncodingParameterError(
            f"{cohort} participants of {encoding.value_bits}-bit values overflow a {encoding.ring_bits}-bit ring: "
            f"use ring_bits >= {needed}, or fewer value_bits"
        )


def preset(name: str, *, cohort: int, clip_norm: float, weight_cap: int) -> Encoding:
    """The encoding of that name for ``cohort`` participants.

    Args:
        name: "exact" (b = min(24, 32 - ceil(log2 n)), no rotation) or "compact" (b = 16, rotated);
            r = b + ceil(log2 n) in both.
        cohort: n, the number of participants in the roster.
        clip_norm: C.
        weight_cap: n_cap.

    Raises:
        EncodingParameterError: No such preset, or it does not fit the cohort.
    """
    _check_int("cohort", cohort, 1, 1 << (MAX_BITS - MIN_VALUE_BITS))
    headroom = (cohort - 1).bit_length()
    if name == "exact":
        value_bits, rotation = min(24, MAX_BITS - headroom), Rotation.NONE
    elif name == "compact":
        value_bits, rotation = 16, Rotation.HADAMARD
    else:
        raise EncodingParameterError(f'there is no encoding preset {name!r}; the presets are "exact" and "compact"')
    if value_bits + headroom > MAX_BITS:
        raise EncodingParameterError(f"the {name} preset holds up to {1 << (MAX_BITS - value_bits)} participants")
    encoding = Encoding(clip_norm, weight_cap, value_bits, value_bits + headroom, rotation)
    assert cohort * encoding.scale < 1 << (encoding.ring_bits - 1)  # n <= 2^headroom and S < 2^(b-1)
    return encoding


def check_weight(weight: int, weight_cap: int) -> None:
    """Raises EncodingError unless ``weight`` is an int (not a bool, not a float) from 1 to the cap."""
    if type(weight) is not int:
        raise EncodingError(f"weight must be an int, got {type(weight).__name__}")
    if not 1 <= weight <= weight_cap:
        raise EncodingError(f"weight {weight} is not from 1 to the weight cap {weight_cap}")


def checked_norm(update: Float32Array, *, order: int = 2) -> float:
    """The L2 norm (L1 if `order` is 1) of a float32 update, in float64; reads the vector once and writes nothing.

    Raises:
        EncodingError: Not a contiguous 1-d float32 array, empty, or it holds NaN or Inf (the message tells how many
            and the index of the first).
    """
    kind = getattr(update, "dtype", type(update).__name__)  # whoever calls may hold a list or a tensor
    if kind != np.float32:
        raise EncodingError(f"update must be a float32 array, got {kind}")
    if update.ndim != 1 or not update.flags.c_contiguous or len(update) == 0:
        raise EncodingError(f"update must be a contiguous, non-empty vector, got shape {update.shape}")
    tile64 = scratch(min(_NORM_TILE, len(update)), np.float64)
    total = 0.0
    for start in range(0, len(update), _NORM_TILE):
        part = update[start : start + _NORM_TILE]
        wide = tile64[: len(part)]
        np.copyto(wide, part)
        total += float(np.dot(wide, wide) if order == 2 else np.abs(wide, out=wide).sum())
    if not math.isfinite(total):  # the square of a finite float32 is far from the end of float64
        _refuse_non_finite(update)
    return math.sqrt(total) if order == 2 else total


def _refuse_non_finite(update: Float32Array) -> None:
    bad = ~np.isfinite(update)
    nan = int(np.isnan(update).sum())
    count = int(bad.sum())
    raise EncodingError(
        f"update has {count} non-finite coordinates of {len(update)} ({nan} NaN, {count - nan} Inf), "
        f"the first at index {int(np.argmax(bad))}"
    )


class TileEncoder:
    """Encodes one checked update, tile by tile in order, through scratch memory that it reuses.

    It is used by the masking data path, which masks and packs each tile while it is in the cache.
    """

    def __init__(
        self,
        encoding: Encoding,
        *,
        length: int,
        norm: float,
        weight: int,
        rotation_seed: bytes,
        rounding_key: bytes,
        attempt: int = 0,
    ) -> None:
        """Fixes the multiplier of this update.

        Args:
            encoding: The session's encoding.
            length: d, the number of coordinates.
            norm: The L2 norm of the update, from :func:`checked_norm`.
            weight: n_i, checked by :func:`check_weight`.
            rotation_seed: 32 public bytes; not looked at without rotation.
            rounding_key: 16 secret bytes, fresh for this session.
            attempt: How often the vector was rounded before and found too long; each goes on in the key's stream.
        """
        rotated = encoding.rotation is Rotation.HADAMARD
        self._rotation = BlockRotation(length, rotation_seed) if rotated else None
        self._length = length
        self._limit = _largest_float32_up_to(encoding.scale)
        self._multiplier = _multiplier(encoding, length=length, norm=norm, weight=weight)
        # No coordinate is beyond the norm, so where the scaled norm is within the limit nobody has to look for one
        # that is not; most sites' weights are far below the cap. A rotation's limit is far below the norm.
        self._within = not rotated and norm * float(self._multiplier) * (1 + 2.0**-20) + 1 <= self._limit
        self._noise = KeystreamReader(rounding_key, 4 * length * attempt)
        room = min(length, 2 * TILE if rotated else TILE)
        self._scaled, self._floor = scratch(room, np.float32), scratch(room, np.float32)
        self._words = scratch(room, np.uint32)

    def tiles(self) -> list[tuple[int, int]]:
        """The ranges to pass to :meth:`encode`, in order. Every start is a multiple of 8."""
        return _ranges(0, self._length, length=self._length, rotated=self._rotation is not None)

    def encode(self, tile: Float32Array, start: int, out: Int32Array) -> int:
        """Writes the integers of the tile that begins at ``start``; returns how many were clamped."""
        count = len(tile)
        y, f, words = self._scaled[:count], self._floor[:count], self._words[:count]
        np.multiply(tile, self._multiplier, out=y)
        if self._rotation is not None:
            self._rotation.rotate(y, start)
        np.floor(y, out=f)
        np.subtract(y, f, out=y)
        self._noise.read_into(words.view(np.uint8))
        np.right_shift(words, np.uint32(9), out=words)
        # 23 bits are non-negative as int32 too, whose conversion to float32 is the faster one.
        u = words.view(np.float32)
        np.copyto(u, words.view(np.int32), casting="unsafe")
        np.multiply(u, _NOISE_UNIT, out=u)
        np.add(y, u, out=y)
        np.floor(y, out=y)
        np.add(f, y, out=f)
        clamped = self._clamp(f)
        np.copyto(out, f, casting="unsafe")
        return clamped

    def _clamp(self, values: Float32Array) -> int:
        limit = self._limit
        if self._within or (values.max() <= limit and values.min() >= -limit):
            return 0
        clamped = int(np.count_nonzero(np.abs(values) > limit))
        np.clip(values, -limit, limit, out=values)
        return clamped


def _largest_float32_up_to(value: int) -> np.float32:
    nearest = np.float32(value)
    return nearest if int(nearest) <= value else np.nextafter(nearest, np.float32(0))


def _multiplier(encoding: Encoding, *, length: int, norm: float, weight: int) -> np.float32:
    clip = encoding.clip_norm / norm if norm > encoding.clip_norm else 1.0
    multiplier = clip * weight / encoding.weight_cap * encoding.scale / encoding.value_range(length)
    return np.float32(multiplier)


def encode_update(
    update: Float32Array,
    weight: int,
    *,
    encoding: Encoding,
    rotation_seed: bytes,
    rounding_key: bytes,
    out_i32: Int32Array,
) -> int:
    """Encodes a whole update without masking it.

    Args:
        update: float32[d].
        weight: n_i, from 1 to the weight cap.
        encoding: The session's encoding.
        rotation_seed: 32 public bytes; not looked at without rotation.
        rounding_key: 16 secret bytes, fresh for this session.
        out_i32: int32[d]; receives integers in [-S, S].

    Returns:
        How many coordinates were clamped.

    Raises:
        EncodingError: The update or the weight is refused; nothing was written.
    """
    check_weight(weight, encoding.weight_cap)
    norm = checked_norm(update)
    if out_i32.shape != update.shape or out_i32.dtype != np.int32:
        raise EncodingError(f"update has {len(update)} coordinates, out is {out_i32.dtype}{list(out_i32.shape)}")
    encoder = TileEncoder(
        encoding,
        length=len(update),
        norm=norm,
        weight=weight,
        rotation_seed=rotation_seed,
        rounding_key=rounding_key,
    )
    return sum(encoder.encode(update[a:b], a, out_i32[a:b]) for a, b in encoder.tiles())


def decode_sum(
    ring_sum_u32: UInt32Array,
    encoding: Encoding,
    *,
    rotation_seed: bytes,
    total_weight: int,
    out_f32: Float32Array,
    start: int = 0,
    length: int | None = None,
) -> None:
    """Turns the unmasked sum, or a range of it, into the weighted mean of the clipped updates.

    Args:
        ring_sum_u32: uint32[d], the sum modulo 2^r (bits above r are ignored); left as it is.
        encoding: The session's encoding.
        rotation_seed: The 32 public bytes used for encoding; not looked at without rotation.
        total_weight: Sum of the survivors' weights, from the statistics.
        out_f32: float32[d]; receives the mean.
        start: Where this range begins in the whole vector, for processes that split the work.
        length: Coordinates of the whole vector if this is a range of it. A range of a rotated vector begins and ends
            at a multiple of the block length; the last one holds the last whole block and the tail.

    Raises:
        ValueError: Lengths differ, the total weight is not positive, or the range cannot be decoded alone.
    """
    length = start + len(ring_sum_u32) if length is None else length
    if out_f32.shape != ring_sum_u32.shape or ring_sum_u32.ndim != 1 or len(out_f32) == 0:
        raise ValueError(f"the sum has shape {ring_sum_u32.shape}, the mean {out_f32.shape}: need equal vectors")
    if total_weight <= 0:
        raise ValueError(f"the total weight must be positive, got {total_weight}")
    step = encoding.value_range(length) / encoding.scale * encoding.weight_cap / total_weight
    rotated = encoding.rotation is Rotation.HADAMARD
    rotation = BlockRotation(length, rotation_seed) if rotated else None
    for begin, end in _ranges(start, start + len(out_f32), length=length, rotated=rotated):
        tile = out_f32[begin - start : end - start]
        centred = tile.view(np.int32)
        centre(ring_sum_u32[begin - start : end - start], encoding.ring_bits, centred)
        np.copyto(tile, centred, casting="unsafe")
        np.multiply(tile, np.float32(step), out=tile)
        if rotation is not None:
            rotation.unrotate(tile, begin)


def _ranges(start: int, stop: int, *, length: int, rotated: bool) -> list[tuple[int, int]]:
    if not 0 <= start < stop <= length:
        raise ValueError(f"[{start}, {stop}) is not a range of a vector of {length} coordinates")
    if not rotated:
        return [(a, min(a + TILE, stop)) for a in range(start, stop, TILE)]
    inside = [(a, b) for a, b in pieces(length) if a < stop and start < b]
    if inside[0][0] != start or inside[-1][1] != stop:
        raise ValueError(
            f"[{start}, {stop}) cuts a block of a rotated vector of {length} coordinates: "
            f"split at multiples of {block_length(length)} and leave the last whole block together with the tail"
        )
    return inside


def encode_statistics(values: Sequence[float], bounds: Sequence[float], names: Sequence[str]) -> UInt64Array:
    """Fixed point with 20 fractional bits, modulo 2^64, rounded to nearest (ties to even).

    Args:
        values: One number per statistic.
        bounds: The plan's bound B of each; |value| <= B.
        names: Their names, for the error.

    Returns:
        uint64[len(values)].

    Raises:
        EncodingError: Lengths differ, or a statistic is NaN, Inf or beyond its bound; the message names it.
    """
    if not len(values) == len(bounds) == len(names):
        raise EncodingError(f"{len(values)} statistics, {len(bounds)} bounds and {len(names)} names: need equally many")
    encoded = np.zeros(len(values), np.uint64)
    for i, (value, bound, name) in enumerate(zip(values, bounds, names, strict=True)):
        if not math.isfinite(value):
            raise EncodingError(f"statistic {name!r} (index {i}) is NaN or Inf")
        if abs(value) > bound:
            raise EncodingError(f"statistic {name!r} (index {i}) is beyond its bound {bound}")
        encoded[i] = round(Fraction(float(value)) * STATISTICS_SCALE) % (1 << 64)
    return encoded


def check_statistics_capacity(bounds: Sequence[float], cohort: int) -> None:
    """Refuses statistics whose sum over ``cohort`` participants could wrap.

    Raises:
        EncodingParameterError: A bound B is not positive and finite, or cohort * B * 2^20 >= 2^63.
    """
    for i, bound in enumerate(bounds):
        if not (math.isfinite(bound) and bound > 0):
            raise EncodingParameterError(f"the bound of statistic {i} must be positive and finite, got {bound!r}")
        if cohort * math.ceil(Fraction(bound) * STATISTICS_SCALE) >= 1 << 63:
            raise EncodingParameterError(
                f"the bound {bound!r} of statistic {i} times {cohort} participants overflows its 64-bit ring"
            )


def decode_statistics(sum_u64: UInt64Array) -> list[float]:
    """The centred sums divided by 2^20: the nearest float of the exact quotient, one per statistic."""
    # int / int is correctly rounded in Python, and the representative is centred in exact arithmetic.
    return [((int(v) + (1 << 63)) % (1 << 64) - (1 << 63)) / STATISTICS_SCALE for v in sum_u64]
