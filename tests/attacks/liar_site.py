"""A participant that lies: a good certificate, production's own driver, and a test between it and the coordinator.

The coordinator is the real process. The liar's state is the real protocol's, so a lie can use every secret that a
dishonest member has: `secrets_of` gives what it dealt with. Beside it four honest sites take part in every job. Not a
test itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from tests.e2e.services import World
from tests.fuzz.honest import EXAMPLES, AddsAConstant, Attached, attached, coordinator, job

from maskwork.job import JobSpec
from maskwork.job_events import AttemptAborted, JobDetails, JobSummary, Waiting
from maskwork.net.identity import Role
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.driver import Driver
from maskwork.participant.training_calls import MaskRequest, MaskResult
from maskwork.participant.work import Worker
from maskwork.secagg import client_states
from maskwork.secagg.encoding import encode_statistics
from maskwork.secagg.masking import mask_statistics
from maskwork.secagg.prg import add_keystreams_u32
from maskwork.secagg.ring import pack, packed_size
from maskwork.tensors import read_vector
from maskwork.wire import codec
from maskwork.wire.codec import Request
from maskwork.wire.v1 import federation_pb2

PATIENCE_S: Final = 40.0
HONEST: Final = ("site-a", "site-b", "site-c", "site-d")
LIAR: Final = "site-e"
STEPS: Final = {name: 0.01 * (1 + at) for at, name in enumerate((*HONEST, LIAR))}

Say: TypeAlias = Callable[[Driver, bytes, Request], Sequence[Request | federation_pb2.ConnectRequest]]
"""What a liar says in a session instead of a message."""


def the_truth(_driver: Driver, _session: bytes, message: Request) -> Sequence[Request]:
    return (message,)


def instead(kind: type, change: Callable[[client_states.State, Request], Request | None]) -> Say:
    """A lie about messages of one kind, made with the liar's own state; None: nothing is said."""

    def say(driver: Driver, _session: bytes, message: Request) -> Sequence[Request]:
        if not isinstance(message, kind):
            return (message,)
        work = driver._work
        assert work is not None
        assert work.state is not None
        said = change(work.state, message)
        return () if said is None else (said,)

    return say


class Arena:
    """A coordinator process and the honest sites, as long as the tests of a file run."""

    def __init__(self, world: World, honest: Sequence[Attached]) -> None:
        self.world, self.honest = world, honest
        self._liars = 0

    @asynccontextmanager
    async def lying(self, say: Say = the_truth, *, worker: Worker | None = None) -> AsyncIterator[Attached]:
        """The liar, connected, with a state directory of its own each time."""
        self._liars += 1

        def prepare(driver: Driver, link: CoordinatorLink) -> None:
            def send(session: bytes, message: Request) -> None:
                for said in say(driver, session, message):
                    request = codec.encode_request(session, said) if isinstance(said, Request) else said
                    if link._outbox is not None:
                        link._outbox.put_nowait(request)

            link.send = send  # type: ignore[method-assign]  # the lie

        files = self.world.identity(Role.PARTICIPANT, LIAR)
        state = self.world.home / f"{LIAR}-{self._liars}"
        worker = worker or AddsAConstant(STEPS[LIAR])
        async with attached(self.world.address, files, state, worker=worker, prepare=prepare) as running:
            yield running

    async def run(self, spec: JobSpec, model: Path | None = None) -> JobDetails:
        """A job to its end."""
        async with self.world.client() as client:
            job_id = await client.submit(spec, model or self.world.model())
            try:
                async with asyncio.timeout(PATIENCE_S):
                    async for event in client.watch(job_id):
                        if isinstance(event, JobSummary) and event.ended:
                            break
            except TimeoutError:
                details = await client.get(job_id)
                await client.abort(job_id)  # so that the others' jobs have their turn
                raise AssertionError(f"the job did not end: {details}") from None
            return await client.get(job_id)

    async def run_until_it_waits(self, spec: JobSpec) -> tuple[str, JobDetails]:
        """A job until it waits because of what happened in it, and why; it is ended then."""
        async with self.world.client() as client:
            job_id = await client.submit(spec, self.world.model())
            attempts, why = 0, ""
            async for event in client.watch(job_id):
                attempts += isinstance(event, AttemptAborted)
                if isinstance(event, Waiting) and attempts > 1 and "sites needed are ready" in event.detail:
                    why = event.detail
                    break
            details = await client.get(job_id)
            await client.abort(job_id)
            return why, details

    def mean(self, details: JobDetails) -> float:
        """What the only round of a job added to every parameter."""
        models = self.world.home / "coordinator-state" / "models"
        after = read_vector(models / f"{details.job.model_digest.hex()}.safetensors")[1]
        before = read_vector(self.world.home / f"initial-{self.world.models}.safetensors")[1]
        added = after - before
        assert np.ptp(added) < 1e-4  # every site's update is rounded to one step of the ring or the next, by chance
        return float(added.mean())


def everybody(name: str, **changes: object) -> JobSpec:
    """A job for the honest and the liar, which can go on without it."""
    return job(name, participants=(*HONEST, LIAR), minimum=3).model_copy(update=changes)


@asynccontextmanager
async def arena(home: Path) -> AsyncIterator[Arena]:
    """The coordinator process and four honest sites."""
    async with coordinator(home) as (world, _), AsyncExitStack() as stack:
        honest = []
        for name in HONEST:
            files, worker = world.identity(Role.PARTICIPANT, name), AddsAConstant(STEPS[name])
            honest.append(await stack.enter_async_context(attached(world.address, files, home / name, worker=worker)))
        yield Arena(world, honest)


class RingElements(AddsAConstant):
    """A worker that encodes nothing: it masks the ring element and the statistics that it was given."""

    def __init__(self, element: int, *, examples: float = EXAMPLES) -> None:
        super().__init__()
        self._element, self._claimed = element, examples

    def _mask(self, request: MaskRequest) -> MaskResult:
        size, bits = self._parameters[request.session_id], request.encoding.ring_bits
        ring = np.full(size, self._element % (1 << bits), np.uint32)
        add_keystreams_u32(ring, request.keys.update)
        packed = np.zeros(packed_size(size, bits), np.uint8)
        pack(ring, bits, packed)
        request.output.write_bytes(packed.tobytes())
        values = [self._claimed, *(0.0 for _ in request.statistics[1:])]
        limits = [max(s.bound, abs(v)) for s, v in zip(request.statistics, values, strict=True)]
        encoded = encode_statistics(values, limits, [s.name for s in request.statistics])
        return MaskResult(packed.nbytes, mask_statistics(encoded, request.keys.statistics), 0)
