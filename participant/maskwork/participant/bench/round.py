"""Seconds, bytes and memory of whole masked rounds between processes, beside the same rounds without masks.

The masked and the plain federation are up together and take turns, a job each, so that whatever else the machine does
meets both. What the watching itself costs is kept out of the timed jobs: bytes and memory are taken in a run of their
own, in which participants reach the coordinator through a relay that counts.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from maskwork.bench.cpu import cpu_seconds
from maskwork.bench.memory import MIB, PeakMemory
from maskwork.job import JobSpec
from maskwork.job_events import STAGES, JobSummary, RoundCommitted, Waiting
from maskwork.jobs_client import JobsClient
from maskwork.participant.bench import federation as federations
from maskwork.participant.bench.federation import IDLE, Federation
from maskwork.participant.bench.relay import CountingRelay
from maskwork.participant.local.children import Children
from maskwork.participant.local.failure import RunFailed
from maskwork.participant.local.files import HOST

WARM_UP: Final = 1
"""Rounds at the beginning of each job that are not counted."""
SILENCE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; `turns` is how often masked and plain take turns."""

    participants: int
    parameters: int
    rounds: int
    turns: int
    plain: bool
    preset: str


async def measure(folder: Path, options: Options) -> dict[str, Any]:
    """Run everything; what the command prints as JSON.

    Raises:
        RunFailed: A process ended, or a job did not complete.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True)
    model = await asyncio.to_thread(federations.write_initial_model, folder, options.parameters)
    async with Children(logs) as children:
        timed = await children.during(_timed(children, folder, options, model))
        await children.stop()
    async with Children(logs) as children:
        watched = await children.during(_watched(children, folder, options, model))
        await children.stop()
    return {"shape": asdict(options), **timed, **watched}


async def _timed(children: Children, folder: Path, options: Options, model: Path) -> dict[str, Any]:
    kinds = ("masked", "plain") if options.plain else ("masked",)
    sites = tuple(f"site-{i}" for i in range(options.participants))
    made = {kind: federations.create(folder / kind, sites, plain=kind == "plain") for kind in kinds}
    for federation in made.values():
        await federations.start_coordinator(children, federation)
        await federations.start_sites(children, federation, options.parameters, port=federation.port)
    rounds: dict[str, list[RoundCommitted]] = {kind: [] for kind in kinds}
    work: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    between: dict[str, list[float]] = {kind: [] for kind in kinds}
    for federation in made.values():  # everybody has loaded what it needs when the first job that counts begins
        await run_job(federation, federations.job(federation, rounds=WARM_UP, preset=options.preset), model)
    for _ in range(options.turns):
        for kind, federation in made.items():
            spec = federations.job(federation, rounds=WARM_UP + options.rounds, preset=options.preset)
            before = _cpu(children, federation)
            done = await run_job(federation, spec, model)
            after = _cpu(children, federation)
            work[kind].append({name: (after[name] - before[name]) / len(done) for name in after})
            rounds[kind] += done[WARM_UP:]
            ends = [committed.committed_at for committed in done]
            between[kind] += [b - a for a, b in pairwise(ends)]
    return {kind: {**_figures(rounds[kind], between[kind]), "cpu_s": _median_of(work[kind])} for kind in kinds}


def _cpu(children: Children, federation: Federation) -> dict[str, float]:
    """Processor seconds of the coordinator and of all participants together, so far."""
    used = {member: cpu_seconds(children.pid(federation.name(member))) for member in ("coordinator", *federation.sites)}
    coordinator = used.pop("coordinator")
    return {"coordinator": coordinator, "participants together": sum(used.values())}


def _median_of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(f[name] for f in figures) for name in figures[0]}


def _figures(rounds: Sequence[RoundCommitted], between: Sequence[float]) -> dict[str, Any]:
    return {
        "round_s": statistics.median(r.seconds for r in rounds),
        "commit_to_commit_s": statistics.median(between),
        "stage_s": {stage: statistics.median(r.stage_seconds.get(stage, 0.0) for r in rounds) for stage in STAGES},
        "all_rounds_s": [round(r.seconds, 4) for r in rounds],
        "upload_bytes_per_participant": rounds[0].uplink_bytes // len(rounds[0].survivors),
    }


async def _watched(children: Children, folder: Path, options: Options, model: Path) -> dict[str, Any]:
    sites = tuple(f"site-{i}" for i in range(options.participants))
    federation = federations.create(folder / "watched", (*sites, IDLE))
    await federations.start_coordinator(children, federation)
    async with CountingRelay(federation.port) as relay:
        await federations.start_sites(children, federation, options.parameters, port=relay.port)
        pids = {member: children.pid(federation.name(member)) for member in ("coordinator", *federation.sites)}
        memory = PeakMemory(pids)
        spec = federations.job(federation, rounds=WARM_UP, preset=options.preset)
        await run_job(federation, spec, model)  # everybody is connected and warm from here on
        up, down = relay.up, relay.down
        watching = asyncio.create_task(memory.watch())
        rounds = max(2, min(options.rounds, 3))
        spec = federations.job(federation, rounds=rounds, preset=options.preset)
        await run_job(federation, spec, model)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    return {
        "wire_bytes_per_round": {"up": (relay.up - up) // rounds, "down": (relay.down - down) // rounds},
        "peak_memory_mib": _memory(memory.peaks, sites),
    }


def _memory(peaks: Mapping[str, int], sites: Sequence[str]) -> dict[str, float]:
    highest = max(peaks[site] for site in sites)
    figures = {
        "coordinator": peaks["coordinator"],
        "participant": highest,
        "participant, imports alone": peaks[IDLE],
        "participant over its imports": highest - peaks[IDLE],
    }
    return {name: round(value / MIB, 1) for name, value in figures.items()}


async def run_job(federation: Federation, spec: JobSpec, model: Path) -> tuple[RoundCommitted, ...]:
    """Submit a job, wait until it has ended, and return its rounds.

    Raises:
        RunFailed: It did not complete, or nothing was heard of it for `SILENCE_S`.
    """
    said = ""
    async with JobsClient(f"{HOST}:{federation.port}", federation.researcher) as client:
        job_id = await client.submit(spec, model)
        events = client.watch(job_id)
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    event = await anext(events)
            except (TimeoutError, StopAsyncIteration):
                raise RunFailed(f"nothing was heard of the job for {SILENCE_S:g} s; the last was: {said}") from None
            if isinstance(event, Waiting):
                said = event.detail
            if isinstance(event, JobSummary) and event.ended:
                break
        if event.state != "completed":
            raise RunFailed(f"the job {job_id} is {event.state}: {event.reason}")
        return (await client.get(job_id)).rounds
