"""The campaign: hostile input to every reader, to a coordinator and to a participant. Ends with 1 on a crash.

    python -m tests.fuzz --seconds 60 --seed 1

`--only` picks one of the three parts. What one seed tries in process is always the same, as far as the time allows;
over sockets the order of things is the machine's. The report goes to the terminal and, as JSON, under `runs/`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

from tests.fuzz import against_coordinator, against_participant, in_process
from tests.fuzz.tally import Tally

PARTS: Final = ("in-process", "coordinator", "participant")
SHARES: Final = {"in-process": 0.3, "coordinator": 0.45, "participant": 0.25}
"""Of the time; starting, the honest jobs at the end and the coming to rest are on top of it, a minute or so."""


def main() -> int:
    """Run the campaign and report."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input, seeded and bounded.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    tally, began = Tally(), time.time()
    parts = PARTS if options.only is None else (options.only,)
    total = sum(SHARES[part] for part in parts)
    for part in parts:
        _part(tally, part, seconds=options.seconds * SHARES[part] / total, seed=options.seed)
    report = {"seed": options.seed, "seconds": round(time.time() - began, 1), **tally.report()}
    folder = options.runs / time.strftime("fuzz-%Y%m%d-%H%M%S", time.gmtime(began))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    _tell(tally, folder)
    return 0 if tally.clean else 1


def _part(tally: Tally, part: str, *, seconds: float, seed: int) -> None:
    print(f"{part}: {seconds:.0f} s", flush=True)
    match part:
        case "in-process":
            in_process.campaign(tally, seconds=seconds, seed=seed)
        case "coordinator":
            asyncio.run(against_coordinator.campaign(tally, seconds=seconds, seed=seed))
        case _:
            asyncio.run(against_participant.campaign(tally, seconds=seconds, seed=seed))


def _tell(tally: Tally, folder: Path) -> None:
    report = tally.report()
    print(f"\n{'target':36}{'inputs':>9}  outcomes")
    for target, tried in sorted(tally.inputs.items()):
        outcomes = ", ".join(f"{name} {count}" for name, count in tally.errors.get(target, Counter()).most_common(6))
        print(f"{target:36}{tried:>9}  {outcomes}")
    print(f"\n{report['inputs']} inputs, {len(report['distinct_errors'])} distinct errors by target")
    for name in ("in_process", "coordinator", "participant"):
        if (figures := tally.figures.get(name)) is not None:
            print(
                f"{name:12} peak RSS {figures['peak_rss_mib']:.0f} MiB, PSS with workers "
                f"{figures['peak_pss_mib']:.0f} MiB, most open files {figures['most_files']:.0f}, "
                f"at rest {figures['last_files']:.0f}"
            )
    for name in ("jobs_completed", "slowest_job_s", "drop_reasons", "most_connections"):
        if name in tally.figures:
            print(f"{name.replace('_', ' ')}: {tally.figures[name]}")
    for crash in tally.crashes:
        print(f"\nCRASH in {crash['target']}, seed {crash['seed']}:\n{crash['traceback']}")
    for what in dict.fromkeys(tally.broken):
        print(f"\nBROKEN: {what}")
    print(f"\n{len(tally.crashes)} crashes, {len(set(tally.broken))} broken expectations; {folder}/report.json")


if __name__ == "__main__":
    sys.exit(main())
