"""The rotation against the matrix written out; its inverse, its norm, its pieces."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.secagg_numerics import slow_twins

from maskwork.secagg import rotation
from maskwork.secagg.rotation import BlockRotation, Float32Array

SEED = bytes(range(32))
BLOCK = rotation.MAX_BLOCK


def _vector(length: int, seed: int = 0) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(length, dtype=np.float32)


def _rotate(vector: Float32Array, seed: bytes = SEED) -> Float32Array:
    out = vector.copy()
    turning = BlockRotation(len(vector), seed)
    for start, stop in rotation.pieces(len(vector)):
        turning.rotate(out[start:stop], start)
    return out


def _unrotate(vector: Float32Array, seed: bytes = SEED) -> Float32Array:
    out = vector.copy()
    turning = BlockRotation(len(vector), seed)
    for start, stop in rotation.pieces(len(vector)):
        turning.unrotate(out[start:stop], start)
    return out


@pytest.mark.parametrize("length", [*range(1, 20), 32, 33, 63, 64, 100, 128, 200, 256, 300])
def test_it_is_the_signed_walsh_hadamard_matrix(length: int) -> None:
    vector = _vector(length)
    expected = slow_twins.rotate([float(x) for x in vector], SEED)
    assert _rotate(vector) == pytest.approx(expected, abs=3e-6)


def test_one_row_of_a_whole_block() -> None:
    """A unit vector becomes a column of the matrix: the transform of 2^16 in natural order, exactly."""
    i = 0b1010_0110_1100_0011
    vector = np.zeros(BLOCK, np.float32)
    vector[i] = 1
    rotated = _rotate(vector)
    word = slow_twins.keystream(SEED[:16], 4 * i, 4)
    sign = -1 if word[3] & 0x80 else 1
    assert [round(256 * float(rotated[j])) for j in range(500)] == [
        sign * (-1) ** (i & j).bit_count() for j in range(500)
    ]
    assert np.all(np.abs(rotated) == np.float32(1 / 256))


@given(length=st.integers(1, 3000), seed=st.binary(min_size=32, max_size=32))
def test_unrotate_after_rotate_is_the_identity_and_the_norm_is_kept(length: int, seed: bytes) -> None:
    vector = _vector(length, length)
    rotated = _rotate(vector, seed)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    assert np.allclose(_unrotate(rotated, seed), vector, atol=1e-5)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 5, 3 * BLOCK - 1])
def test_long_vectors(length: int) -> None:
    vector = _vector(length)
    rotated = _rotate(vector)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    assert np.abs(_unrotate(rotated) - vector).max() < 1e-5


@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 6])
def test_a_spike_is_spread_wherever_it_stands(at: int) -> None:
    vector = np.zeros(2 * BLOCK + 7, np.float32)
    vector[at] = 1
    assert np.abs(_rotate(vector)).max() < 5 / math.sqrt(BLOCK)


def test_the_tail_has_signs_of_its_own() -> None:
    """With the same signs twice the second transform would undo the first where they overlap."""
    vector = _vector(300)
    assert not np.allclose(_rotate(vector, SEED[:16] + SEED[:16]), _rotate(vector), atol=1e-3)


def test_the_pieces_cover_the_vector_once_and_the_last_holds_the_tail() -> None:
    for length in [1, 2, 3, 1000, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 9]:
        ranges = list(rotation.pieces(length))
        assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
        assert ranges[-1][1] == length
        assert all(b - a == BLOCK for a, b in ranges[:-1])
        assert ranges[-1][1] - ranges[-1][0] < 2 * rotation.block_length(length)


def test_pieces_may_come_in_any_order() -> None:
    vector = _vector(3 * BLOCK + 9)
    out = vector.copy()
    turning = BlockRotation(len(vector), SEED)
    for start, stop in reversed(list(rotation.pieces(len(vector)))):
        turning.rotate(out[start:stop], start)
    assert np.array_equal(out, _rotate(vector))


def test_rotating_leaves_the_numpy_buffer_size_as_it_was() -> None:
    with np.errstate():
        np.setbufsize(4096)
        _rotate(_vector(64))
        assert np.getbufsize() == 4096


def test_a_wrong_piece_or_seed_is_refused() -> None:
    turning = BlockRotation(2 * BLOCK + 5, SEED)
    for start, length in [(0, BLOCK - 1), (1, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 5), (-BLOCK, BLOCK)]:
        with pytest.raises(ValueError, match="not a piece"):
            turning.rotate(np.zeros(length, np.float32), start)
        with pytest.raises(ValueError, match="not a piece"):
            turning.unrotate(np.zeros(length, np.float32), start)
    with pytest.raises(ValueError, match="32 bytes"):
        BlockRotation(8, bytes(16))
    with pytest.raises(ValueError, match="at least one"):
        rotation.block_length(0)
