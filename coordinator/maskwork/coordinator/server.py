"""The coordinator process: puts store, worker, driver and services together, and takes them apart in order.

It holds no logic of its own. SIGTERM and SIGINT drain: the open session is given up (unless it can be resumed), streams
are closed, everything committed is on the disk, and the process ends with 0, within `stopping.STOP_WITHIN_S`.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress

import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from maskwork.audit.records import Service
from maskwork.coordinator.at_rest import open_vault
from maskwork.coordinator.audit import LOG_NAME, Trail
from maskwork.coordinator.audit_service import AuditService
from maskwork.coordinator.audit_store import AuditedStore
from maskwork.coordinator.config import CoordinatorConfig
from maskwork.coordinator.driver import Driver
from maskwork.coordinator.enrolment import RenewalService, enrolling
from maskwork.coordinator.guard import Guard
from maskwork.coordinator.happenings import Crashed, ListChanged, OwnCertificateRenewed
from maskwork.coordinator.issuing import Issuer
from maskwork.coordinator.job_runner import Federation
from maskwork.coordinator.jobs import JobDesk
from maskwork.coordinator.models import ModelStore
from maskwork.coordinator.revocations import RevocationFile
from maskwork.coordinator.service import FederationService, JobService
from maskwork.database import world_failures
from maskwork.errors import UserError
from maskwork.net.identity import IdentityFiles, Role, TrustRoots
from maskwork.net.kept_list import KeptList
from maskwork.net.loaded import IdentityWatch, LoadedIdentity
from maskwork.net.revocation import LIST_FILE, RevocationList
from maskwork.net.tls import SERVER_OPTIONS, renewable_server_credentials
from maskwork.secagg.keys import SoftwareSigner
from maskwork.stopping import Stop
from maskwork.wire.v1 import (
    audit_pb2,
    audit_pb2_grpc,
    enrolment_pb2,
    enrolment_pb2_grpc,
    federation_pb2,
    federation_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
)
from maskwork.worker import WorkerProcess

import grpc  # isort: skip  # after maskwork.net.tls, which sets the TLS floor

log = structlog.get_logger("maskwork.coordinator")

DRAIN_S = 5.0
"""For calls that a peer does not let go of. It is no bound on the whole end: that is `stopping.STOP_WITHIN_S`."""
LOOK_AT_FILES_S = 1.0
TELL_AGAIN_S = 60.0
RENEW = (
    "have a new one signed (`maskwork pki request`, `sign`, `install --force` into this directory); "
    "it is taken up without a restart"
)
FILES_BESIDE_CONNECTIONS = 500
"""Room for the database, models, spools and workers, beside one descriptor for each connection."""


async def serve(config: CoordinatorConfig) -> None:
    """Run the coordinator until SIGTERM or SIGINT.

    Raises:
        UserError: a file, the address or the database is not usable; the text says which and what to do.
    """
    stop = Stop()
    async with running(config) as (driver, address):
        log.info("coordinator ready", listen=address, federation=driver.federation.name)
        loop_task = asyncio.create_task(driver.run())
        stopped = asyncio.create_task(stop.asked.wait())
        try:
            await asyncio.wait({loop_task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if loop_task.done():
                loop_task.result()  # a failure of the loop ends the process with its error
            log.info("coordinator drains")
            loop_task.cancel()
            await asyncio.wait({loop_task})  # what it was doing is over before anything else changes the session
            await driver.stop()
            driver.audit.write(Service(event="stopped"))
        finally:
            stopped.cancel()
            driver.hang_up()


@asynccontextmanager
async def running(config: CoordinatorConfig) -> AsyncIterator[tuple[Driver, str]]:
    """The services on their port, with a driver whose loop the caller runs."""
    files = IdentityFiles.in_directory(config.identity)
    roots = TrustRoots.from_file(files.ca)
    own = LoadedIdentity.load(files, now=time.time(), role=Role.COORDINATOR, roots=roots)
    for said in roots.out_of_date(time.time()):
        log.warning("a CA certificate is out of date", file=str(files.ca), detail=said)
    revocations = RevocationFile(
        config.revocation_list or files.ca.with_name(LIST_FILE),
        KeptList(config.state / LIST_FILE, roots, now=time.time()),
        roots,
    )
    revocations.begin(required=config.revocation_list is not None)
    roots.verify(own.certificate.der, now=time.time(), role=Role.COORDINATOR, is_revoked=revocations)
    watch = IdentityWatch(files, own, roots=roots, remedy=RENEW, is_revoked=revocations, clock=time.time)
    federation = Federation(own.certificate.identity.federation, own.certificate.der, SoftwareSigner(own.key))
    issuer = _issuer(config, federation.name, roots)
    vault = open_vault(config.encryption, federation=federation.name, state=config.state)
    sessions = config.state / "sessions"
    with world_failures(str(sessions)):
        sessions.mkdir(parents=True, exist_ok=True)
    models = ModelStore(config.state / "models", vault=vault)
    with AuditedStore.open(config.database_url, vault=vault) as store, closing(_trail(config, federation)) as trail:
        store.follow(trail)
        async with WorkerProcess(name="aggregation", preload=("maskwork.coordinator.aggregation",)) as worker:
            driver = Driver(
                federation=federation,
                store=store,
                models=models,
                worker=worker,
                sessions=sessions,
                max_uploads=config.max_uploads,
                audit=trail,
                revocations=revocations.current,
            )
            desk = JobDesk(
                store=store,
                models=models,
                board=driver.board,
                max_model_bytes=config.max_model_bytes,
                max_unfinished_jobs=config.max_unfinished_jobs,
            )
            guard = Guard(roots, federation.name, stall_s=config.stall_s, is_revoked=revocations)
            server = grpc.aio.server(
                interceptors=[guard],
                options=(*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", config.max_connections)),
            )
            _register(server, driver, desk, trail, max_downloads=config.max_downloads)
            enrolment_pb2_grpc.add_RenewalServiceServicer_to_server(
                RenewalService(issuer, trail.certificate_event), server
            )
            address = _bind(server, config.listen, lambda: watch.current)
            await server.start()
            beside = (
                _tell_of_connections(config.max_connections),
                _enforce(revocations, driver, guard, roots),
                _renew(watch, driver),
            )
            tasks = [asyncio.create_task(work) for work in beside]
            try:
                async with enrolling(config.enrolment_listen, issuer, lambda: watch.current, trail.certificate_event):
                    yield driver, address
            finally:
                for task in tasks:
                    task.cancel()
                await server.stop(DRAIN_S)


def _trail(config: CoordinatorConfig, federation: Federation) -> Trail:
    return Trail.open(
        config.state / LOG_NAME,
        federation=federation.name,
        certificate=federation.certificate,
        signer=federation.signer,
    )


def _issuer(config: CoordinatorConfig, federation: str, roots: TrustRoots) -> Issuer | None:
    if config.enrolment_ca is None:
        return None
    issuer = Issuer(config.enrolment_ca, federation, days=config.enrolment_days, clock=time.time)
    issuer.check(roots)
    return issuer


async def _renew(watch: IdentityWatch, driver: Driver) -> None:
    async def taken(own: LoadedIdentity) -> None:
        await driver.post(OwnCertificateRenewed(own.certificate.der, SoftwareSigner(own.key)))

    await watch.run(taken)


async def _enforce(revocations: RevocationFile, driver: Driver, guard: Guard, roots: TrustRoots) -> None:
    """Have every new list take effect; one that withdraws this coordinator's own certificate ends it."""

    async def own(_new: RevocationList) -> None:
        roots.verify(driver.federation.certificate, now=time.time(), is_revoked=revocations)

    async def sessions(new: RevocationList) -> None:
        await driver.post(ListChanged(new))

    for listener in (own, sessions, guard.cut_off):  # a member is dropped as revoked, then its connection is cut
        revocations.tell(listener)
    try:
        await revocations.run()
    except Exception as error:  # whatever it is: a coordinator that enforces no list any more must stop
        await driver.post(Crashed(error))


