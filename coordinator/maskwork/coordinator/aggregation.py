"""The coordinator's heavy work, as plain functions that a worker process runs: add uploads, unmask, make the new model.

They touch files only: the accumulator of one session, spooled uploads, models. Which upload belongs into the sum is
decided elsewhere; a result is used only if the session is still the one that asked.

The accumulator holds ring sums, not updates: no single update can be read from it. `release` leaves it as it was, so
that a crash in the middle can be followed by a second try.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from maskwork.coordinator.models import ModelStore, fsync
from maskwork.secagg import masking
from maskwork.secagg.encoding import Encoding, decode_statistics, decode_sum
from maskwork.secagg.errors import DealerEquivocated
from maskwork.secagg.keys import rotation_seed
from maskwork.secagg.ring import UInt8Array, UInt32Array, UInt64Array, packed_size
from maskwork.secagg.unmasking import UnmaskingJob, remaining_masks
from maskwork.tensors import ModelFileError, read_vector, write_model


@dataclass(frozen=True, slots=True)
class SessionShape:
    """The lengths of one session's vectors.

    Attributes:
        parameters: coordinates of the update (d).
        ring_bits: bits of each on the wire (r).
        statistics: how many statistics travel beside it (s).
    """

    parameters: int
    ring_bits: int
    statistics: int

    @property
    def update_bytes(self) -> int:
        """Length of the packed update: ceil(d r / 8)."""
        return packed_size(self.parameters, self.ring_bits)

    @property
    def statistics_bytes(self) -> int:
        """Length of the masked statistics: 8 s."""
        return 8 * self.statistics

    @property
    def upload_bytes(self) -> int:
        """Length of a whole upload."""
        return self.update_bytes + self.statistics_bytes


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


def create_accumulator(path: Path, shape: SessionShape) -> None:
    """Make an accumulator of zeros: s statistics of eight bytes, then d coordinates of four."""
    with path.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * shape.statistics + 4 * shape.parameters)


def add_upload(accumulator: Path, upload: Path, shape: SessionShape) -> None:
    """Add one whole upload to the accumulator and delete it.

    Raises:
        ValueError: the upload has not the length that the shape gives; the accumulator is as it was.
    """
    if upload.stat().st_size != shape.upload_bytes:
        raise ValueError(f"an upload of {upload.stat().st_size} bytes where {shape.upload_bytes} were due")
    packed: UInt8Array = np.memmap(upload, dtype=np.uint8, mode="r")
    statistics, update = _open(accumulator, shape, "r+")
    masking.accumulate(update, packed[: shape.update_bytes], shape.ring_bits)
    masking.accumulate_statistics(statistics, packed[shape.update_bytes :].tobytes())
    upload.unlink()


def make_durable(accumulator: Path) -> None:
    """Force the accumulator and its directory entry to the disk."""
    fsync(accumulator)
    fsync(accumulator.parent)


def release(request: ReleaseRequest) -> Release:
    """Reconstruct and verify the secrets, remove the masks, decode the mean, write and keep the next model."""
    try:
        masks = remaining_masks(request.job)
    except DealerEquivocated as error:
        return Convicted(error.dealer, str(error))
    kept_statistics, kept_update = _open(request.accumulator, request.shape, "r")
    statistics, update = kept_statistics.copy(), kept_update.copy()
    masking.remove_statistics_masks(statistics, masks.statistics)
    sums = decode_statistics(statistics)
    examples = sums[0]
    if not (examples == int(examples) and request.survivors <= examples <= _most(request)):
        return Implausible(f"the survivors' example counts add up to {examples}")
    masking.remove_masks(update, masks.update)
    models = ModelStore(request.models)
    schema, model = read_vector(models.verify(request.model))
    mean = np.empty_like(model)
    decode_sum(
        update,
        request.encoding,
        rotation_seed=rotation_seed(request.job.session),
        total_weight=int(examples),
        out_f32=mean,
    )
    model += mean
    if not np.isfinite(model).all():
        return Implausible("the new model is not finite; lower the clip norm or the learning rate")
    try:
        digest = models.put(lambda path: write_model(path, schema, model, dict(request.metadata)))
    except ModelFileError as error:
        return Implausible(f"the new model cannot be written: {error}")
    return Released(digest, tuple(sums))


def _most(request: ReleaseRequest) -> int:
    return request.survivors * request.encoding.weight_cap


def _open(accumulator: Path, shape: SessionShape, mode: str) -> tuple[UInt64Array, UInt32Array]:
    raw = np.memmap(accumulator, dtype=np.uint8, mode="r+" if mode == "r+" else "r")
    edge = 8 * shape.statistics
    return raw[:edge].view(np.uint64), raw[edge:].view(np.uint32)
