"""The campaign against a real coordinator process, with an honest federation at work all the while. Not a test itself.

What counts as failure: an honest job that does not complete; an answer that is not ours; a traceback, an unstructured
line or a failed call in the coordinator's log; more memory or open files than `MOST_MIB` and `MOST_FILES`; an exit code
other than 0 at the end. What does not: a round that a lying member's silence costs an attempt.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
from tests.e2e.services import Service, World
from tests.fuzz.honest import HONEST, coordinator, job, site
from tests.fuzz.hostile_calls import CALLS, Arena, Attack, exchange
from tests.fuzz.hostile_sockets import SOCKETS, a_thousand_connections
from tests.fuzz.mutations import mutate_message
from tests.fuzz.tally import Gauge, Tally, connections_to

from maskwork.errors import UserError
from maskwork.job import JobSpec
from maskwork.jobs_client import JobsClient
from maskwork.net.identity import Role
from maskwork.participant.client import CoordinatorLink
from maskwork.tensors import Schema, TensorSpec, write_model
from maskwork.wire import codec
from maskwork.wire.v1 import federation_pb2

T = TypeVar("T")

MOST_MIB = 700
MAX_CONNECTIONS = 1500
MOST_FILES = MAX_CONNECTIONS + 200
STALL_S = 2.0
FILES_AT_REST = 48
CALM_S = 30.0
"""Every bound has run out by then: ten seconds for a handshake, forty for a connection that does not answer a ping."""
ATTACKERS = 6
PARAMETERS = 1_000_000
JOB_PATIENCE_S = 120.0
ASK_AGAIN_S = 2.0
LIAR = "liar"


async def campaign(tally: Tally, *, seconds: float, seed: int) -> None:
    """Attack for `seconds`, then see to it that everything still works."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # the sites here keep quiet
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"stall_s": STALL_S, "max_connections": MAX_CONNECTIONS, "max_downloads": 4}
        async with coordinator(Path(folder), **changes) as (world, service):
            arena, gauge = Arena(world, tally), Gauge(service.process.pid)
            async with AsyncExitStack() as stack:
                for name in HONEST:
                    link = await stack.enter_async_context(
                        site(world.address, world.identity(Role.PARTICIPANT, name), world.home / name)
                    )
                    _overhear(arena, link)
                await _fight(arena, gauge, stack, seconds=seconds, seed=seed)
            tally.figures["coordinator"] = gauge.figures()
            await _judge(tally, gauge, service)


async def _fight(arena: Arena, gauge: Gauge, stack: AsyncExitStack, *, seconds: float, seed: int) -> None:
    end = time.monotonic() + seconds
    watching = asyncio.create_task(_look(gauge))
    attackers = [asyncio.create_task(_attacker(arena, f"{seed}:{n}", CALLS + SOCKETS, end)) for n in range(ATTACKERS)]
    attackers.append(asyncio.create_task(_attacker(arena, f"{seed}:crowd", (a_thousand_connections,), end)))
    attackers.append(asyncio.create_task(_liar(arena, seed, end)))
    jobs = asyncio.create_task(_honest_jobs(arena, end))
    await asyncio.gather(*attackers)
    await jobs
    under_attack = arena.tally.figures["jobs_completed"]
    await _one_job(arena, "afterwards", job("afterwards", rounds=2, participants=HONEST))
    arena.tally.figures["jobs_completed"] = {"under attack": under_attack, "afterwards": 1}
    calm = time.monotonic() + CALM_S
    while (held := _held(arena, gauge)) > FILES_AT_REST and time.monotonic() < calm:
        await asyncio.sleep(0.5)
    watching.cancel()
    arena.tally.figures["files_held_afterwards"] = held
    if held > FILES_AT_REST:
        arena.tally.failed(f"the coordinator holds {held} files after the attack, above {FILES_AT_REST}")


def _held(arena: Arena, gauge: Gauge) -> int:
    """Files that the coordinator has open, but for connections that gRPC in this process has not given up yet."""
    return gauge.last_files - connections_to(arena.world.port)


async def _look(gauge: Gauge) -> None:
    while True:
        await asyncio.to_thread(gauge.look)
        await asyncio.sleep(0.2)


async def _attacker(arena: Arena, seed: str, attacks: tuple[Attack, ...], end: float) -> None:
    number = 0
    while time.monotonic() < end:
        rng = random.Random(f"{seed}:{number}")
        attack = rng.choice(attacks)
        number += 1
        try:
            await attack(arena, rng)
        except Exception as error:  # an attack that our own side cannot make is a mistake of the campaign's
            arena.tally.crashed(attack.__name__, f"{seed}:{number - 1}", error)
            await asyncio.sleep(0.5)


# --- the honest ones ------------------------------------------------------------------------------------------------


def _overhear(arena: Arena, link: CoordinatorLink) -> None:
    say = link.send

    def send(session: bytes, message: codec.Request) -> None:
        arena.overheard.append(codec.encode_request(session, message))
        del arena.overheard[:-500]
        say(session, message)

    link.send = send  # type: ignore[method-assign]


async def _honest_jobs(arena: Arena, end: float) -> None:
    """One job after the other: of the honest alone, and with the liar among them."""
    arena.tally.figures["jobs_completed"] = 0
    number = 0
    while time.monotonic() < end or not number:
        spec = job(f"honest-{number}", rounds=2, participants=HONEST)
        if number % 2:
            spec = job(f"mixed-{number}", participants=(*HONEST, LIAR), minimum=3)
        await _one_job(arena, spec.name, spec)
        number += 1