async def _tell_of_connections(limit: int) -> None:
    """Say it when connections are at their limit: gRPC closes the next ones without a word.

    What is counted is sockets, where the system tells; the few that are none of a client's do not matter to the limit.
    """
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < limit + FILES_BESIDE_CONNECTIONS:
        log.warning(
            "fewer files may be open than connections are allowed",
            files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            max_connections=limit,
            remedy=f"raise the limit (ulimit -n) to {limit + FILES_BESIDE_CONNECTIONS}, or lower max_connections",
        )
    while True:
        if (found := await asyncio.to_thread(_open_sockets)) >= limit:
            remedy = "see who connects; raise max_connections if they are members, or close the port to them"
            log.warning("connections are at their limit", open=found, limit=limit, remedy=remedy)
            await asyncio.sleep(TELL_AGAIN_S)
        await asyncio.sleep(LOOK_AT_FILES_S)


def _open_sockets() -> int:
    found = 0
    with suppress(OSError):  # a system without /proc
        for entry in os.scandir("/proc/self/fd"):
            with suppress(OSError):  # closed meanwhile
                found += os.readlink(entry.path).startswith("socket:")
    return found


def _register(server: grpc.aio.Server, driver: Driver, desk: JobDesk, trail: Trail, *, max_downloads: int) -> None:
    federation_pb2_grpc.add_FederationServiceServicer_to_server(
        FederationService(driver, max_downloads=max_downloads), server
    )
    jobs_pb2_grpc.add_JobServiceServicer_to_server(JobService(driver, desk, trail), server)
    audit_pb2_grpc.add_AuditServiceServicer_to_server(AuditService(trail), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    names = (
        federation_pb2.DESCRIPTOR.services_by_name["FederationService"].full_name,
        jobs_pb2.DESCRIPTOR.services_by_name["JobService"].full_name,
        audit_pb2.DESCRIPTOR.services_by_name["AuditService"].full_name,
        enrolment_pb2.DESCRIPTOR.services_by_name["RenewalService"].full_name,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)


def _bind(server: grpc.aio.Server, listen: str, current: Callable[[], LoadedIdentity]) -> str:
    host = listen.rpartition(":")[0]
    try:
        port = server.add_secure_port(listen, renewable_server_credentials(current))
    except RuntimeError as error:
        raise UserError(
            f"cannot listen on {listen}: {str(error).rstrip('.')}. Is another coordinator running there? "
            "Change `listen` or stop it."
        ) from error
    return f"{host}:{port}"
