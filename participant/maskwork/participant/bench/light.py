"""A participant that fits into a process with hundreds of others: production's own, but for its training worker.

In the place of the worker is one without a process and without torch, every parameter of whose update is the same. All
that is masked and sent is real.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import numpy as np

from maskwork.metrics import statistic_values
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import IdentityFiles, ParticipantVerifier, Role, TrustRoots, load_certificate, to_der
from maskwork.participant.bench.sizes import EXAMPLES
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.config import TaskConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy
from maskwork.participant.training_calls import MaskRequest, MaskResult, TrainRequest, TrainSummary
from maskwork.participant.work import SiteIdentity, Worker
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.masking import mask_statistics, mask_update
from maskwork.secagg.ring import packed_size
from maskwork.tensors import read_schema

METRICS: Final = {"loss": 0.5}

P = ParamSpec("P")
R = TypeVar("R")


class LightWorker:
    """What a participant's driver calls, done in a thread of this process."""

    def __init__(self, step: float = 1e-4, *, examples: int = EXAMPLES) -> None:
        self._step, self._examples = step, examples
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
        return TrainSummary(self._examples, METRICS, 0, {}, 1.0, 0.0)

    def _mask(self, request: MaskRequest) -> MaskResult:
        size = self._parameters[request.session_id]
        packed = np.zeros(packed_size(size, request.encoding.ring_bits), np.uint8)
        clamped = mask_update(
            np.full(size, self._step, np.float32),
            self._examples,
            encoding=request.encoding,
            keys=request.keys,
            rotation_seed=request.rotation_seed,
            out_u8=packed,
        )
        request.output.write_bytes(packed.data)
        names, bounds = zip(*((spec.name, spec.bound) for spec in request.statistics), strict=True)
        values = statistic_values(
            names, examples=self._examples, training=METRICS, evaluation_examples=0, evaluation={}
        )
        encoded = encode_statistics(values, bounds, names)
        statistics = mask_statistics(encoded, request.keys.statistics)
        return MaskResult(packed.nbytes, statistics, clamped, hashlib.sha256(packed.data).digest())

    def _discard(self, session: bytes) -> None:
        self._parameters.pop(session, None)


def participant(
    coordinator: str,
    files: IdentityFiles,
    ledger: Ledger,
    *,
    tasks: Mapping[str, TaskConfig],
    policy: Policy,
    scratch: Path,
    worker: Worker,
    roots: TrustRoots | None = None,
) -> tuple[Driver, CoordinatorLink]:
    """A participant's driver and its way to the coordinator, put together; nothing runs yet.

    `roots` may be shared, and what they remember with them; None: from the participant's own files.

    Raises:
        IdentityError: Its identity files are not usable.
    """
    roots = roots or TrustRoots.from_file(files.ca)
    own = roots.verify(to_der(load_certificate(files.cert)), now=time.time(), role=Role.PARTICIPANT)
    federation = own.identity.federation
    driver = Driver(
        identity=SiteIdentity(
            federation,
            own.name,
            own.fingerprint,
            SoftwareSigner(load_private_key(files.key)),
            ParticipantVerifier(roots, federation),
        ),
        ledger=ledger,
        policy=policy,
        tasks=tasks,
        seed=1,
        scratch=scratch,
        make_worker=lambda _name, _task: worker,
    )
    link = driver.link = CoordinatorLink(
        coordinator,
        files,
        roots,
        federation=federation,
        tasks=tuple(tasks),
        active_session=driver.active_session,
        inbox=driver.inbox,
    )
    return driver, link
