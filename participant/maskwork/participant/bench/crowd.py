"""Many participants in one process, each with its own certificate, ledger and mutual TLS connection.

    python -m maskwork.participant.bench.crowd COORDINATOR FOLDER NAME...

They are production's own parts (driver, link, ledger, policy, protocol), but for the training worker, which is
`maskwork.participant.bench.light`'s, and for the verifier of certificates, which the participants of one process share
with its answers: on machines of their own each would check its neighbours' chains itself, at the same time as the
others, and here one pair of processors would do it for all.
"""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
import sys
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import ClassVar

from maskwork import logs
from maskwork.net.diagnosis import load_private_key
from maskwork.net.identity import (
    IdentityFiles,
    ParticipantVerifier,
    Role,
    TrustRoots,
    VerifiedCertificate,
    load_certificate,
    to_der,
)
from maskwork.participant.bench.light import LightWorker
from maskwork.participant.bench.sizes import TASK
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.config import TaskConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import DATABASE_NAME, Ledger
from maskwork.participant.policy import Policy
from maskwork.participant.work import SiteIdentity
from maskwork.secagg.keys import SoftwareSigner

POLICY = Policy(sparse_graph=True)


class SharedVerifier(ParticipantVerifier):
    """Verifies a certificate once for all participants of this process."""

    _known: ClassVar[dict[bytes, VerifiedCertificate]] = {}

    def verify_participant(self, certificate_der: bytes, now: float) -> VerifiedCertificate:
        """As `ParticipantVerifier.verify_participant`."""
        known = self._known.get(certificate_der)
        if known is None:
            known = self._known[certificate_der] = super().verify_participant(certificate_der, now)
        return known


async def run(coordinator: str, folder: Path, names: list[str]) -> None:
    """Run them until SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    template = folder / names[0] / "state"
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
            driver, link = _participant(coordinator, IdentityFiles.in_directory(folder / name / "identity"), ledger)
            await driver.prepare()
            tasks += [asyncio.create_task(driver.run()), asyncio.create_task(link.run())]
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


def _participant(coordinator: str, files: IdentityFiles, ledger: Ledger) -> tuple[Driver, CoordinatorLink]:
    roots = _roots(files)
    own = roots.verify(to_der(load_certificate(files.cert)), now=time.time(), role=Role.PARTICIPANT)
    federation = own.identity.federation
    driver = Driver(
        identity=SiteIdentity(
            federation,
            own.name,
            own.fingerprint,
            SoftwareSigner(load_private_key(files.key)),
            SharedVerifier(roots, federation),
        ),
        ledger=ledger,
        policy=POLICY,
        tasks={TASK: TaskConfig(use="none:None")},
        seed=0,
        scratch=files.cert.parent.parent / "scratch",
        make_worker=lambda _name, _task: LightWorker(),
    )
    link = driver.link = CoordinatorLink(
        coordinator,
        files,
        roots,
        federation=federation,
        tasks=(TASK,),
        active_session=driver.active_session,
        inbox=driver.inbox,
    )
    return driver, link


_ROOTS: dict[bytes, TrustRoots] = {}


def _roots(files: IdentityFiles) -> TrustRoots:
    raw = files.ca.read_bytes()
    if raw not in _ROOTS:
        _ROOTS[raw] = TrustRoots.from_file(files.ca)
    return _ROOTS[raw]


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
