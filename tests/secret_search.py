"""Searches files for secrets in every spelling in which one could have been written; not a test itself.

A secret is looked for as it is, in hexadecimal (either case), in base64 (both alphabets, wherever its first byte falls
in a group of three), as a decimal number (either byte order) and as Python prints bytes. Of a spelling, its first or
its last `LEAST` bytes are enough: a half-written secret is one too.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEAST = 12
"""A piece this long of 32 random bytes is in no file by chance."""
_WINDOW = 8


@dataclass(frozen=True)
class Found:
    """One secret in one file."""

    secret: str
    spelling: str
    file: str

    def __str__(self) -> str:
        return f"{self.secret}, as {self.spelling}, in {self.file}"


def spellings(secret: bytes) -> Iterator[tuple[str, bytes]]:
    """Every way in which a secret could have been written down, with its name."""
    yield "bytes", secret
    yield "bytes reversed", secret[::-1]
    yield "hex", secret.hex().encode()
    yield "HEX", secret.hex().upper().encode()
    yield "repr", repr(secret)[2:-1].encode()
    yield "decimal", str(int.from_bytes(secret, "big")).encode()
    yield "decimal, little-endian", str(int.from_bytes(secret, "little")).encode()
    for alphabet, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
        for shift in range(3):
            # The first and the last group of four also hold what stood before and after it.
            encoded = encode(bytes(shift) + secret).rstrip(b"=")
            yield f"{alphabet}+{shift}", encoded[4 * (shift > 0) : len(encoded) - 1]


def search(secrets: Mapping[str, bytes], files: Iterable[Path]) -> list[Found]:
    """Every secret in every file; what is found in several places is told for each.

    The files are looked through once: each place of eight bytes against the first eight of every spelling, and what
    agrees there to its end.
    """
    wanted: dict[int, list[tuple[str, str, bytes]]] = {}
    for name, secret in secrets.items():
        for how, spelled in spellings(secret):
            piece = spelled[:64]
            assert len(piece) >= LEAST, f"{name} is too short to be looked for"
            for at in (0, len(piece) - LEAST):  # its beginning, or its end
                part = piece[at : at + LEAST]
                wanted.setdefault(int.from_bytes(part[:_WINDOW], "little"), []).append((name, how, part))
    firsts = np.array(sorted(wanted), np.uint64)
    found: dict[Found, None] = {}
    for path in files:
        body = path.read_bytes()
        for place in _places(body, firsts):
            for name, how, part in wanted[int.from_bytes(body[place : place + _WINDOW], "little")]:
                if body.startswith(part, place):
                    found[Found(name, how, str(path))] = None
    return list(found)


def _places(body: bytes, firsts: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> Iterator[int]:
    for shift in range(_WINDOW):
        usable = (len(body) - shift) // _WINDOW * _WINDOW
        if usable > 0:
            words = np.frombuffer(body, "<u8", usable // _WINDOW, shift)
            for at in np.flatnonzero(np.isin(words, firsts)):
                yield int(at) * _WINDOW + shift
