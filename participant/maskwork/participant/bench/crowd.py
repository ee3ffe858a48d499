"""Many participants in one process, each with its own certificate, ledger and mutual TLS connection.

    python -m maskwork.participant.bench.crowd COORDINATOR FOLDER NAME...

They are production's own parts (driver, link, ledger, policy, protocol), but for the training worker, which is
`maskwork.participant.bench.light`'s. The participants of one process share their trust roots, which remember whose
signature they have checked: on machines of their own each would do that itself, at the same time as the others.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from maskwork import logs
from maskwork.net.identity import IdentityFiles, TrustRoots
from maskwork.participant.bench.light import LightWorker, participant
from maskwork.participant.bench.sizes import TASK
from maskwork.participant.config import TaskConfig
from maskwork.participant.ledger import DATABASE_NAME, Ledger
from maskwork.participant.policy import Policy

POLICY = Policy(sparse_graph=True)


async def run(coordinator: str, folder: Path, names: list[str]) -> None:
    """Run them until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    template = folder / names[0] / "state"
    roots = TrustRoots.from_file(IdentityFiles.in_directory(folder / names[0] / "identity").ca)
    async with AsyncExitStack() as stack:
        tasks: list[asyncio.Task[None]] = []
        for name in names:
            state = folder / name / "state"
            if state != template:  # migrating one database takes longer than a copy of it
                state.mkdir()
                shutil.copy(template / DATABASE_NAME, state / DATABASE_NAME)
            ledger = stack.enter_context(Ledger.open(state))
            if state == template:
                ledger.close()
                ledger = stack.enter_context(Ledger.open(state))
            driver, link = participant(
                coordinator,
                IdentityFiles.in_directory(folder / name / "identity"),
                ledger,
                tasks={TASK: TaskConfig(use="none:None")},
                policy=POLICY,
                scratch=folder / name / "scratch",
                worker=LightWorker(),
                roots=roots,
            )
            await driver.prepare()
            tasks += [asyncio.create_task(driver.run()), asyncio.create_task(link.run())]
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


def main() -> None:
    """The process."""
    coordinator, folder, *names = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    logs.configure("warning")
    with suppress(KeyboardInterrupt):
        asyncio.run(run(coordinator, Path(folder), names))


if __name__ == "__main__":
    main()
