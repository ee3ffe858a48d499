"""A training worker without a process and without torch: every parameter of its update is the same.

A participant of `bench scale` has this in the place of its worker, so that hundreds of them fit into one process. All
that is masked and sent is real.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

import numpy as np

from maskwork.metrics import statistic_values
from maskwork.participant.bench.sizes import EXAMPLES
from maskwork.participant.training_calls import MaskRequest, MaskResult, TrainRequest, TrainSummary
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.masking import mask_statistics, mask_update
from maskwork.secagg.ring import packed_size
from maskwork.tensors import read_schema

METRICS: Final = {"loss": 0.5}

P = ParamSpec("P")
R = TypeVar("R")


class LightWorker:
    """What a participant's driver calls, done in a thread of this process."""

    def __init__(self, step: float = 1e-4) -> None:
        self._step = step
        self._parameters: dict[bytes, int] = {}

    async def start(self) -> None:
        """Nothing has to be loaded."""

    async def close(self) -> None:
        """Nothing has to be ended."""

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do what the function of that name does in a training worker."""
        (argument,) = args
        done = {"train": self._train, "mask": self._mask, "discard": self._discard}[function.__name__]
        return await asyncio.to_thread(done, argument)  # type: ignore[arg-type]  # by the function's name

    def _train(self, request: TrainRequest) -> TrainSummary:
        self._parameters[request.session_id] = read_schema(request.model_path).size
        return TrainSummary(EXAMPLES, METRICS, 0, {}, 1.0, 0.0)

    def _mask(self, request: MaskRequest) -> MaskResult:
        size = self._parameters[request.session_id]
        packed = np.zeros(packed_size(size, request.encoding.ring_bits), np.uint8)
        clamped = mask_update(
            np.full(size, self._step, np.float32),
            EXAMPLES,
            encoding=request.encoding,
            keys=request.keys,
            rotation_seed=request.rotation_seed,
            out_u8=packed,
        )
        request.output.write_bytes(packed.data)
        names, bounds = zip(*((spec.name, spec.bound) for spec in request.statistics), strict=True)
        values = statistic_values(names, examples=EXAMPLES, training=METRICS, evaluation_examples=0, evaluation={})
        encoded = encode_statistics(values, bounds, names)
        statistics = mask_statistics(encoded, request.keys.statistics)
        return MaskResult(packed.nbytes, statistics, clamped, hashlib.sha256(packed.data).digest())

    def _discard(self, session: bytes) -> None:
        self._parameters.pop(session, None)
