"""Encoding parameters, stochastic rounding, clipping, refusals, decoding, statistics."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.secagg_numerics import slow_twins

from maskwork.secagg import encoding as enc
from maskwork.secagg.encoding import Encoding, EncodingError, EncodingParameterError, Rotation
from maskwork.secagg.ring import Int32Array, UInt32Array
from maskwork.secagg.rotation import MAX_BLOCK, Float32Array

SEED = bytes(range(32))
KEY = b"rounding-key-000"
EXACT = enc.preset("exact", cohort=10, clip_norm=1.0, weight_cap=100)
COMPACT = enc.preset("compact", cohort=10, clip_norm=1.0, weight_cap=100)


def _encode(update: Float32Array, weight: int, encoding: Encoding, key: bytes = KEY) -> tuple[Int32Array, int]:
    out = np.zeros(len(update), np.int32)
    clamped = enc.encode_update(update, weight, encoding=encoding, rotation_seed=SEED, rounding_key=key, out_i32=out)
    return out, clamped


def _decode(ring_sum: UInt32Array, encoding: Encoding, total_weight: int) -> Float32Array:
    out = np.zeros(len(ring_sum), np.float32)
    enc.decode_sum(ring_sum, encoding, rotation_seed=SEED, total_weight=total_weight, out_f32=out)
    return out


def _vector(length: int, norm: float = 1.0, seed: int = 0) -> Float32Array:
    vector = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
    return (vector * np.float32(norm / np.linalg.norm(vector))).astype(np.float32)


# Parameters


@given(cohort=st.integers(1, 1 << 30))
@example(cohort=256)
@example(cohort=257)
def test_the_exact_preset_never_wraps(cohort: int) -> None:
    e = enc.preset("exact", cohort=cohort, clip_norm=1.0, weight_cap=1)
    headroom = math.ceil(math.log2(cohort))
    assert (e.value_bits, e.ring_bits) == (min(24, 32 - headroom), min(24, 32 - headroom) + headroom)
    assert e.rotation is Rotation.NONE
    assert cohort * e.scale < 1 << (e.ring_bits - 1)


@given(cohort=st.integers(1, 1 << 16))
def test_the_compact_preset_never_wraps(cohort: int) -> None:
    e = enc.preset("compact", cohort=cohort, clip_norm=1.0, weight_cap=1)
    assert (e.value_bits, e.ring_bits, e.rotation) == (16, 16 + math.ceil(math.log2(cohort)), Rotation.HADAMARD)
    assert cohort * e.scale < 1 << (e.ring_bits - 1)


def test_presets_that_do_not_exist_or_do_not_fit() -> None:
    with pytest.raises(EncodingParameterError, match="no encoding preset 'tiny'"):
        enc.preset("tiny", cohort=3, clip_norm=1.0, weight_cap=1)
    with pytest.raises(EncodingParameterError, match="up to 65536 participants"):
        enc.preset("compact", cohort=65537, clip_norm=1.0, weight_cap=1)
    with pytest.raises(EncodingParameterError, match="cohort"):
        enc.preset("exact", cohort=0, clip_norm=1.0, weight_cap=1)


@given(value_bits=st.integers(2, 32), ring_bits=st.integers(8, 32), cohort=st.integers(1, 5000))
@example(value_bits=2, ring_bits=8, cohort=128)
@example(value_bits=2, ring_bits=8, cohort=127)
def test_capacity_is_n_times_S_below_half_the_modulus(value_bits: int, ring_bits: int, cohort: int) -> None:
    if value_bits > ring_bits:
        return
    e = Encoding(1.0, 1, value_bits, ring_bits, Rotation.NONE)
    if cohort * (2 ** (value_bits - 1) - 1) < 2 ** (ring_bits - 1):
        enc.check_capacity(e, cohort)
    else:
        with pytest.raises(EncodingParameterError, match="overflow a"):
            enc.check_capacity(e, cohort)


def test_the_capacity_error_names_the_ring_that_would_do() -> None:
    with pytest.raises(EncodingParameterError, match="use ring_bits >= 28"):
        enc.check_capacity(Encoding(1.0, 1, 24, 27, Rotation.NONE), 10)
    enc.check_capacity(Encoding(1.0, 1, 24, 28, Rotation.NONE), 10)


BAD_PARAMETERS: list[tuple[str, object]] = [
    ("clip_norm", 0.0),
    ("clip_norm", -1.0),
    ("clip_norm", math.nan),
    ("clip_norm", math.inf),
    ("clip_norm", 1e-30),
    ("clip_norm", 1e30),
    ("clip_norm", 1),
    ("weight_cap", 0),
    ("weight_cap", 1 << 31),
    ("weight_cap", 1.0),
    ("weight_cap", True),
    ("value_bits", 1),
    ("value_bits", 29),
    ("ring_bits", 7),
    ("ring_bits", 33),
    ("ring_bits", 23),
    ("rotation", "none"),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMETERS)
def test_bad_parameters_are_refused_by_name(name: str, value: object) -> None:
    fields: dict[str, object] = {
        "clip_norm": 1.0,
        "weight_cap": 100,
        "value_bits": 24,
        "ring_bits": 28,
        "rotation": Rotation.NONE,
    }
    Encoding(**fields)  # type: ignore[arg-type]  # as it is read from a plan
    fields[name] = value
    shown = "value_bits" if name == "ring_bits" and value == 23 else name
    with pytest.raises(EncodingParameterError, match=shown):
        Encoding(**fields)  # type: ignore[arg-type]  # as it is read from a plan


# Encoding


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40),
    weight=st.integers(1, 100),
    value_bits=st.integers(2, 25),
)
def test_encoding_agrees_with_scalars(values: list[float], weight: int, value_bits: int) -> None:
    e = Encoding(1.0, 100, value_bits, 32, Rotation.NONE)
    update = np.array(values, np.float32)
    out, _ = _encode(update, weight, e)
    assert out.tolist() == slow_twins.encode_unrotated(update, weight, e, KEY)


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
def test_encoding_again_gives_the_same_integers(encoding: Encoding) -> None:
    update = _vector(2 * MAX_BLOCK + 11)
    first, _ = _encode(update, 50, encoding)
    again, _ = _encode(update.copy(), 50, encoding)
    assert np.array_equal(first, again)
    other, _ = _encode(update, 50, encoding, b"another key 0000")
    assert not np.array_equal(first, other)


def test_the_rounding_of_a_coordinate_depends_on_its_offset_alone() -> None:
    update = np.full(2 * MAX_BLOCK, 1e-3, np.float32)
    update[0] = 0.5
    e = Encoding(10.0, 1, 8, 28, Rotation.NONE)
    long, _ = _encode(update, 1, e)
    short, _ = _encode(update[:1000], 1, e)
    assert np.array_equal(long[:1000], short)
    assert 0 < np.count_nonzero(long[MAX_BLOCK:]) < MAX_BLOCK
    assert not np.array_equal(long[1:MAX_BLOCK], long[MAX_BLOCK + 1 :])


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 1000, MAX_BLOCK + 3])
def test_decode_after_encode_is_the_clipped_update_within_the_quantisation(encoding: Encoding, length: int) -> None:
    update = _vector(length, norm=3.0)
    out, clamped = _encode(update, 100, encoding)
    back = _decode(out.view(np.uint32), encoding, 100)
    error = float(np.linalg.norm(back - slow_twins.clipped(update, encoding.clip_norm)))
    quantum = encoding.value_range(length) / encoding.scale
    assert clamped == 0
    assert error <= quantum * math.sqrt(length) + 1e-6


def test_an_update_inside_the_clip_norm_is_not_scaled_and_one_outside_is() -> None:
    for norm, expected in [(0.25, 0.25), (0.999, 0.999), (5.0, 1.0), (1e30, 1.0), (3e38, 1.0)]:
        out, _ = _encode(_vector(100, norm=norm), 100, EXACT)
        back = _decode(out.view(np.uint32), EXACT, 100)
        assert np.linalg.norm(back) == pytest.approx(expected, rel=1e-5)


def test_a_zero_update_encodes_as_zeros() -> None:
    for e in (EXACT, COMPACT):
        out, clamped = _encode(np.zeros(100, np.float32), 1, e)
        assert not out.any()
        assert clamped == 0


@pytest.mark.parametrize("y", [0.0, 0.5, 1.25, -0.25, -3.75, 2**22 + 0.5, -(2**22) - 0.5, 1e-3, -1e-3])
def test_rounding_is_unbiased(y: float) -> None:
    """The mean over 2^20 draws; where float32 has few digits left after the point too."""
    e = Encoding(float(2**23 - 1), 1, 24, 32, Rotation.NONE)  # C = S: a coordinate is its own scaled value
    count = 1 << 20
    encoder = enc.TileEncoder(e, length=count, norm=1.0, weight=1, rotation_seed=SEED, rounding_key=KEY)
    out = np.zeros(count, np.int32)
    for a, b in encoder.tiles():
        encoder.encode(np.full(b - a, y, np.float32), a, out[a:b])
    fraction = float(np.float32(y)) - math.floor(np.float32(y))
    assert set(np.unique(out).tolist()) <= {math.floor(y), math.floor(y) + 1}
    mean = float(np.mean(out.astype(np.float64)))
    assert abs(mean - float(np.float32(y))) <= 5 * math.sqrt(fraction * (1 - fraction) / count)


def test_integers_are_clamped_to_S_and_counted() -> None:
    e = Encoding(1.0, 1, 8, 16, Rotation.NONE)
    encoder = enc.TileEncoder(e, length=6, norm=1.0, weight=1, rotation_seed=SEED, rounding_key=KEY)
    out = np.zeros(6, np.int32)
    tile = np.array([1.0, -1.0, 1.5, -1.5, 1e30, 0.0], np.float32)  # what clipping to norm 1 would not let through
    assert encoder.encode(tile, 0, out) == 3
    assert out.tolist() == [127, -127, 127, -127, 127, 0]


@pytest.mark.parametrize("value_bits", [24, 25, 26, 30, 32])
def test_no_value_leaves_the_range_however_many_bits(value_bits: int) -> None:
    e = Encoding(1.0, 1, value_bits, 32, Rotation.NONE)
    for value in (1.0, -1.0):
        out, _ = _encode(np.array([value], np.float32), 1, e)
        assert abs(abs(int(out[0])) - e.scale) <= 1 + e.scale * 2**-23
        assert -e.scale <= int(out[0]) <= e.scale


# Refusals


@pytest.mark.parametrize("weight", [0, -1, 101, 1 << 40])
def test_weights_above_their_cap_only_warned_about(weight: int) -> None:
    """Others warn and let the sum wrap; here it is an error."""
    with pytest.raises(EncodingError, match=f"weight {weight} is not from 1 to the weight cap 100"):
        _encode(_vector(5), weight, EXACT)


@pytest.mark.parametrize("weight", [1.0, True, "1", None, np.int64(3)])
def test_weights_that_are_no_int_are_refused(weight: object) -> None:
    with pytest.raises(EncodingError, match="weight must be an int"):
        enc.check_weight(weight, 100)  # type: ignore[arg-type]  # what the check is for


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5000, 99_999])
def test_nan_and_inf_are_refused_and_the_error_says_where(bad: float, at: int) -> None:
    update = np.zeros(100_000, np.float32)
    update[at] = bad
    kinds = "1 NaN, 0 Inf" if math.isnan(bad) else "0 NaN, 1 Inf"
    message = f"1 non-finite coordinates of 100000 \\({kinds}\\), the first at index {at}"
    with pytest.raises(EncodingError, match=message):
        _encode(update, 1, EXACT)


def test_the_largest_finite_numbers_are_no_inf() -> None:
    update = np.full(10_000, np.finfo(np.float32).max, np.float32)
    assert math.isfinite(enc.checked_norm(update))


def test_other_arrays_are_refused() -> None:
    for bad in ([1.0], np.zeros(3), np.zeros(3, np.float16), np.zeros(3, np.int32)):
        with pytest.raises(EncodingError, match="float32"):
            enc.checked_norm(bad)  # type: ignore[arg-type]  # what the check is for
    for shape in (np.zeros((2, 2), np.float32), np.zeros(0, np.float32), np.zeros(8, np.float32)[::2]):
        with pytest.raises(EncodingError, match="contiguous, non-empty vector"):
            enc.checked_norm(shape)
    with pytest.raises(EncodingError, match="update has 3 coordinates, out is"):
        enc.encode_update(
            np.zeros(3, np.float32),
            1,
            encoding=EXACT,
            rotation_seed=SEED,
            rounding_key=KEY,
            out_i32=np.zeros(4, np.int32),
        )


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_the_norm_agrees_with_exact_arithmetic(values: list[float]) -> None:
    exact = sum(Fraction(value) ** 2 for value in values)
    norm = enc.checked_norm(np.array(values, np.float32))
    assert math.isclose(norm * norm, float(exact), rel_tol=1e-12, abs_tol=1e-300)


# Decoding


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
@pytest.mark.parametrize("cohort", [1, 2, 3, 5, 10])
def test_dequantisation_right_for_two_clients_only(encoding: Encoding, cohort: int) -> None:
    """Others divide by the wrong count unless there are two; weights differ here as well."""
    length = 1000
    weights = [1 + 33 * i % 100 for i in range(cohort)]
    updates = [_vector(length, norm=0.5 + i, seed=i) for i in range(cohort)]
    total = np.zeros(length, np.int64)
    for i, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        total += _encode(update, weight, encoding, bytes([i]) * 16)[0]
    ring_sum = (total % (1 << encoding.ring_bits)).astype(np.uint32)
    mean = sum(w * slow_twins.clipped(u, 1.0) for w, u in zip(weights, updates, strict=True)) / sum(weights)
    decoded = _decode(ring_sum, encoding, sum(weights))
    quantum = encoding.value_range(length) / encoding.scale * encoding.weight_cap / sum(weights)
    assert np.linalg.norm(decoded - mean) <= quantum * math.sqrt(cohort * length) + 1e-6


def test_decoding_ignores_foreign_bits_and_leaves_the_sum_alone() -> None:
    ring_sum = np.random.default_rng(1).integers(0, 1 << 32, 1000, dtype=np.uint32)
    before = ring_sum.copy()
    low = ring_sum & np.uint32((1 << EXACT.ring_bits) - 1)
    assert np.array_equal(_decode(ring_sum, EXACT, 7), _decode(low, EXACT, 7))
    assert np.array_equal(ring_sum, before)


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
def test_processes_that_split_the_decoding_get_the_same_floats(encoding: Encoding) -> None:
    length = 3 * MAX_BLOCK + 77
    ring_sum = np.random.default_rng(1).integers(0, 1 << 32, length, dtype=np.uint32)
    whole, parts = _decode(ring_sum, encoding, 7), np.zeros(length, np.float32)
    for a, b in [(MAX_BLOCK, length), (0, MAX_BLOCK)]:
        enc.decode_sum(
            ring_sum[a:b], encoding, rotation_seed=SEED, total_weight=7, out_f32=parts[a:b], start=a, length=length
        )
    assert np.array_equal(parts, whole)


def test_ranges_that_cut_a_block_are_refused() -> None:
    length = 3 * MAX_BLOCK + 77
    for a, b in [(0, 5), (5, MAX_BLOCK), (0, 3 * MAX_BLOCK), (3 * MAX_BLOCK, length), (0, length + 1), (-1, 5)]:
        part = np.zeros(b - a, np.uint32)
        with pytest.raises(ValueError, match=r"cuts a block|is not a range"):
            enc.decode_sum(
                part,
                COMPACT,
                rotation_seed=SEED,
                total_weight=1,
                out_f32=part.astype(np.float32),
                start=a,
                length=length,
            )


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
def test_ranges_outside_the_vector_are_refused(encoding: Encoding) -> None:
    for start, count, length in [(-1, 5, 10), (6, 5, 10), (10, 1, 10), (0, 11, 10)]:
        with pytest.raises(ValueError, match="is not a range"):
            enc.decode_sum(
                np.zeros(count, np.uint32),
                encoding,
                rotation_seed=SEED,
                total_weight=1,
                out_f32=np.zeros(count, np.float32),
                start=start,
                length=length,
            )


def test_decoding_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="equal vectors"):
        enc.decode_sum(
            np.zeros(3, np.uint32), EXACT, rotation_seed=SEED, total_weight=1, out_f32=np.zeros(4, np.float32)
        )
    for weight in (0, -5):
        with pytest.raises(ValueError, match="total weight"):
            _decode(np.zeros(3, np.uint32), EXACT, weight)


# Statistics


@given(rows=st.lists(st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=3, max_size=3), min_size=1, max_size=20))
def test_sums_of_statistics_are_exact(rows: list[list[float]]) -> None:
    names, bounds = ["examples", "loss", "correct"], [1e6] * 3
    total = np.zeros(3, np.uint64)
    for row in rows:
        total += enc.encode_statistics(row, bounds, names)
    expected = [Fraction(sum(round(Fraction(row[i]) * 2**20) for row in rows), 2**20) for i in range(3)]
    assert [Fraction(v) for v in enc.decode_statistics(total)] == [Fraction(float(v)) for v in expected]


def test_whole_counts_come_back_exactly() -> None:
    bound = float(2**30)
    enc.check_statistics_capacity([bound], 1000)
    total = sum(enc.encode_statistics([2**30 - i], [bound], ["examples"]) for i in range(1000))
    assert isinstance(total, np.ndarray)
    assert enc.decode_statistics(total) == [float(1000 * 2**30 - 499_500)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_statistic_that_is_not_finite_is_refused_by_name(value: float) -> None:
    with pytest.raises(EncodingError, match=r"'loss' \(index 1\) is NaN or Inf"):
        enc.encode_statistics([1.0, value], [10.0, 10.0], ["examples", "loss"])


@pytest.mark.parametrize("value", [10.000001, -10.000001])
def test_a_statistic_beyond_its_bound_is_refused_by_name(value: float) -> None:
    enc.encode_statistics([10.0, -10.0], [10.0, 10.0], ["a", "b"])
    with pytest.raises(EncodingError, match=r"'loss' \(index 1\) is beyond its bound 10"):
        enc.encode_statistics([1.0, value], [10.0, 10.0], ["examples", "loss"])
    with pytest.raises(EncodingError, match="1 statistics, 2 bounds"):
        enc.encode_statistics([1.0], [10.0, 10.0], ["examples", "loss"])


def test_statistics_capacity_at_its_edge() -> None:
    bound = float(2**40)
    enc.check_statistics_capacity([1.0, bound], 7)
    with pytest.raises(EncodingParameterError, match="statistic 1 times 8 participants overflows"):
        enc.check_statistics_capacity([1.0, bound], 8)
    for bad in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(EncodingParameterError, match="statistic 0 must be positive and finite"):
            enc.check_statistics_capacity([bad], 3)
