"""The physical floor of masking: the AES-128-CTR keystream alone, never added to anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maskwork.secagg.prg import KeystreamReader
from maskwork.secagg.ring import TILE, scratch

_TILE_BYTES = 4 * TILE


def expand(keys: Sequence[bytes], coordinates: int) -> None:
    """Expand `coordinates` ring coordinates (four bytes each) of every key into one reused tile."""
    tile = scratch(_TILE_BYTES, np.uint8)
    readers = [KeystreamReader(key) for key in keys]
    left = 4 * coordinates
    while left:
        part = tile[: min(left, _TILE_BYTES)]
        for reader in readers:
            reader.read_into(part)
        left -= len(part)
