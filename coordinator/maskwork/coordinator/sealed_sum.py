"""The sum of a session where the state is encrypted: a sealed accumulator, and sealed uploads added to it.

A sealed file cannot be changed in place, so each addition writes the next accumulator beside the one before and takes
its place in one step: a worker that dies in the middle leaves the sum as it was. Both are streamed; nothing in memory
is as long as the update.

It decides nothing; `aggregation` calls it in the place of the plain file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maskwork.coordinator import additions
from maskwork.coordinator.sealed import SealedReader, SealedWriter
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.vault import UploadSeal, Vault
from maskwork.secagg.ring import UInt32Array, UInt64Array


def create(path: Path, vault: Vault, session: bytes) -> None:
    """Make an accumulator of zeros, which is an empty one until something is added."""
    with path.open("x+b", buffering=0) as file:
        SealedWriter(file).seal(vault.accumulator(session), vault.keys.current)


def add(accumulator: Path, upload: Path, shape: SessionShape, seal: UploadSeal) -> None:
    """Add one whole upload to the accumulator and delete it.

    Raises:
        ValueError: The upload has not the length that the shape gives; the accumulator is as it was.
        StoreError: One of them is not what was sealed; the accumulator is as it was.
    """
    following = accumulator.with_name(accumulator.name + ".next")
    try:
        with seal.vault.open(upload, seal.upload) as added, seal.vault.open(accumulator, seal.total) as total:
            if added.size != shape.upload_bytes:
                raise ValueError(f"an upload of {added.size} bytes where {shape.upload_bytes} were due")
            with following.open("w+b", buffering=0) as file:
                writer = SealedWriter(file)
                _check_length(total, shape)
                additions.add(total if total.size else _Zeros(), added, shape, writer.write)
                writer.seal(seal.total, seal.vault.keys.current)
        following.replace(accumulator)
    finally:
        following.unlink(missing_ok=True)
    upload.unlink()


class _Zeros:
    """An accumulator to which nothing was added yet."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer."""
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def read(accumulator: Path, shape: SessionShape, vault: Vault, session: bytes) -> tuple[UInt64Array, UInt32Array]:
    """The statistics and the coordinates of the sum, in memory.

    Raises:
        StoreError: It is not what was sealed.
    """
    statistics = np.zeros(shape.statistics, np.uint64)
    update = np.zeros(shape.parameters, np.uint32)
    with vault.open(accumulator, vault.accumulator(session)) as file:
        _check_length(file, shape)
        file.readinto(statistics.view(np.uint8).data)
        file.readinto(update.view(np.uint8).data)
    return statistics, update


def _check_length(total: SealedReader, shape: SessionShape) -> None:
    if total.size not in (0, 8 * shape.statistics + 4 * shape.parameters):
        raise ValueError(f"an accumulator of {total.size} bytes, which is none of this session's")
