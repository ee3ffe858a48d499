"""One masked round of a model of half a billion parameters (2 GB) between three participants, and the memory it takes.

    python benchmarks/large.py [--parameters 500000000] [--participants 3]

Real processes over mutual TLS on loopback, as in `maskwork bench round`. The disk holds, besides the models, one upload
and one download for each participant, and the sum.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskwork.bench.memory import MIB, PeakMemory
from maskwork.participant.bench import federation as federations
from maskwork.participant.bench.round import run_job
from maskwork.participant.local.children import Children


def used(folder: Path) -> int:
    """Bytes of all files in a folder, those that vanish meanwhile left out."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


async def watch_disk(folder: Path, peak: list[int]) -> None:
    """The largest that a folder ever was."""
    while True:
        peak[0] = max(peak[0], await asyncio.to_thread(used, folder))
        await asyncio.sleep(0.5)


async def measure(folder: Path, parameters: int, participants: int) -> dict[str, Any]:
    """Run it."""
    (folder / "logs").mkdir()
    model = federations.write_initial_model(folder, parameters)
    sites = tuple(f"site-{i}" for i in range(participants))
    federation = federations.create(folder / "large", sites)
    async with Children(folder / "logs") as children:
        await federations.start_coordinator(children, federation)
        await federations.start_sites(children, federation, parameters, port=federation.port)
        memory = PeakMemory({m: children.pid(federation.name(m)) for m in ("coordinator", *sites)})
        disk = [0]
        state = federation.root / "coordinator" / "state"
        watching = [asyncio.create_task(memory.watch(0.2)), asyncio.create_task(watch_disk(state, disk))]
        (done,) = await children.during(run_job(federation, federations.job(federation, rounds=1), model))
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await children.stop()
    return {
        "parameters": parameters,
        "participants": participants,
        "round_s": done.seconds,
        "stage_s": dict(done.stage_seconds),
        "uplink_bytes": done.uplink_bytes,
        "coordinator_peak_mib": round(memory.peaks["coordinator"] / MIB),
        "participant_peak_mib": round(max(memory.peaks[site] for site in sites) / MIB),
        "coordinator_disk_peak_mb": round(disk[0] / 1e6),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=500_000_000)
    parser.add_argument("--participants", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="maskwork-large-"))
    try:
        print(json.dumps(asyncio.run(measure(folder, options.parameters, options.participants)), indent=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
