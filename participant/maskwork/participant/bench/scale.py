"""One masked round with very many live participants, each on a mutual TLS connection of its own.

They live in a few processes (`crowd`), the coordinator is a real one. What is measured is the round, from the plan to
the commit, and the coordinator's memory; not how long it takes to start them.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskwork.bench.cpu import cpu_seconds
from maskwork.bench.memory import MIB, PeakMemory
from maskwork.job_events import STAGES
from maskwork.participant.bench import federation as federations
from maskwork.participant.bench.round import run_job
from maskwork.participant.local.children import Children
from maskwork.participant.local.files import HOST


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured; the participants live in `processes` processes."""

    participants: int
    parameters: int
    processes: int
    rounds: int


async def measure(folder: Path, options: Options) -> dict[str, Any]:
    """Run it; what the command prints as JSON.

    Raises:
        RunFailed: A process ended, or the job did not complete.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True)
    model = await asyncio.to_thread(federations.write_initial_model, folder, options.parameters)
    sites = tuple(f"site-{i:05}" for i in range(options.participants))
    federation = await asyncio.to_thread(federations.create, folder / "federation", sites)
    async with Children(logs) as children:
        measured = await children.during(_round(children, federation, options, model))
        await children.stop()
    return {"shape": asdict(options), **measured}


async def _round(
    children: Children, federation: federations.Federation, options: Options, model: Path
) -> dict[str, Any]:
    await federations.start_coordinator(children, federation)
    for i in range(options.processes):
        arguments = (f"{HOST}:{federation.port}", str(federation.root), *federation.sites[i :: options.processes])
        command = (sys.executable, "-P", "-m", "maskwork.participant.bench.crowd", *arguments)
        await children.start_command(f"crowd-{i}", *command)
    memory = PeakMemory({"coordinator": children.pid(federation.name("coordinator"))})
    pids = {f"crowd-{i}": children.pid(f"crowd-{i}") for i in range(options.processes)} | memory.roots
    watching = asyncio.create_task(memory.watch(0.2))
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    committed = await run_job(federation, federations.job(federation, rounds=options.rounds), model)
    used = {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}
    coordinator_s = used.pop("coordinator")
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    rounds = [
        {
            "round_s": done.seconds,
            "survivors": len(done.survivors),
            "stage_s": {stage: done.stage_seconds.get(stage, 0.0) for stage in STAGES},
            "uplink_bytes": done.uplink_bytes,
        }
        for done in committed
    ]
    return {
        "rounds": rounds,
        "coordinator_peak_mib": round(memory.peaks["coordinator"] / MIB, 1),
        "cpu_s": {"coordinator": coordinator_s, "participants together": sum(used.values())},  # their start included
    }
