"""Slow, obvious twins of the fast numerics: Python integers, one AES block at a time, matrices written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from maskwork.secagg.encoding import Encoding
from maskwork.secagg.rotation import Float32Array


def pack(values: Sequence[int], bits: int) -> bytes:
    """One big little-endian integer."""
    number = sum((value % (1 << bits)) << (bits * i) for i, value in enumerate(values))
    return number.to_bytes(math.ceil(len(values) * bits / 8), "little")


def unpack(packed: bytes, bits: int, count: int) -> list[int]:
    number = int.from_bytes(packed, "little")
    return [(number >> (bits * i)) % (1 << bits) for i in range(count)]


def centre(value: int, bits: int) -> int:
    value %= 1 << bits
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


def aes_block(key: bytes, block: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(block)


def keystream(key: bytes, start_byte: int, length: int) -> bytes:
    """AES of the 128-bit big-endian block counter, from zero (SP 800-38A, section 6.5)."""
    first, last = start_byte // 16, (start_byte + length) // 16
    blocks = b"".join(aes_block(key, counter.to_bytes(16, "big")) for counter in range(first, last + 1))
    return blocks[start_byte - 16 * first :][:length]


def keystream_words(key: bytes, count: int, *, word_bytes: int) -> list[int]:
    stream = keystream(key, 0, count * word_bytes)
    return [int.from_bytes(stream[i : i + word_bytes], "little") for i in range(0, len(stream), word_bytes)]


def walsh_hadamard(values: Sequence[float]) -> list[float]:
    """Entry (i, j) of the matrix is minus one to the number of ones that i and j share."""
    size = len(values)
    return [
        sum(value * (-1) ** (i & j).bit_count() for j, value in enumerate(values)) / math.sqrt(size)
        for i in range(size)
    ]


def rotate(values: Sequence[float], seed: bytes) -> list[float]:
    length = len(values)
    block = min(1 << 16, 1 << (length.bit_length() - 1))
    whole = length // block * block
    signed = [
        -v if w >> 31 else v for v, w in zip(values, keystream_words(seed[:16], length, word_bytes=4), strict=True)
    ]
    out: list[float] = []
    for start in range(0, whole, block):
        out += walsh_hadamard(signed[start : start + block])
    out += values[whole:]
    if whole != length:
        words = keystream_words(seed[16:], block, word_bytes=4)
        tail = [-v if w >> 31 else v for v, w in zip(out[-block:], words, strict=True)]
        out[-block:] = walsh_hadamard(tail)
    return out


def encode_unrotated(update: Float32Array, weight: int, encoding: Encoding, rounding_key: bytes) -> list[int]:
    """Coordinate by coordinate, in scalar float32."""
    norm = math.sqrt(math.fsum(float(x) ** 2 for x in update))
    clip = min(1.0, encoding.clip_norm / norm) if norm else 1.0
    multiplier = np.float32(clip * weight / encoding.weight_cap * encoding.scale / encoding.clip_norm)
    words = keystream_words(rounding_key, len(update), word_bytes=4)
    encoded = []
    for x, word in zip(update, words, strict=True):
        y = np.float32(x * multiplier)
        below = math.floor(y)
        rounds_up = np.float32(y - np.float32(below)) + np.float32((word >> 9) / 2**23) >= np.float32(1)
        encoded.append(max(-encoding.scale, min(encoding.scale, below + int(rounds_up))))
    return encoded


def clipped(update: Float32Array, clip_norm: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The L2-clipped update in float64."""
    wide = update.astype(np.float64)
    norm = float(np.sqrt(np.sum(wide * wide)))
    return wide * min(1.0, clip_norm / norm) if norm else wide
