"""`make chaos`: one coordinator and five sites as real processes, faults by the plan of a seed, and what came of it.

Ctrl-C strikes no more: the job is finished, and what was done is judged. Exit code 0 if nothing is wrong with what the
processes wrote, 1 otherwise. The run's folder keeps everything: what each process wrote, `chaos.json` and `chaos.md`.
"""

import argparse
import asyncio
import json
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from tests.chaos import invariants, written
from tests.chaos.campaign import Campaign
from tests.chaos.federation import Federation
from tests.chaos.figures import Figures, figures, markdown
from tests.chaos.plan import planned

ROUNDS = 50


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="kill, stop and cut; then look")
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs; other faults come on top")
    parser.add_argument("--seed", type=int, default=None, help="of the plan of faults; a fresh one if not given")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each job")
    parser.add_argument("--out", type=Path, default=None, help="the run's folder; runs/chaos-TIMESTAMP if not given")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    home = options.out or Path("runs") / datetime.now().strftime("chaos-%Y%m%d-%H%M%S")
    home.mkdir(parents=True)  # a folder that exists holds another run
    command = f"python -m tests.chaos --kills {options.kills} --seed {seed}"
    print(f"{command}: in {home}")
    if options.kills < 1:
        parser.error(f"--kills is 1 or more, not {options.kills}")
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    found = asyncio.run(run(home.resolve(), seed=seed, kills=options.kills, rounds=options.rounds, say=say))
    page = markdown(found, command)
    (home / "chaos.json").write_text(json.dumps(found.as_json(), indent=2) + "\n")
    (home / "chaos.md").write_text(page)
    print(f"\n{page}\n{home / 'chaos.json'}")
    return 1 if found.violations else 0


async def run(home: Path, *, seed: int, kills: int, rounds: int, say: Callable[[str], None]) -> Figures:
    """Do a whole run in an empty folder, and judge it."""
    federation = Federation(home)
    campaign = Campaign(federation, planned(seed), kills=kills, rounds=rounds, say=say)
    started = time.monotonic()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, campaign.stop)
    try:
        await campaign.run()
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        await federation.close()
        done = {"struck": [asdict(s) for s in campaign.struck], "lives": [asdict(life) for life in federation.lives]}
        (home / "done.json").write_text(json.dumps(done, indent=2) + "\n")
    seconds = time.monotonic() - started
    say("looking at what was written")
    what = written.read(home, federation.lives)
    wrong = [
        *campaign.stuck,
        *invariants.violations(what),
        *invariants.wrong_sums(what, written.models_of(home)),
    ]
    return figures(what, campaign.struck, seed=seed, seconds=seconds, violations=wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
