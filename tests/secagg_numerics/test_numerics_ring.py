"""Bit packing and ring arithmetic against Python integers, for every width and awkward lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.secagg_numerics import slow_twins

from maskwork.secagg import ring

WIDTHS = range(8, 33)
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 130]


def _values(count: int, seed: int = 0) -> ring.UInt32Array:
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32)


def _packed(values: ring.UInt32Array, bits: int) -> ring.UInt8Array:
    out = np.full(ring.packed_size(len(values), bits), 0xAA, np.uint8)
    ring.pack(values, bits, out)
    return out


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_and_unpack_agree_with_one_big_integer(bits: int) -> None:
    for count in LENGTHS:
        values = _values(count)
        packed = _packed(values, bits)
        assert packed.tobytes() == slow_twins.pack(values.tolist(), bits), count
        out = np.full(count, 0xAAAAAAAA, np.uint32)
        ring.unpack(packed, bits, out)
        assert out.tolist() == slow_twins.unpack(packed.tobytes(), bits, count), count


@pytest.mark.parametrize("bits", WIDTHS)
def test_long_vectors_cross_tiles(bits: int) -> None:
    values = _values(2 * ring.TILE + 77)
    packed = _packed(values, bits)
    out = np.zeros(len(values), np.uint32)
    ring.unpack(packed, bits, out)
    assert np.array_equal(out, values & np.uint32((1 << bits) - 1))
    at = ring.TILE * bits // 8
    assert packed[at : at + 8 * bits].tobytes() == slow_twins.pack(values[ring.TILE : ring.TILE + 64].tolist(), bits)


@given(bits=st.integers(8, 32), values=st.lists(st.integers(0, 2**32 - 1), max_size=200))
def test_unpack_after_pack_is_the_identity(bits: int, values: list[int]) -> None:
    packed = _packed(np.array(values, np.uint32), bits)
    out = np.zeros(len(values), np.uint32)
    ring.unpack(packed, bits, out)
    assert out.tolist() == [value % (1 << bits) for value in values]
    assert packed.tobytes() == slow_twins.pack(values, bits)


@given(bits=st.integers(8, 32), count=st.integers(0, 300), tile=st.integers(1, 4))
def test_the_tiling_does_not_show(bits: int, count: int, tile: int) -> None:
    values = _values(count, seed=count)
    out = np.zeros(ring.packed_size(count, bits), np.uint8)
    packer = ring.BitPacker(bits, tile=64 * tile)
    packer.pack(values, out)
    assert np.array_equal(out, _packed(values, bits))
    back = np.zeros(count, np.uint32)
    packer.unpack(out, back)
    assert np.array_equal(back, values & np.uint32((1 << bits) - 1))


def test_tiles_of_eight_coordinates_are_byte_aligned() -> None:
    values = _values(80)
    for bits in WIDTHS:
        parts = b"".join(_packed(values[i : i + 8], bits).tobytes() for i in range(0, 80, 8))
        assert parts == _packed(values, bits).tobytes()


def test_unused_bits_of_the_last_byte_are_zero_and_ignored() -> None:
    packed = _packed(np.full(3, 0xFFFFFFFF, np.uint32), 9)
    assert packed.tolist() == [255, 255, 255, 7]
    packed[-1] |= 0xF8
    out = np.zeros(3, np.uint32)
    ring.unpack(packed, 9, out)
    assert out.tolist() == [511, 511, 511]


def test_a_packer_used_again_leaves_nothing_of_the_vector_before() -> None:
    for bits in WIDTHS:
        packer = ring.BitPacker(bits, tile=64)
        packer.pack(np.full(63, 0xFFFFFFFF, np.uint32), np.zeros(ring.packed_size(63, bits), np.uint8))
        out = np.zeros(ring.packed_size(3, bits), np.uint8)
        packer.pack(np.zeros(3, np.uint32), out)
        assert not out.any()


def test_an_unaligned_buffer_is_no_different() -> None:
    values = _values(100)
    for bits in WIDTHS:
        size = ring.packed_size(100, bits)
        room = np.zeros(size + 1, np.uint8)
        ring.pack(values, bits, room[1:])
        assert np.array_equal(room[1:], _packed(values, bits))
        out = np.zeros(101, np.uint32)
        ring.unpack(room[1:], bits, out[1:])
        assert np.array_equal(out[1:], values & np.uint32((1 << bits) - 1))


@given(bits=st.integers(8, 32), values=st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_centre_agrees_with_python_integers(bits: int, values: list[int]) -> None:
    array = np.array(values, np.uint32)
    out = np.zeros(len(values), np.int32)
    ring.centre(array, bits, out)
    assert out.tolist() == [slow_twins.centre(value, bits) for value in values]
    assert array.tolist() == values
    ring.centre(array, bits, array.view(np.int32))
    assert np.array_equal(array.view(np.int32), out)


@pytest.mark.parametrize("bits", WIDTHS)
def test_centre_at_the_ends_of_its_range(bits: int) -> None:
    half = 1 << (bits - 1)
    out = np.zeros(4, np.int32)
    ring.centre(np.array([0, half - 1, half, 2 * half - 1], np.uint32), bits, out)
    assert out.tolist() == [0, half - 1, -half, -1]


def test_reduce_in_place() -> None:
    values = np.array([0, 255, 256, 2**32 - 1], np.uint32)
    ring.reduce_in_place(values, 8)
    assert values.tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("bits", [0, 7, 33, -1])
def test_widths_outside_8_to_32_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="8 to 32"):
        ring.packed_size(1, bits)
    with pytest.raises(ValueError, match="8 to 32"):
        ring.BitPacker(bits)


def test_other_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="-1 coordinates"):
        ring.packed_size(-1, 8)
    for tile in (0, -64, 65):
        with pytest.raises(ValueError, match="multiple of 64"):
            ring.BitPacker(20, tile=tile)
    for count in (1, 4):
        with pytest.raises(ValueError, match="out has shape"):
            ring.centre(np.zeros(3, np.uint32), 20, np.zeros(count, np.int32))


def test_a_buffer_of_another_length_is_refused() -> None:
    values, short, long = np.zeros(10, np.uint32), np.zeros(24, np.uint8), np.zeros(26, np.uint8)
    for buffer in (short, long):
        with pytest.raises(ValueError, match="take 25 bytes, the buffer has"):
            ring.pack(values, 20, buffer)
        with pytest.raises(ValueError, match="take 25 bytes, the buffer has"):
            ring.unpack(buffer, 20, values)


def test_other_dtypes_and_layouts_are_refused() -> None:
    packed = np.zeros(25, np.uint8)
    with pytest.raises(ValueError, match="uint32"):
        ring.pack(np.zeros(10, np.int64), 20, packed)
    with pytest.raises(ValueError, match="contiguous"):
        ring.pack(np.zeros(20, np.uint32)[::2], 20, packed)


def test_eight_bytes_per_parameter_are_not_sent() -> None:
    """Others sent 80 MB for ten million parameters."""
    assert ring.packed_size(10_000_000, 28) == 35_000_000
    assert ring.packed_size(10_000_000, 20) == 25_000_000