async def _one_job(arena: Arena, name: str, spec: JobSpec) -> None:
    began = time.monotonic()
    async with arena.world.client() as client:
        try:
            async with asyncio.timeout(JOB_PATIENCE_S):
                model = _model(arena.world)
                job_id = await _patiently(arena, lambda: client.submit(spec, model))
                arena.job_ids.append(job_id)
                state = await _patiently(arena, lambda: _ended(client, job_id))
        except TimeoutError:
            arena.tally.failed(f"the job {name} did not end within {JOB_PATIENCE_S:g} s")
            return
        details = await _patiently(arena, lambda: client.get(job_id))
    if state != "completed":
        arena.tally.failed(f"the job {name} ended as {state}: {details.job.reason}")
        return
    figures = arena.tally.figures
    if isinstance(figures.get("jobs_completed"), int):
        figures["jobs_completed"] += 1
    figures["slowest_job_s"] = max(figures.get("slowest_job_s", 0.0), round(time.monotonic() - began, 1))
    arena.digests.append(details.job.model_digest)
    drops = Counter(figures.get("drop_reasons", {}))
    drops.update(f"{d.participant}: {d.reason}" for d in details.drops)
    figures["drop_reasons"] = dict(drops)


async def _patiently(arena: Arena, ask: Callable[[], Awaitable[T]]) -> T:
    """Ask as a person does: again, when strangers hold every connection (docs/hostile-input.md)."""
    while True:
        try:
            return await ask()
        except UserError as error:
            if not ("cannot connect to" in str(error) or "try again" in str(error)):
                raise
            arena.tally.figures["asked_again"] = arena.tally.figures.get("asked_again", 0) + 1
            await asyncio.sleep(ASK_AGAIN_S)


async def _ended(client: JobsClient, job_id: str) -> str:
    async for event in client.watch(job_id):
        if getattr(event, "ended", False):
            return str(event.state)  # type: ignore[union-attr]  # only a summary has ended
    return "unwatched"


def _model(world: World) -> Path:
    world.models += 1
    path = world.home / f"initial-{world.models}.safetensors"
    weights = np.full(PARAMETERS, float(world.models), np.float32)
    write_model(path, Schema((TensorSpec("weight", "F32", (PARAMETERS,)),)), weights, {})
    return path


# --- the liar -------------------------------------------------------------------------------------------------------


async def _liar(arena: Arena, seed: int, end: float) -> None:
    """A member that was asked in, and spoils what it says; it comes back for more."""
    rng, number = random.Random(f"{seed}:liar"), 0
    files, home = arena.world.identity(Role.PARTICIPANT, LIAR), arena.world.home
    while time.monotonic() < end:
        number += 1
        async with site(arena.world.address, files, home / f"liar-{number}") as link:
            _lie(arena, link, rng)
            await asyncio.sleep(min(rng.uniform(1, 4), max(0.0, end - time.monotonic())))


def _lie(arena: Arena, link: CoordinatorLink, rng: random.Random) -> None:
    rate = rng.choice((0.1, 0.3, 1.0))
    unread: set[asyncio.Task[None]] = set()

    def send(session: bytes, message: codec.Request) -> None:
        outbox = link._outbox
        if outbox is None:
            return
        request = codec.encode_request(session, message)
        if isinstance(message, codec.UploadReady) and rng.random() < 0.5:
            unread.add(asyncio.create_task(_hold(arena, session, rng)))
        if rng.random() < rate:
            request = mutate_message(rng, request)
            arena.tally.tried("live session", "said")
        for _ in range(rng.choice((1, 1, 1, 2, 50))):
            outbox.put_nowait(request)

    link.send = send  # type: ignore[method-assign]


async def _hold(arena: Arena, session: bytes, rng: random.Random) -> None:
    """As a member: uploads that stall or drip, and downloads that nobody reads."""
    data, segment = b"x" * rng.choice((1, 70_000)), federation_pb2.SEGMENT_UPDATE
    chunk = federation_pb2.UploadRequest(session_id=session, segment=segment, offset=0, data=data)

    async def chunks() -> Any:
        yield chunk.SerializeToString()
        await asyncio.sleep(3600)

    with suppress(Exception):
        async with arena.channel(Role.PARTICIPANT, LIAR) as channel:
            code, details, _ = await exchange(channel, "/maskwork.wire.v1.FederationService/Upload", chunks())
        arena.answered("live upload", code, details)


# --- the verdict ----------------------------------------------------------------------------------------------------


async def _judge(tally: Tally, gauge: Gauge, service: Service) -> None:
    if service.process.returncode is not None:
        tally.failed(f"the coordinator ended with {service.process.returncode}")
    elif (code := await service.terminate()) != 0:
        tally.failed(f"the coordinator's exit code is {code}")
    if "Traceback" in service.text:
        at = service.text.index("Traceback")
        tally.failed(f"a traceback in the coordinator's log: {service.text[at : at + 3000]}")
    for line in service.lines:
        if "unstructured" in line or line["event"] == "a call failed":
            tally.failed(f"in the coordinator's log: {str(line)[:2000]}")
            break
    tally.figures["log_lines"] = dict(Counter(str(e["event"]) for e in service.lines))
    if gauge.peak_rss_mib > MOST_MIB:
        tally.failed(f"the coordinator took {gauge.peak_rss_mib:.0f} MiB, more than {MOST_MIB}")
    if gauge.most_files > MOST_FILES:
        tally.failed(f"the coordinator had {gauge.most_files} files open, more than {MOST_FILES}")
