"""The participant process: puts ledger, policy, workers, link and driver together, and takes them apart in order.

It opens no port. SIGTERM and SIGINT leave the session, end the workers and end the process with 0, within
`stopping.STOP_WITHIN_S`.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import closing

import structlog

from maskwork.net.diagnosis import check_own_files, load_private_key
from maskwork.net.identity import IdentityFiles, ParticipantVerifier, Role, TrustRoots
from maskwork.participant.audit_commands import open_trail
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.config import ParticipantConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy, read_policy
from maskwork.participant.work import SiteIdentity
from maskwork.secagg.keys import SoftwareSigner
from maskwork.stopping import Stop

log = structlog.get_logger("maskwork.participant")


async def participate(config: ParticipantConfig) -> None:
    """Run one participant until SIGTERM or SIGINT.

    Raises:
        UserError: a file, a task or the state directory is not usable; the text says which and what to do.
    """
    files = IdentityFiles.in_directory(config.identity)
    roots = TrustRoots.from_file(files.ca)
    own = check_own_files(files, now=time.time(), role=Role.PARTICIPANT, roots=roots)
    federation = own.identity.federation
    for said in roots.out_of_date(time.time()):
        log.warning("a CA certificate is out of date", file=str(files.ca), detail=said)
    policy = Policy() if config.policy is None else read_policy(config.policy)
    scratch = config.state / "scratch"
    with Ledger.open(config.state) as ledger, closing(open_trail(config, ledger)) as trail:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that is gone: sessions do not outlive it
        identity = SiteIdentity(
            federation,
            own.name,
            own.fingerprint,
            SoftwareSigner(load_private_key(files.key)),
            ParticipantVerifier(roots, federation),
        )
        driver = Driver(
            identity=identity,
            ledger=ledger,
            policy=policy,
            tasks=config.tasks,
            seed=config.seed,
            scratch=scratch,
            audit=trail,
        )
        link = CoordinatorLink(
            config.coordinator,
            files,
            roots,
            federation=federation,
            tasks=tuple(sorted(config.tasks)),
            active_session=driver.active_session,
            inbox=driver.inbox,
            audit_size=lambda: trail.kept_size,
            is_revoked=driver.revocations,
        )
        driver.link = link
        await _run(driver, link)


async def _run(driver: Driver, link: CoordinatorLink) -> None:
    stop = Stop()
    stopped = asyncio.create_task(stop.asked.wait())
    try:
        preparing = asyncio.create_task(driver.prepare())
        await asyncio.wait({preparing, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not preparing.done():
            preparing.cancel()
            return
        preparing.result()
        deciding, connecting = asyncio.create_task(driver.run()), asyncio.create_task(link.run())
        await asyncio.wait({deciding, connecting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (deciding, connecting):
            if task.done():
                task.result()  # a failure of a loop ends the process with its error
        log.info("participant stops")
        deciding.cancel()
        await asyncio.wait({deciding})
        driver.leave()
        await link.hang_up()
        connecting.cancel()
    finally:
        stopped.cancel()
        await driver.close()
