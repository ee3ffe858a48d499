"""The PRG: AES-CTR against single AES blocks, seeking, tiling, and the failures of other systems' mask generators."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.secagg_numerics import slow_twins

from maskwork.secagg import encoding, masking, prg, ring, rotation
from maskwork.secagg.prg import SignedKey

KEYS = st.binary(min_size=16, max_size=16)
SIGNED_KEYS = st.lists(st.builds(SignedKey, KEYS, st.booleans()), max_size=4)


def _sum(keys: list[SignedKey], count: int, start: int = 0) -> ring.UInt32Array:
    acc = np.zeros(count, np.uint32)
    prg.add_keystreams_u32(acc, keys, start)
    return acc


def test_the_keystream_is_aes_ctr_as_published() -> None:
    """The block is FIPS 197, appendix C.1; the counter mode around it is SP 800-38A, section 6.5."""
    key = bytes(range(16))
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert slow_twins.aes_block(key, block).hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"
    assert prg.keystream(key, 0, 48) == slow_twins.keystream(key, 0, 48)


@given(key=KEYS, start=st.integers(0, 2**36 - 4096), length=st.integers(0, 100))
def test_a_seek_is_a_slice(key: bytes, start: int, length: int) -> None:
    assert prg.keystream(key, start, length) == slow_twins.keystream(key, start, length)


@given(keys=SIGNED_KEYS, start=st.integers(0, 50), count=st.integers(0, 50))
def test_a_range_of_coordinates_is_a_slice_of_the_sum(keys: list[SignedKey], start: int, count: int) -> None:
    assert np.array_equal(_sum(keys, count, start), _sum(keys, start + count)[start:])


@given(keys=SIGNED_KEYS)
def test_keystreams_add_up_modulo_2_to_the_32(keys: list[SignedKey]) -> None:
    words = [slow_twins.keystream_words(key.key, 9, word_bytes=4) for key in keys]
    expected = [
        sum(-w[i] if key.negative else w[i] for key, w in zip(keys, words, strict=True)) % 2**32 for i in range(9)
    ]
    assert _sum(keys, 9).tolist() == expected


@given(keys=SIGNED_KEYS)
def test_statistics_take_eight_bytes_modulo_2_to_the_64(keys: list[SignedKey]) -> None:
    acc = np.full(5, 2**64 - 1, np.uint64)
    prg.add_keystreams_u64(acc, keys, 3)
    words = [slow_twins.keystream_words(key.key, 8, word_bytes=8)[3:] for key in keys]
    signed = [[-x if key.negative else x for x in w] for key, w in zip(keys, words, strict=True)]
    assert acc.tolist() == [(2**64 - 1 + sum(w[i] for w in signed)) % 2**64 for i in range(5)]


@given(keys=SIGNED_KEYS)
def test_adding_then_subtracting_leaves_nothing(keys: list[SignedKey]) -> None:
    inverse = [SignedKey(key.key, not key.negative) for key in keys]
    assert not _sum(keys + inverse, 1000).any()


def test_long_vectors_cross_tiles() -> None:
    keys = [SignedKey(bytes([i]) * 16, i % 2 == 1) for i in range(3)]
    count = 2 * ring.TILE + 5
    whole = np.zeros(count, np.uint32)
    for key in keys:
        words = np.frombuffer(slow_twins.keystream(key.key, 0, 4 * count), "<u4")
        whole = whole - words if key.negative else whole + words
    assert np.array_equal(_sum(keys, count), whole)


@pytest.mark.parametrize("offset", [0, 1, 4, 15])
def test_where_the_accumulator_lies_in_memory_does_not_show(offset: int) -> None:
    keys = [SignedKey(bytes(16), False), SignedKey(b"\x01" * 16, True)]
    room = np.zeros(ring.TILE + 100 + offset, np.uint32)
    prg.add_keystreams_u32(room[offset:], keys)
    assert not room[:offset].any()
    assert np.array_equal(room[offset:], _sum(keys, ring.TILE + 100))


@given(cuts=st.lists(st.integers(0, 300), max_size=5))
def test_a_walk_in_pieces_is_one_walk(cuts: list[int]) -> None:
    keys = [SignedKey(b"k" * 16, False), SignedKey(b"l" * 16, True)]
    streams = prg.MaskStreams(keys, item_bytes=4)
    acc = np.zeros(300, np.uint32)
    for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 300], strict=True):
        streams.add_to(acc[a:b])
    assert np.array_equal(acc, _sum(keys, 300))


@pytest.mark.parametrize("bits", [8, 9, 12])
def test_randint_0_to_R_minus_1_the_top_value_is_drawn(bits: int) -> None:
    """Masks drawn by ``randint(0, R - 1)`` never have the value R - 1, so they are not uniform."""
    acc = _sum([SignedKey(b"uniform mask key", False)], 200_000)
    ring.reduce_in_place(acc, bits)
    counts = np.bincount(acc, minlength=1 << bits)
    assert counts.min() > 0
    assert counts[-1] > 0
    assert len(counts) == 1 << bits
    expected = len(acc) / len(counts)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert abs(chi_squared - freedom) < 6 * (2 * freedom) ** 0.5


def test_every_bit_of_a_word_is_drawn() -> None:
    acc = _sum([SignedKey(b"uniform mask key", False)], 4096)
    assert int(np.bitwise_or.reduce(acc)) == 2**32 - 1
    assert int(np.bitwise_and.reduce(acc)) == 0
    assert acc.max() > 2**32 - 2**24


@pytest.mark.parametrize("length", [0, 4, 8, 15, 17, 32])
def test_a_seed_of_28_to_32_bits_is_refused(length: int) -> None:
    """Others stretch a seed of 28 to 32 bits; it is found in seconds."""
    with pytest.raises(ValueError, match="16 bytes"):
        SignedKey(bytes(length), False)
    with pytest.raises(ValueError, match="16 bytes"):
        prg.keystream(bytes(length), 0, 1)


def test_all_128_bits_of_a_key_matter() -> None:
    reference = prg.keystream(bytes(16), 0, 64)
    others = {prg.keystream((1 << bit).to_bytes(16, "big"), 0, 64) for bit in range(128)}
    assert len(others | {reference}) == 129


@pytest.mark.parametrize("module", [prg, ring, rotation, encoding, masking])
def test_no_general_purpose_generator_and_no_world(module: ModuleType) -> None:
    """Others mask with PCG64, the Mersenne Twister, ``np.random.seed(rank)``."""
    tree = ast.parse(inspect.getsource(module))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in imported}
    assert not names & {"random", "default_rng", "RandomState", "seed", "urandom"}
    assert not roots & {"random", "secrets", "os", "time", "logging", "asyncio", "grpc", "torch", "google", "pydantic"}


def test_a_mask_is_not_one_scalar_for_a_whole_tensor() -> None:
    """Others add one number to every coordinate, the same in every round."""
    acc = _sum([SignedKey(b"k" * 16, False)], 100_000)
    assert len(np.unique(acc)) > 99_900


def test_beyond_the_longest_stream_is_refused() -> None:
    last = prg.MAX_STREAM_BYTES
    assert len(prg.keystream(bytes(16), last - 8, 8)) == 8
    for start, length in [(last - 8, 9), (last + 1, 0), (-1, 1), (0, -1)]:
        with pytest.raises(ValueError, match="not within"):
            prg.keystream(bytes(16), start, length)
    acc = np.zeros(3, np.uint32)
    with pytest.raises(ValueError, match="not within"):
        prg.add_keystreams_u32(acc, [SignedKey(bytes(16), False)], last // 4 - 2)
    with pytest.raises(ValueError, match="not within"):
        prg.add_keystreams_u32(acc, [SignedKey(bytes(16), False)], -1)
    assert not acc.any()


def test_a_reader_ends_where_the_stream_ends() -> None:
    reader = prg.KeystreamReader(bytes(16), prg.MAX_STREAM_BYTES - 16)
    out = np.zeros(16, np.uint8)
    reader.read_into(out)
    with pytest.raises(ValueError, match="not within"):
        reader.read_into(out[:1])


def test_other_accumulators_are_refused() -> None:
    with pytest.raises(ValueError, match="uint32"):
        prg.add_keystreams_u32(np.zeros(3, np.int32), [])
    with pytest.raises(ValueError, match="uint64"):
        prg.add_keystreams_u64(np.zeros(3, np.uint32), [])
    with pytest.raises(ValueError, match="contiguous"):
        prg.add_keystreams_u32(np.zeros(6, np.uint32)[::2], [])
    with pytest.raises(ValueError, match="4 or 8"):
        prg.MaskStreams([], item_bytes=2)


def test_keys_do_not_show_in_a_repr() -> None:
    assert repr(SignedKey(b"super secret key", True)) == "SignedKey(negative=True)"
    keys = masking.MaskingKeys((SignedKey(b"super secret key", True),), (), b"super secret key")
    assert "secret" not in repr(keys)
    assert repr(keys) == "MaskingKeys()"
