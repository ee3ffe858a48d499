"""The participant process: puts ledger, policy, workers, link and driver together, and takes them apart in order.

It opens no port. SIGTERM and SIGINT leave the session, end the workers and end the process with 0, within
`stopping.STOP_WITHIN_S`.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from contextlib import closing

import structlog

from maskwork.net.identity import IdentityFiles, ParticipantVerifier, Role, TrustRoots
from maskwork.net.loaded import IdentityWatch, LoadedIdentity
from maskwork.participant.audit_commands import open_trail
from maskwork.participant.client import CoordinatorLink
from maskwork.participant.config import ParticipantConfig
from maskwork.participant.driver import Driver
from maskwork.participant.ledger import Ledger
from maskwork.participant.policy import Policy, read_policy
from maskwork.participant.succession import RenewableLink
from maskwork.participant.work import SiteIdentity
from maskwork.secagg.keys import SoftwareSigner
from maskwork.stopping import Stop

log = structlog.get_logger("maskwork.participant")

RENEW = (
    "run `maskwork participant renew`, if the coordinator signs; else `maskwork pki request`, `sign` and "
    "`install --force` into this directory. It is taken up without a restart"
)


async def participate(config: ParticipantConfig) -> None:
    """Run one participant until SIGTERM or SIGINT.

    Raises:
        UserError: a file, a task or the state directory is not usable; the text says which and what to do.
    """
    files = IdentityFiles.in_directory(config.identity)
    roots = TrustRoots.from_file(files.ca)
    own = LoadedIdentity.load(files, now=time.time(), role=Role.PARTICIPANT, roots=roots)
    federation = own.certificate.identity.federation
    for said in roots.out_of_date(time.time()):
        log.warning("a CA certificate is out of date", file=str(files.ca), detail=said)
    policy = Policy() if config.policy is None else read_policy(config.policy)
    scratch = config.state / "scratch"
    with Ledger.open(config.state) as ledger, closing(open_trail(config, ledger)) as trail:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that is gone: sessions do not outlive it
        verifier = ParticipantVerifier(roots, federation)
        driver = Driver(
            identity=_site(own, verifier),
            ledger=ledger,
            policy=policy,
            tasks=config.tasks,
            seed=config.seed,
            scratch=scratch,
            audit=trail,
        )

        def line(
            identity: LoadedIdentity,
            inbox: asyncio.Queue[object],
            active_session: Callable[[], bytes],
            succeeds_another: Callable[[], bool],
        ) -> CoordinatorLink:
            return CoordinatorLink(
                config.coordinator,
                files,
                roots,
                federation=federation,
                tasks=tuple(sorted(config.tasks)),
                active_session=active_session,
                inbox=inbox,
                identity=identity,
                succeeds_another=succeeds_another,
                audit_size=lambda: trail.kept_size,
                is_revoked=driver.revocations,
            )

        def take_up(renewed: LoadedIdentity) -> None:
            driver.take_up(_site(renewed, verifier))
            trail.renewed(renewed.certificate.der, SoftwareSigner(renewed.key))

        link = RenewableLink(
            own,
            make_line=line,
            inbox=driver.inbox,
            active_session=driver.active_session,
            take_up=take_up,
        )
        driver.link = link
        watch = IdentityWatch(files, own, roots=roots, remedy=RENEW, is_revoked=driver.revocations, clock=time.time)
        watching = asyncio.create_task(watch.run(link.renew))
        try:
            await _run(driver, link)
        finally:
            watching.cancel()


def _site(own: LoadedIdentity, verifier: ParticipantVerifier) -> SiteIdentity:
    """Who this participant is by a certificate."""
    certificate = own.certificate
    return SiteIdentity(
        certificate.identity.federation, certificate.name, certificate.fingerprint, SoftwareSigner(own.key), verifier
    )


async def _run(driver: Driver, link: RenewableLink) -> None:
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
