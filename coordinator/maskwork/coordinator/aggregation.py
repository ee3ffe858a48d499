"""The coordinator's heavy work, as plain functions that a worker process runs: add uploads, unmask, make the new model.

They touch files only: the accumulator of one session, spooled uploads, models. Which upload belongs into the sum is
decided elsewhere; a result is used only if the session is still the one that asked.

The accumulator holds ring sums, not updates: no single update can be read from it. `release` leaves it as it was, so
that a crash in the middle can be followed by a second try. Where the state is encrypted, `sealed_sum` keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from maskwork.coordinator import additions, sealed_sum
from maskwork.coordinator.forks import processors, shared_vector
from maskwork.coordinator.models import ModelStore, fsync
from maskwork.coordinator.shape import SessionShape
from maskwork.coordinator.unmasking import derive_masks, unmask
from maskwork.coordinator.vault import UploadSeal, Vault
from maskwork.secagg import masking
from maskwork.secagg.encoding import Encoding, decode_statistics
from maskwork.secagg.errors import DealerEquivocated
from maskwork.secagg.keys import rotation_seed
from maskwork.secagg.ring import UInt32Array, UInt64Array
from maskwork.secagg.unmasking import UnmaskingJob
from maskwork.tensors import Float32Array, ModelFileError, file_bytes, first_non_finite, read_vector, write_model_to


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    """Everything that turns an accumulator into the next global model."""

    accumulator: Path
    shape: SessionShape
    encoding: Encoding
    job: UnmaskingJob
    survivors: int
    models: Path
    model: bytes
    metadata: tuple[tuple[str, str], ...]
    vault: Vault | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Released:
    """The new model's digest, and the sums of the statistics in the plan's order."""

    model: bytes
    statistics: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Convicted:
    """A dealer whose matching shares do not reconstruct what it announced."""

    dealer: int
    detail: str


@dataclass(frozen=True, slots=True)
class Implausible:
    """The sum decodes to something that no honest survivors can have sent."""

    detail: str


Release: TypeAlias = Released | Convicted | Implausible


def create_accumulator(path: Path, shape: SessionShape, *, seal: tuple[Vault, bytes] | None = None) -> None:
    """Make an accumulator of zeros: s statistics of eight bytes, then d coordinates of four.

    Args:
        path: The file to make.
        shape: The lengths of the session's vectors.
        seal: The vault and the session's id, if it is to be encrypted.
    """
    if seal is not None:
        sealed_sum.create(path, *seal)
        return
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * shape.statistics + 4 * shape.parameters)


def add_upload(accumulator: Path, upload: Path, shape: SessionShape, seal: UploadSeal | None = None) -> None:
    """Add one whole upload to the accumulator and delete it.

    Raises:
        ValueError: the upload has not the length that the shape gives; the accumulator is as it was.
        StoreError: one of them is not what was encrypted; the accumulator is as it was.
    """
    if seal is not None:
        sealed_sum.add(accumulator, upload, shape, seal)
        return
    if upload.stat().st_size != shape.upload_bytes:
        raise ValueError(f"an upload of {upload.stat().st_size} bytes where {shape.upload_bytes} were due")
    # Read and written rather than mapped: a page fault for each 4 KiB took longer than the additions.
    with accumulator.open("rb") as total, upload.open("rb") as added, accumulator.open("r+b") as changed:
        additions.add(total, added, shape, changed.write)
    upload.unlink()


def make_durable(accumulator: Path) -> None:
    """Force the accumulator and its directory entry to the disk."""
    fsync(accumulator)
    fsync(accumulator.parent)


class _Memory:
    """Shared memory for a model, kept from round to round: its pages are slow to get, and a job's models are alike."""

    def __init__(self) -> None:
        self._vector = shared_vector(0)

    def vector(self, length: int) -> Float32Array:
        if len(self._vector) != length:
            self._vector = shared_vector(0)  # before the next one is made
            self._vector = shared_vector(length)
        return self._vector


_memory = _Memory()  # of this worker, which does one thing at a time


def release(request: ReleaseRequest) -> Release:
    """Reconstruct and verify the secrets, remove the masks, decode the mean, write and keep the next model."""
    processes = processors()
    try:
        masks = derive_masks(request.job, processes=processes)
    except DealerEquivocated as error:
        return Convicted(error.dealer, str(error))
    statistics, read = _sum(request)
    masking.remove_statistics_masks(statistics, masks.statistics)
    sums = decode_statistics(statistics)
    examples = sums[0]
    if not (examples == int(examples) and request.survivors <= examples <= _most(request)):
        return Implausible(f"the survivors' example counts add up to {examples}")
    models = ModelStore(request.models, vault=request.vault)
    try:
        schema, model = read_vector(models.file(request.model), allocate=_memory.vector)
    except ModelFileError:
        models.verify(request.model)  # says that it is damaged
        raise
    unmask(
        read,
        masks.update,
        request.encoding,
        rotation_seed=rotation_seed(request.job.session),
        total_weight=int(examples),
        model=model,
        processes=processes,
        beside=lambda: models.verify(request.model),  # whether what was read is what its name says
    )
    if first_non_finite(model) is not None:
        return Implausible("the new model is not finite; lower the clip norm or the learning rate")
    metadata = dict(request.metadata)
    try:
        digest = models.write_in_order(
            lambda file: write_model_to(file, schema, model, metadata, named=models.directory / "the next model"),
            max_bytes=file_bytes(schema, metadata),
        )
    except ModelFileError as error:
        return Implausible(f"the new model cannot be written: {error}")
    return Released(digest, tuple(sums))


def _most(request: ReleaseRequest) -> int:
    return request.survivors * request.encoding.weight_cap


def _sum(request: ReleaseRequest) -> tuple[UInt64Array, Callable[[int, int], UInt32Array]]:
    """The statistics, and what reads a range of the coordinates."""
    if request.vault is not None:
        sealed = sealed_sum.read(request.accumulator, request.shape, request.vault, request.job.session)
        return sealed[0], lambda start, stop: sealed[1][start:stop]
    count, path = request.shape.statistics, request.accumulator

    def read(start: int, stop: int) -> UInt32Array:
        return np.fromfile(path, np.uint32, stop - start, offset=8 * count + 4 * start)

    return np.fromfile(path, np.uint64, count), read
