"""An honest federation around a real coordinator process: production's participants, without torch. Not a test itself.

The sites are `maskwork.participant`'s own driver, ledger and link, over mTLS, in this process; what trains and masks
for them is a stand-in that adds a constant. They are the strongest oracle that there is: while the hostile clients are
at work, these must get their jobs done.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.e2e.services import Service, World

from maskwork.job import Cohort, Deadlines, EncodingSpec, JobSpec
from maskwork.net.identity import IdentityFiles, Role, certificate_identity, load_certificate
from maskwork.participant.bench.light import LightWorker, participant
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.config import TaskConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy
from maskwork.participant.work import Worker

HONEST: Final = ("honest-a", "honest-b", "honest-c")
EXAMPLES: Final = 10


class AddsAConstant(LightWorker):
    """A training worker without a process: every parameter goes up by `step`."""

    def __init__(self, step: float = 0.25) -> None:
        super().__init__(step, examples=EXAMPLES)


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
    with Ledger.open(state) as ledger:
        driver, link = participant(
            target,
            files,
            ledger,
            tasks={"gated": TaskConfig(use="m:T")},
            policy=policy or Policy(min_weight_cap=1),
            scratch=state / "scratch",
            worker=worker or AddsAConstant(),
        )
        prepare(driver, link)
        await driver.prepare()
        running = [asyncio.create_task(driver.run()), asyncio.create_task(link.run())]
        try:
            yield Attached(certificate_identity(load_certificate(files.cert)).name, driver, link, ledger)
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
