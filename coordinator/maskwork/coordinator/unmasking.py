"""From a sum under masks to the next model, range by range, on as many processors as there are.

First every secret is reconstructed and every mask key derived, which for a thousand participants is most of the time;
then the vector is cut into ranges, and of each the masks are taken off, the mean is decoded and added to the model.
What is in memory is the model and a range or two of the sum, never the whole sum.

It is NOT pure (`maskwork.secagg` is, and does the work), and it reads and writes no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from maskwork.coordinator.forks import each_in_a_process
from maskwork.secagg.encoding import Encoding, Rotation, decode_sum
from maskwork.secagg.masking import remove_masks
from maskwork.secagg.prg import KEY_BYTES, SignedKey
from maskwork.secagg.ring import CACHE_LINE, UInt32Array
from maskwork.secagg.rotation import Float32Array, block_length
from maskwork.secagg.unmasking import RemainingMasks, UnmaskingJob, remaining_masks

RANGE: Final = 1 << 20
"""Coordinates at a time, 4 MiB: setting up the ciphers of a range costs nothing beside expanding them."""

WORTH_A_PROCESS: Final = 1 << 25
"""Mask coordinates (13 ms of the cipher) below which another process costs more than it saves."""
AGREEMENTS_WORTH_A_PROCESS: Final = 500


def derive_masks(job: UnmaskingJob, *, processes: int) -> RemainingMasks:
    """`remaining_masks`, with the dropouts' key agreements spread over processes where they are many.

    Raises:
        DealerEquivocated: As `remaining_masks`.
    """
    agreements = sum(len(secret.neighbours) for secret in job.mask_secrets)
    count = max(1, min(processes, agreements // AGREEMENTS_WORTH_A_PROCESS))
    if count == 1:
        return remaining_masks(job)
    parts = [UnmaskingJob(job.session, job.self_seeds[i::count], job.mask_secrets[i::count]) for i in range(count)]
    update: list[SignedKey] = []
    statistics: list[SignedKey] = []
    for packed in each_in_a_process([partial(_packed_masks, part) for part in parts]):
        for keys, into in zip(packed, (update, statistics), strict=True):
            into += _unpacked(keys)
    return RemainingMasks(tuple(update), tuple(statistics))


def _packed_masks(job: UnmaskingJob) -> tuple[bytes, bytes]:
    masks = remaining_masks(job)
    return _packed(masks.update), _packed(masks.statistics)


def _packed(keys: Sequence[SignedKey]) -> bytes:
    return b"".join(key.key + (b"-" if key.negative else b"+") for key in keys)


def _unpacked(packed: bytes) -> list[SignedKey]:
    step = KEY_BYTES + 1
    return [
        SignedKey(packed[at : at + KEY_BYTES], packed[at + KEY_BYTES : at + step] == b"-")
        for at in range(0, len(packed), step)
    ]


def unmask(
    read: Callable[[int, int], UInt32Array],
    masks: Sequence[SignedKey],
    encoding: Encoding,
    *,
    rotation_seed: bytes,
    total_weight: int,
    model: Float32Array,
    processes: int,
    beside: Callable[[], object] | None = None,
) -> None:
    """Take the masks off the sum, decode the mean, and add it to the model.

    Args:
        read: Gives coordinates [start, stop) of the sum as uint32, in memory that may be overwritten.
        masks: The masks in the sum, as they stand there.
        encoding: The session's.
        rotation_seed: 32 public bytes.
        total_weight: Sum of the survivors' weights.
        model: float32[d]; becomes the next model. With several processes it lies in shared memory.
        processes: The most to use; fewer where there is little to do.
        beside: Something else to be done meanwhile, in a process of its own.

    Raises:
        ValueError: As `decode_sum`.
        Exception: What `beside` raised.
    """
    length = len(model)
    wanted = length * (len(masks) + 1) // WORTH_A_PROCESS
    ranges = cut(length, max(1, min(processes, wanted)), rotated=encoding.rotation is Rotation.HADAMARD)

    def part(start: int, stop: int) -> None:
        for begin, end in pieces(start, stop, length=length):
            ring = read(begin, end)
            remove_masks(ring, masks, begin)
            mean = np.empty(end - begin, np.float32)
            decode_sum(
                ring,
                encoding,
                rotation_seed=rotation_seed,
                total_weight=total_weight,
                out_f32=mean,
                start=begin,
                length=length,
            )
            with np.errstate(over="ignore", invalid="ignore"):  # the caller looks whether the model is finite
                model[begin:end] += mean

    works: list[Callable[[], object]] = [partial(part, start, stop) for start, stop in ranges]
    if beside is not None:
        works.append(beside)
    each_in_a_process(works)


def cut(length: int, count: int, *, rotated: bool) -> list[tuple[int, int]]:
    """[0, length) in up to `count` ranges of about the same length, cut where a rotated vector may be cut."""
    unit = block_length(length) if rotated else CACHE_LINE
    blocks = max(1, length // unit)  # the last one holds the tail
    edges = sorted({blocks * i // count * unit for i in range(count)})
    return list(zip(edges, [*edges[1:], length], strict=True))


def pieces(start: int, stop: int, *, length: int) -> list[tuple[int, int]]:
    """A range in pieces of about `RANGE`; the last one is longer, so that no rotated block is cut from its tail."""
    edges = list(range(start, max(start + 1, stop - RANGE + 1 if stop == length else stop), RANGE))
    return list(zip(edges, [*edges[1:], stop], strict=True))
