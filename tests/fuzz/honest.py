"""An honest federation around a real coordinator process: production's participants, without torch. Not a test itself.

The sites are `maskwork.participant`'s own driver, ledger and link, over mTLS, in this process; what trains and masks
for them is a stand-in that adds a constant. They are the strongest oracle that there is: while the hostile clients are
at work, these must get their jobs done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import numpy as np
from tests.e2e.services import Service, World

from maskwork.job import Cohort, Deadlines, EncodingSpec, JobSpec
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import IdentityFiles, ParticipantVerifier, Role, TrustRoots, load_certificate, to_der
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.config import TaskConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy
from maskwork.participant.training_calls import MaskRequest, MaskResult, TrainRequest, TrainSummary
from maskwork.participant.work import SiteIdentity, Worker
from maskwork.secagg import masking
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.ring import packed_size
from maskwork.tensors import read_schema

P = ParamSpec("P")
R = TypeVar("R")

HONEST: Final = ("honest-a", "honest-b", "honest-c")
EXAMPLES: Final = 10


class AddsAConstant:
    """A training worker without a process: every parameter goes up by `step`."""

    def __init__(self, step: float = 0.25) -> None:
        self._step = step
        self._parameters: dict[bytes, int] = {}

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        (argument,) = args
        done = {"train": self._train, "mask": self._mask, "discard": self._discard}[function.__name__]
        return await asyncio.to_thread(done, argument)  # type: ignore[arg-type]  # by the function's name

    def _train(self, request: TrainRequest) -> TrainSummary:
        self._parameters[request.session_id] = read_schema(request.model_path).size
        return TrainSummary(EXAMPLES, {"loss": 0.5}, 0, {}, 1.0, 0.0)

    def _mask(self, request: MaskRequest) -> MaskResult:
        size = self._parameters[request.session_id]
        packed = np.zeros(packed_size(size, request.encoding.ring_bits), np.uint8)
        masking.mask_update(
            np.full(size, self._step, np.float32),
            EXAMPLES,
            encoding=request.encoding,
            keys=request.keys,
            rotation_seed=request.rotation_seed,
            out_u8=packed,
        )
        request.output.write_bytes(packed.tobytes())
        values = [float(EXAMPLES), *(0.5 * EXAMPLES for _ in request.statistics[1:])]
        specs = request.statistics
        encoded = encode_statistics(values, [s.bound for s in specs], [s.name for s in specs])
        return MaskResult(packed.nbytes, masking.mask_statistics(encoded, request.keys.statistics), 0)

    def _discard(self, session: bytes) -> None:
        self._parameters.pop(session, None)


@dataclass(frozen=True, slots=True)
class Attached:
    """One participant that is running here: production's own parts, but for the worker."""

    name: str
    driver: Driver
    link: CoordinatorLink
    ledger: Ledger


@asynccontextmanager
async def site(target: str, files: IdentityFiles, state: Path) -> AsyncIterator[CoordinatorLink]:
    """One participant, connected for as long as the block runs."""
    async with attached(target, files, state) as running:
        yield running.link


@asynccontextmanager
async def attached(
    target: str,
    files: IdentityFiles,
    state: Path,
    *,
    policy: Policy | None = None,
    worker: Worker | None = None,
    prepare: Callable[[Driver, CoordinatorLink], None] = lambda _driver, _link: None,
) -> AsyncIterator[Attached]:
    """The same, with a policy and a worker of the caller's; `prepare` sees it before it connects."""
    roots = TrustRoots.from_file(files.ca)
    own = roots.verify(to_der(load_certificate(files.cert)), now=time.time(), role=Role.PARTICIPANT)
    federation, tasks = own.identity.federation, {"gated": TaskConfig(use="m:T")}
    with Ledger.open(state) as ledger:
        driver = Driver(
            identity=SiteIdentity(
                federation,
                own.name,
                own.fingerprint,
                SoftwareSigner(load_private_key(files.key)),
                ParticipantVerifier(roots, federation),
            ),
            ledger=ledger,
            policy=policy or Policy(min_weight_cap=1),
            tasks=tasks,
            seed=1,
            scratch=state / "scratch",
            make_worker=lambda _name, _task: worker or AddsAConstant(),
        )
        link = driver.link = CoordinatorLink(
            target,
            files,
            roots,
            federation=federation,
            tasks=tuple(tasks),
            active_session=driver.active_session,
            inbox=driver.inbox,
        )
        prepare(driver, link)
        await driver.prepare()
        running = [asyncio.create_task(driver.run()), asyncio.create_task(link.run())]
        try:
            yield Attached(own.name, driver, link, ledger)
        finally:
            for task in running:
                task.cancel()
            done = await asyncio.gather(*running, return_exceptions=True)
            await driver.close()
            for result in done:
                if isinstance(result, Exception):
                    raise result


@asynccontextmanager
async def honest_sites(world: World) -> AsyncIterator[None]:
    """The three, connected."""
    async with (
        site(world.address, world.identity(Role.PARTICIPANT, HONEST[0]), world.home / HONEST[0]),
        site(world.address, world.identity(Role.PARTICIPANT, HONEST[1]), world.home / HONEST[1]),
        site(world.address, world.identity(Role.PARTICIPANT, HONEST[2]), world.home / HONEST[2]),
    ):
        yield


@asynccontextmanager
async def coordinator(home: Path, **changes: str | int | float) -> AsyncIterator[tuple[World, Service]]:
    """A real coordinator process on loopback."""
    world = World(home)
    try:
        service = await world.start("coordinator", "coordinator", world.coordinator_config(**changes))
        await service.logged("coordinator ready")
        yield world, service
    finally:
        await world.close()


def job(name: str, *, rounds: int = 1, participants: tuple[str, ...] = (), minimum: int = 3) -> JobSpec:
    """A job for whoever is there, or for the named ones. Deadlines are short: a liar's silence costs seconds."""
    return JobSpec(
        name=name,
        task="gated",
        rounds=rounds,
        max_attempts=1000,
        metrics={"train.loss": 10.0},
        encoding=EncodingSpec(weight_cap=EXAMPLES),
        cohort=Cohort(participants=participants, min_participants=minimum, wait_s=0.2),
        deadlines=Deadlines(
            advertise_keys_s=5,
            share_keys_s=5,
            masked_update_s=10,
            consistency_check_s=5,
            unmask_s=5,
            reconnect_s=1,
        ),
    )
