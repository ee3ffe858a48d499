"""The fused data path of both sides: bit-exact sums, refusals before the first byte, memory of a few tiles."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.secagg_numerics import slow_twins

from maskwork.secagg import encoding as enc
from maskwork.secagg import masking, prg
from maskwork.secagg.encoding import Encoding, EncodingError, Rotation
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.prg import SignedKey
from maskwork.secagg.ring import TILE, UInt8Array, packed_size
from maskwork.secagg.rotation import Float32Array

SEED = bytes(range(32))
EXACT = enc.preset("exact", cohort=10, clip_norm=1.0, weight_cap=100)
COMPACT = enc.preset("compact", cohort=10, clip_norm=1.0, weight_cap=100)
WIDTHS = st.integers(8, 32)


def _keys(*signed: tuple[int, bool], rounding: int = 200) -> MaskingKeys:
    keys = tuple(SignedKey(bytes([i]) * 16, negative) for i, negative in signed)
    return MaskingKeys(keys, keys, bytes([rounding]) * 16)


def _vector(length: int, seed: int = 0) -> Float32Array:
    vector = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
    return (vector / np.float32(np.linalg.norm(vector))).astype(np.float32)


def _mask(update: Float32Array, weight: int, encoding: Encoding, keys: MaskingKeys) -> tuple[UInt8Array, int]:
    out = np.full(packed_size(len(update), encoding.ring_bits), 0xAA, np.uint8)
    clamped = masking.mask_update(update, weight, encoding=encoding, keys=keys, rotation_seed=SEED, out_u8=out)
    return out, clamped


@settings(max_examples=30)
@given(bits=WIDTHS, length=st.integers(1, 70), weight=st.integers(1, 100), negative=st.booleans())
def test_a_masked_update_agrees_with_python_integers(bits: int, length: int, weight: int, negative: bool) -> None:
    e = Encoding(0.5, 100, min(bits, 20), bits, Rotation.NONE)
    update = _vector(length, seed=length)
    keys = _keys((1, negative), (2, not negative))
    out, _ = _mask(update, weight, e, keys)
    first, second = (slow_twins.keystream_words(bytes([i]) * 16, length, word_bytes=4) for i in (1, 2))
    sign = -1 if negative else 1
    plain = slow_twins.encode_unrotated(update, weight, e, keys.rounding_key)
    expected = [x + sign * (a - b) for x, a, b in zip(plain, first, second, strict=True)]
    assert out.tobytes() == slow_twins.pack(expected, bits)


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
@pytest.mark.parametrize("length", [1, 7, 1000, 2 * TILE + 13])
def test_the_fused_path_is_encode_then_mask_then_pack(encoding: Encoding, length: int) -> None:
    update, keys = _vector(length), _keys((3, True), (4, False))
    plain = np.zeros(length, np.int32)
    clamped = enc.encode_update(
        update, 50, encoding=encoding, rotation_seed=SEED, rounding_key=keys.rounding_key, out_i32=plain
    )
    out, fused_clamped = _mask(update, 50, encoding, keys)
    acc = np.zeros(length, np.uint32)
    masking.accumulate(acc, out, encoding.ring_bits)
    masking.remove_masks(acc, keys.update)
    modulus = np.uint32((1 << encoding.ring_bits) - 1)
    assert np.array_equal(acc & modulus, plain.view(np.uint32) & modulus)
    assert fused_clamped == clamped


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
def test_pair_masks_cancel_and_the_sum_is_bit_exact(encoding: Encoding) -> None:
    """Three participants, pair masks of both signs, self masks taken off in ranges as two processes would."""
    length, pairs = TILE + 33, {(0, 1): 10, (0, 2): 11, (1, 2): 12}
    acc, plain_sum = np.zeros(length, np.uint32), np.zeros(length, np.int64)
    for u in range(3):
        signed = [(key, u == high) for (low, high), key in pairs.items() if u in (low, high)]
        keys = _keys((20 + u, False), *signed, rounding=100 + u)
        update, plain = _vector(length, seed=u), np.zeros(length, np.int32)
        out, _ = _mask(update, 100, encoding, keys)
        masking.accumulate(acc, out, encoding.ring_bits)
        enc.encode_update(
            update, 100, encoding=encoding, rotation_seed=SEED, rounding_key=keys.rounding_key, out_i32=plain
        )
        plain_sum += plain
    self_masks = [SignedKey(bytes([20 + u]) * 16, False) for u in range(3)]
    for a, b in [(12345, length), (0, 12345)]:
        masking.remove_masks(acc[a:b], self_masks, a)
    modulus = 1 << encoding.ring_bits
    assert np.array_equal(acc % np.uint32(modulus) if modulus < 1 << 32 else acc, plain_sum % modulus)


def test_more_masks_than_ciphers_at_a_time_are_all_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [SignedKey(bytes([i]) * 16, bool(i % 2)) for i in range(7)]
    expected, batched = np.zeros(1000, np.uint32), np.zeros(1000, np.uint32)
    prg.MaskStreams(keys, item_bytes=4, start=5).add_to(expected)
    monkeypatch.setattr(prg, "_CIPHERS_AT_A_TIME", 3)
    prg.add_keystreams_u32(batched, keys, 5)
    assert np.array_equal(batched, expected)


def test_encoding_again_gives_the_same_bytes() -> None:
    """A resumed upload never becomes a two-time pad."""
    for encoding in (EXACT, COMPACT):
        update, keys = _vector(TILE + 5), _keys((1, False))
        assert _mask(update, 7, encoding, keys)[0].tobytes() == _mask(update.copy(), 7, encoding, keys)[0].tobytes()


def test_a_vector_without_masks_is_still_encoded() -> None:
    out, _ = _mask(np.zeros(9, np.float32), 1, EXACT, _keys())
    assert not out.any()


# Refusals


@pytest.mark.parametrize("at", [0, TILE + 3, 2 * TILE - 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_coordinates_are_refused_before_the_first_byte_is_written(at: int, bad: float) -> None:
    update = _vector(2 * TILE)
    update[at] = bad
    out = np.full(packed_size(len(update), EXACT.ring_bits), 0xAA, np.uint8)
    with pytest.raises(EncodingError, match=f"the first at index {at}"):
        masking.mask_update(update, 1, encoding=EXACT, keys=_keys(), rotation_seed=SEED, out_u8=out)
    assert np.all(out == 0xAA)


def test_bad_weights_seeds_and_lengths_are_refused_before_the_first_byte_is_written() -> None:
    update = _vector(100)
    out = np.full(packed_size(100, 20), 0xAA, np.uint8)
    for weight in (0, 101):
        with pytest.raises(EncodingError, match="weight cap 100"):
            masking.mask_update(update, weight, encoding=COMPACT, keys=_keys(), rotation_seed=SEED, out_u8=out)
    with pytest.raises(ValueError, match="rotation seed has 32 bytes"):
        masking.mask_update(update, 1, encoding=COMPACT, keys=_keys(), rotation_seed=b"", out_u8=out)
    for wrong in (out[:-1], np.full(251, 0xAA, np.uint8), out[:, None], out.repeat(2)[::2]):
        with pytest.raises(EncodingError, match="100 coordinates of 20 bits take 250 bytes"):
            masking.mask_update(update, 1, encoding=COMPACT, keys=_keys(), rotation_seed=SEED, out_u8=wrong)
    assert np.all(out == 0xAA)
    with pytest.raises(ValueError, match="16 bytes"):
        MaskingKeys((), (), b"short")


def test_an_upload_of_another_length_leaves_no_trace_in_the_sum() -> None:
    acc = np.arange(100, dtype=np.uint32)
    for size in (0, 249, 251):
        with pytest.raises(EncodingError, match="take 250 bytes"):
            masking.accumulate(acc, np.full(size, 255, np.uint8), 20)
    with pytest.raises(ValueError, match="uint32"):
        masking.accumulate(acc.astype(np.uint64), np.zeros(250, np.uint8), 20)
    assert np.array_equal(acc, np.arange(100))
    statistics = np.zeros(2, np.uint64)
    for size in (15, 17, 0):
        with pytest.raises(EncodingError, match="2 statistics take 16 bytes"):
            masking.accumulate_statistics(statistics, bytes([255]) * size)
    with pytest.raises(ValueError, match="uint64"):
        masking.accumulate_statistics(np.zeros(2, np.int64), bytes(16))
    assert not statistics.any()


# Statistics


@given(values=st.lists(st.floats(-1000, 1000), min_size=1, max_size=5), negative=st.booleans())
def test_sample_counts_in_clear_beside_a_masked_vector(values: list[float], negative: bool) -> None:
    """Others send counts and metrics in clear; here they are masked, and come back exactly."""
    names, bounds = [f"s{i}" for i in range(len(values))], [1000.0] * len(values)
    plain = enc.encode_statistics(values, bounds, names)
    keys = _keys((1, negative))
    masked = masking.mask_statistics(plain, keys.statistics)
    words = slow_twins.keystream_words(bytes([1]) * 16, len(values), word_bytes=8)
    sent = [int.from_bytes(masked[8 * i : 8 * i + 8], "little") for i in range(len(values))]
    sign = -1 if negative else 1
    assert sent == [(int(p) + sign * w) % 2**64 for p, w in zip(plain, words, strict=True)]
    acc = np.zeros(len(values), np.uint64)
    masking.accumulate_statistics(acc, masked)
    masking.remove_statistics_masks(acc, keys.statistics)
    assert np.array_equal(acc, plain)


# Memory


def _peak_bytes(work: object) -> int:
    assert callable(work)
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", [EXACT, COMPACT])
def test_server_memory_does_not_grow_with_the_cohort_nor_with_the_vector(encoding: Encoding) -> None:
    """Others hold n vectors of 8 bytes per parameter. Beyond the caller's buffers a few tiles are allowed."""
    length = 96 * TILE
    update, keys = np.zeros(length, np.float32), _keys((1, False), (2, True))
    out, acc = np.zeros(packed_size(length, encoding.ring_bits), np.uint8), np.zeros(length, np.uint32)
    mean = np.zeros(length, np.float32)
    few_tiles = 20 * 4 * TILE
    assert few_tiles < update.nbytes // 3
    assert (
        _peak_bytes(
            lambda: masking.mask_update(update, 1, encoding=encoding, keys=keys, rotation_seed=SEED, out_u8=out)
        )
        < few_tiles
    )
    assert _peak_bytes(lambda: masking.accumulate(acc, out, encoding.ring_bits)) < few_tiles
    assert _peak_bytes(lambda: masking.remove_masks(acc, keys.update)) < few_tiles
    decode = lambda: enc.decode_sum(acc, encoding, rotation_seed=SEED, total_weight=1, out_f32=mean)  # noqa: E731
    assert _peak_bytes(decode) < few_tiles


def test_accumulator_and_upload_may_be_memory_maps(tmp_path: Path) -> None:
    update, keys = _vector(TILE + 9), _keys((5, False))
    out, _ = _mask(update, 9, EXACT, keys)
    (tmp_path / "upload").write_bytes(out.tobytes())
    upload = np.memmap(tmp_path / "upload", np.uint8, "r")
    acc = np.memmap(tmp_path / "acc", np.uint32, "w+", shape=(len(update),))
    masking.accumulate(acc, upload, EXACT.ring_bits)
    masking.remove_masks(acc[100:], keys.update, 100)
    masking.remove_masks(acc[:100], keys.update)
    plain = np.zeros(len(update), np.uint32)
    masking.accumulate(plain, out, EXACT.ring_bits)
    masking.remove_masks(plain, keys.update)
    assert np.array_equal(np.asarray(acc), plain)
