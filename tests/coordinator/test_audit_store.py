"""The database and the audit log of a coordinator that is killed between the two, at every write.

`Killed` is raised in the place of each write of the log in turn; the next start must complete the log, and what it then
says must be what the database says. Real store, real log, real rounds.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tests.coordinator.local_federation import (
    AUTHORITY,
    COORDINATOR,
    FOUR,
    ISSUED,
    NOW,
    SITES,
    InlineWorker,
    LocalSite,
    connect_all,
    der_of,
    signer_of,
)
from tests.coordinator.local_federation import LocalCoordinator as PlainCoordinator

from maskwork.audit.reading import Judged, judge
from maskwork.audit.records import CertificateEvent, JobEnded, Operator, Record
from maskwork.coordinator.audit import LOG_NAME, Trail
from maskwork.coordinator.audit_store import AuditedStore
from maskwork.coordinator.driver import Driver
from maskwork.coordinator.job_runner import Federation
from maskwork.coordinator.records import DropRecord, EvidenceRecord, JobState
from maskwork.errors import StoreError
from maskwork.net.identity import Role, VerifiedCertificate
from maskwork.secagg.keys import Signer
from maskwork.wire.codec import OpenSession


class Killed(BaseException):
    """The process ends here."""


class FragileTrail(Trail):
    """A trail whose process is killed instead of its `fatal`th write, counted from when it is set."""

    fatal: int | None = None
    writes = 0

    def write(self, *records: Record, durable: bool = True) -> None:
        self.writes += 1
        if self.fatal is not None and self.writes >= self.fatal:
            raise Killed
        super().write(*records, durable=durable)


class LocalCoordinator(PlainCoordinator):
    """The coordinator of `local_federation` with an audit log on the disk."""

    def __init__(self, folder: Path, *, fatal: int | None = None) -> None:
        super().__init__(folder)
        self.store.close()
        self.trail = open_trail(folder, FragileTrail)
        self.store = AuditedStore.open(f"sqlite:///{folder}/coordinator.sqlite")
        self.store.follow(self.trail)
        assert isinstance(self.trail, FragileTrail)
        self.trail.writes, self.trail.fatal = 0, fatal
        self.driver = Driver(
            federation=Federation("ward", der_of(COORDINATOR), signer_of(COORDINATOR)),
            store=self.store,
            models=self.models,
            worker=InlineWorker(),
            sessions=folder / "sessions",
            max_uploads=8,
            audit=self.trail,
        )

    async def crash(self) -> None:
        await super().crash()
        self.trail.close()


def open_trail(
    folder: Path, kind: type[Trail] = Trail, *, certificate: bytes | None = None, signer: Signer | None = None
) -> Trail:
    return kind.open(
        folder / LOG_NAME,
        federation="ward",
        certificate=certificate or der_of(COORDINATOR),
        signer=signer or signer_of(COORDINATOR),
        fsync=lambda _: None,
    )


def judged(folder: Path) -> Judged:
    return judge(folder / LOG_NAME, AUTHORITY.roots)


def records(folder: Path) -> list[Record]:
    return [entry.record for entry in judged(folder).chain.entries]


def kinds(folder: Path) -> list[str]:
    return [entry.kind for entry in judged(folder).chain.entries]


def verified(issued_role: Role, name: str) -> VerifiedCertificate:
    issued = AUTHORITY.issue(issued_role, name, now=NOW)
    return AUTHORITY.roots.verify(der_of(issued), now=NOW)


async def run_to_the_end(coordinator: LocalCoordinator) -> None:
    """Both rounds, with whoever is there; a `Killed` in the loop comes out."""
    sites = {name: LocalSite(name) for name in SITES}
    coordinator.start()
    await connect_all(coordinator, sites)
    await coordinator.until_ended()


async def test_a_run_is_written_down_and_verifies(tmp_path: Path) -> None:
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job(rounds=2, cohort=FOUR)
    await run_to_the_end(coordinator)
    store, model = coordinator.store, coordinator.record().current_model
    committed = [r.model for r in store.rounds("job-1")]
    await coordinator.crash()
    found = judged(tmp_path)
    assert found.problems == []
    assert found.facts is not None
    job = found.facts.jobs["job-1"]
    assert [c.model_out for c in job.standing()] == committed
    assert job.standing()[-1].model_out == model
    assert job.ended == JobEnded(job="job-1", state="completed")
    assert all(session.signers == frozenset(range(4)) for session in job.sessions)
    assert kinds(tmp_path).count("certificate") == 4


@pytest.mark.parametrize("write", range(1, 11))
async def test_killed_between_the_database_and_the_log_the_next_start_completes_the_log(
    write: int, tmp_path: Path
) -> None:
    first = LocalCoordinator(tmp_path, fatal=write)
    killed = False
    try:
        first.add_job(rounds=2, cohort=FOUR)
        await run_to_the_end(first)
    except Killed:
        killed = True
    known = {(a.round_number, a.attempt) for a in first.store.attempts("job-1")}
    rounds = [r.model for r in first.store.rounds("job-1")]
    await first.crash()
    second = LocalCoordinator(tmp_path)
    facts = judged(tmp_path).facts
    assert facts is not None
    job = facts.jobs["job-1"]
    assert {(s.plan.round_number, s.plan.attempt) for s in job.sessions} == known
    assert [c.model_out for c in job.standing()] == rounds
    await run_to_the_end(second)
    assert second.record().state is JobState.COMPLETED
    await second.crash()
    found = judged(tmp_path)
    assert found.problems == []
    assert found.facts is not None
    assert [c.round_number for c in found.facts.jobs["job-1"].standing()] == [1, 2]
    assert killed


async def test_every_write_of_a_run_was_killed_once(tmp_path: Path) -> None:
    """The range above covers a whole run: job, heads, plans, survivors, commits, end."""
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job(rounds=2, cohort=FOUR)
    await run_to_the_end(coordinator)
    assert isinstance(coordinator.trail, FragileTrail)
    assert coordinator.trail.writes == 10
    await coordinator.crash()


async def test_what_was_resumed_has_its_survivors_once(tmp_path: Path) -> None:
    """Killed after the database has the sets and before the log does: the session is resumed, and the log knows."""
    first = LocalCoordinator(tmp_path, fatal=4)
    first.add_job(rounds=1, cohort=FOUR)
    with pytest.raises(Killed):
        await run_to_the_end(first)
    assert first.store.resume_record("job-1") is not None
    await first.crash()
    assert "survivors" not in [e.kind for e in judged(tmp_path).chain.entries]
    second = LocalCoordinator(tmp_path)
    assert kinds(tmp_path).count("survivors") == 1
    await run_to_the_end(second)
    await second.crash()
    assert kinds(tmp_path).count("survivors") == kinds(tmp_path).count("plan") == 2  # the sites had lost the first
    assert judged(tmp_path).problems == []


async def test_drops_evidence_aborts_and_rollbacks_are_written_down(tmp_path: Path) -> None:
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job(rounds=3, cohort=FOUR)
    coordinator.start()
    sites = {name: LocalSite(name) for name in SITES}
    await connect_all(coordinator, sites)
    await coordinator.until(lambda e: type(e).__name__ == "RoundCommitted" and e.round_number == 2)  # type: ignore[union-attr]
    await coordinator.crash()
    again = LocalCoordinator(tmp_path)
    (attempt,) = [a for a in again.store.attempts("job-1") if a.round_number == 3] or [
        again.store.attempts("job-1")[-1]
    ]
    drop = DropRecord(
        "job-1", attempt.round_number, attempt.attempt, "site-a", "share-keys", "declined", "audit: no", 1.0
    )
    again.store.record_drop(drop)
    again.store.record_drop(replace(drop, reason="deadline"))
    again.store.add_evidence(
        EvidenceRecord("job-1", attempt.session_id, "dishonest-dealer", "site-a", b"transcript", 1.0)
    )
    again.store.roll_back("job-1", to_round=1, reason="damaged")
    again.store.set_job_state("job-1", JobState.ABORTED, "by olga")
    await again.crash()
    found = {r.KIND: r for r in records(tmp_path)}
    assert found["dropped"].reason == "declined"  # type: ignore[attr-defined]
    assert found["evidence"].transcript == hashlib.sha256(b"transcript").digest()  # type: ignore[attr-defined]
    assert found["rolled-back"].rounds == (2,)  # type: ignore[attr-defined]
    assert found["job-ended"] == JobEnded(job="job-1", state="aborted", reason="by olga")
    assert judged(tmp_path).problems == []
    before = kinds(tmp_path)
    with closing(open_trail(tmp_path)) as trail, AuditedStore.open(f"sqlite:///{tmp_path}/coordinator.sqlite") as store:
        store.follow(trail)
    assert kinds(tmp_path) == [*before, "service"], "a start that has nothing to complete writes nothing but itself"


async def test_a_log_that_is_lost_beside_its_database_ends_the_start(tmp_path: Path) -> None:
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job(rounds=1, cohort=FOUR)
    await run_to_the_end(coordinator)
    await coordinator.crash()
    log, database = tmp_path / LOG_NAME, f"sqlite:///{tmp_path}/coordinator.sqlite"
    kept = log.rename(tmp_path / "backup")

    def start() -> None:
        with closing(open_trail(tmp_path)) as trail, AuditedStore.open(database) as store:
            store.follow(trail)

    for _ in range(2):  # the first refusal leaves nothing that the second would take for the log
        with pytest.raises(StoreError) as caught:
            start()
        assert str(caught.value).startswith(f"{log}: is missing or empty, and the database has 1 jobs")
        for words in ("Restore audit.log", "move the database away too", "accept-history"):
            assert words in caught.value.remedy
    kept.replace(log)
    before = kinds(tmp_path)
    start()
    assert kinds(tmp_path) == [*before, "service"]


async def test_killed_before_its_first_record_a_log_begins_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / LOG_NAME).write_bytes(b'{"head":"0123')
    coordinator = LocalCoordinator(tmp_path)
    await coordinator.crash()
    assert kinds(tmp_path)[0] == "opened"
    assert judged(tmp_path).problems == []


# --- the trail --------------------------------------------------------------------------------------------------------


def test_callers_are_written_down_with_their_certificates(tmp_path: Path) -> None:
    ada = verified(Role.AUDITOR, "ada")
    with closing(open_trail(tmp_path)) as trail:
        trail.begin()
        trail.asked_for("export", ada, job="job-1", round_number=2, model=bytes(32))
        trail.asked_for("abort", ada, job="job-1")
        trail.certificate_event(CertificateEvent(event="list", number=4, digest=bytes(32)))
    *_, certificate, export, abort, event = records(tmp_path)
    assert certificate.KIND == "certificate"
    assert export == Operator(
        action="export", by=ada.identity.uri, fingerprint=ada.fingerprint, job="job-1", round_number=2, model=bytes(32)
    )
    assert abort == Operator(action="abort", by=ada.identity.uri, fingerprint=ada.fingerprint, job="job-1")
    assert event == CertificateEvent(event="list", number=4, digest=bytes(32))
    assert judged(tmp_path).problems == []


@pytest.mark.parametrize("live", [True, False], ids=["while it runs", "at a start"])
def test_a_renewed_certificate_signs_from_its_own_record_on(live: bool, tmp_path: Path) -> None:
    renewed = AUTHORITY.issue(Role.COORDINATOR, "main", now=NOW, dns_names=["localhost"])
    with closing(open_trail(tmp_path)) as trail:
        trail.begin()
        if live:
            trail.renewed(der_of(renewed), signer_of(renewed))
            trail.renewed(der_of(renewed), signer_of(renewed))
            trail.begin()
    if not live:
        with closing(open_trail(tmp_path, certificate=der_of(renewed), signer=signer_of(renewed))) as trail:
            trail.begin()
    assert kinds(tmp_path) == ["opened", "service", "signer", "service"]
    assert judged(tmp_path).problems == []


def test_a_torn_last_line_is_told_in_the_log(tmp_path: Path) -> None:
    with closing(open_trail(tmp_path)) as trail:
        trail.begin()
    with (tmp_path / LOG_NAME).open("ab") as file:
        file.write(b'{"head":"0123')
    with closing(open_trail(tmp_path)) as trail:
        trail.begin()
    assert [r.event for r in records(tmp_path) if r.KIND == "service"] == ["started", "recovered", "started"]  # type: ignore[attr-defined]
    assert judged(tmp_path).problems == []


def test_a_damaged_log_ends_the_start(tmp_path: Path) -> None:
    with closing(open_trail(tmp_path)) as trail:
        trail.begin()
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes().replace(b"ward", b"worn", 1))
    with pytest.raises(StoreError, match="record 0"):
        open_trail(tmp_path)


# --- what sites are shown ---------------------------------------------------------------------------------------------


async def test_an_offer_leads_from_the_head_that_a_site_keeps_to_the_one_in_the_plan(tmp_path: Path) -> None:
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job(rounds=2, cohort=FOUR)
    sites = {name: LocalSite(name) for name in SITES}
    coordinator.start()
    await connect_all(coordinator, sites)
    await coordinator.until_ended()
    offers = [m for _, m in sites["site-a"].heard if isinstance(m, OpenSession)]
    await coordinator.crash()
    heads = judged(tmp_path).chain.heads
    first, second = (offer.history for offer in offers)
    assert (first.since, second.since) == (0, first.size), "what was answered once is not shown again"
    digests = [e.digest for e in judged(tmp_path).chain.entries]
    for offer, shown in zip(offers, (first, second), strict=True):
        assert heads[shown.size] == offer.proposal.plan.audit_head
        assert shown.digests == b"".join(digests[shown.since : shown.size])


async def test_a_site_far_behind_fetches_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskwork.coordinator.audit.MAX_INLINE", 64)
    coordinator = LocalCoordinator(tmp_path)
    coordinator.add_job(cohort=FOUR)
    sites = {name: LocalSite(name) for name in SITES}
    sites["site-b"].silent.add(OpenSession)
    coordinator.start()
    await connect_all(coordinator, sites)
    offer = await sites["site-a"].until_heard(OpenSession)
    assert isinstance(offer, OpenSession)
    shown = offer.history
    assert shown.digests == b""
    fetched = coordinator.driver.download(sites["site-a"].site, shown.digests_digest)
    stranger = LocalSite("site-a", ISSUED["site-d"])
    assert coordinator.driver.download(stranger.site, shown.digests_digest) is None
    await coordinator.crash()
    assert isinstance(fetched, bytes)
    assert len(fetched) == shown.tail_bytes > 64
    assert hashlib.sha256(fetched).digest() == shown.digests_digest


def test_a_head_that_is_not_of_this_chain_has_no_size(tmp_path: Path) -> None:
    with closing(open_trail(tmp_path)) as trail:
        trail.begin()
        one = trail.head_for([])
        trail.write(JobEnded(job="a", state="failed"))
        assert (trail.size_of(one), trail.size_of(trail.log.head)) == (2, 3)
        assert trail.size_of(bytes(31) + b"\1") is None
        assert trail.size_of(bytes(32)) == 0
