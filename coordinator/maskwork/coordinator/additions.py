"""One upload added to a sum, tile by tile: whatever lies on the disk, plain or sealed, the arithmetic is the same.

It opens and names no files; `aggregation` and `sealed_sum` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np

from maskwork.coordinator.shape import SessionShape
from maskwork.secagg import masking
from maskwork.secagg.ring import packed_size

_TILE: Final = 1 << 18  # coordinates at a time: a megabyte, which stays in the cache; a multiple of 8, as packing needs


class Readable(Protocol):
    """Where bytes come from, in order."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill as much of `buffer` as there is."""
        ...


class Seekable(Readable, Protocol):
    """The same, from any place."""

    def seek(self, offset: int, /) -> int:
        """Go on from there."""
        ...


def add(total: Readable, added: Seekable, shape: SessionShape, write: Callable[[memoryview], object]) -> None:
    """Read a sum and an upload, and write their sum in order: s statistics of eight bytes, d coordinates of four.

    Nothing is written that `total` has not been read beyond, so it may be the very file that is written to.

    Raises:
        ValueError: `total` or `added` ends too early.
    """
    statistics, masked = np.empty(shape.statistics, np.uint64), memoryview(bytearray(shape.statistics_bytes))
    added.seek(shape.update_bytes)
    _fill(statistics.view(np.uint8).data, total)
    _fill(masked, added)
    masking.accumulate_statistics(statistics, bytes(masked))
    write(statistics.view(np.uint8).data)
    added.seek(0)
    adder = masking.Adder(shape.ring_bits)
    tile, packed = np.empty(_TILE, np.uint32), np.empty(packed_size(_TILE, shape.ring_bits), np.uint8)
    for start in range(0, shape.parameters, _TILE):
        count = min(_TILE, shape.parameters - start)
        part, arrived = tile[:count], packed[: packed_size(count, shape.ring_bits)]
        _fill(part.view(np.uint8).data, total)
        _fill(arrived.data, added)
        adder.add(part, arrived)
        write(part.view(np.uint8).data)


def _fill(buffer: memoryview, source: Readable) -> None:
    if (read := source.readinto(buffer)) != len(buffer):
        raise ValueError(f"{read} bytes where {len(buffer)} more were due: it was cut short")
