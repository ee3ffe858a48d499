"""A site that looks at the coordinator's past before it answers: what extends, what does not, what is kept of it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.participant.local_site import (
    AUTHORITY,
    CERTIFICATES,
    COORDINATOR,
    ISSUED,
    NAMES,
    NOW,
    OWN,
    Table,
    der_of,
    signer_of,
)
from tests.secagg.cohort import make_plan

from maskwork.audit import chain
from maskwork.audit.chain import EMPTY_HEAD, SignedHead
from maskwork.audit.reading import judge
from maskwork.audit.records import HeadKept, HistoryRefused, Plan, PlanDeclined, Record, SessionEnded
from maskwork.errors import StoreError
from maskwork.net.identity import Role
from maskwork.participant.audit import LOG_NAME, SiteTrail, is_held
from maskwork.participant.audit_history import (
    FinishedRound,
    HistoryDiffers,
    Known,
    check_digests,
    check_history,
    check_previous_survivors,
)
from maskwork.participant.ledger import Ledger
from maskwork.secagg.errors import DeclineCode, PlanRefused
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.messages import AdvertiseKeys, Decline, Proposal
from maskwork.secagg.plan import RoundPlan, survivors_digest
from maskwork.wire.codec import OpenSession, ShownHistory, encode_plan

KEY = AUTHORITY.roots.verify(der_of(COORDINATOR), now=NOW, role=Role.COORDINATOR).public_key
SIGNER = signer_of(COORDINATOR)
OTHER = bytes(range(32))


class History:
    """A coordinator's chain of made-up records; `forked` is another one that agrees up to a place."""

    def __init__(self, size: int, *, forked_at: int | None = None) -> None:
        words = [f"record {i}" if forked_at is None or i < forked_at else f"other {i}" for i in range(size)]
        self.digests = [hashlib.sha256(word.encode()).digest() for word in words]
        self.heads = [EMPTY_HEAD, *chain.heads_from(EMPTY_HEAD, 0, b"".join(self.digests))]

    def shown(self, since: int, size: int, *, federation: str = "test") -> ShownHistory:
        signature = chain.sign_head(SIGNER, federation, size, self.heads[size]).signature
        return ShownHistory(size, signature, since, b"".join(self.digests[since:size]))


def known(history: History, *sizes: int) -> Known:
    """A site that kept these heads, in this order."""
    kept = SignedHead(sizes[-1], history.heads[sizes[-1]], bytes(64)) if sizes else SignedHead(0, EMPTY_HEAD, b"")
    return Known(kept, {size: history.heads[size] for size in sizes})


def check(known: Known, plan: RoundPlan, shown: ShownHistory) -> bytes:
    check_history(known, plan, shown, key=KEY)
    return b"".join(check_digests(known, plan, shown, [shown.digests]))


def plan_with(head: bytes) -> RoundPlan:
    return make_plan(4, audit_head=head, federation="test")


# --- pure -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(kept=st.integers(0, 12), more=st.integers(0, 8), back=st.integers(0, 12))
def test_an_honest_history_is_gone_along_with_from_any_head_that_was_kept(kept: int, more: int, back: int) -> None:
    history, since = History(30), max(0, kept - back)
    size = kept + more
    if size == 0:
        return
    site = known(history, *([since] if 0 < since < kept else []), *([kept] if kept else []))
    fresh = check(site, plan_with(history.heads[size]), history.shown(since if since < kept else kept, size))
    assert fresh == b"".join(history.digests[kept:size]), "what is kept in the record is what follows the kept head"


@settings(deadline=None)
@given(kept=st.integers(1, 12), more=st.integers(0, 8), at=st.integers(0, 11), since=st.integers(0, 12))
def test_a_history_that_was_forked_before_the_kept_head_is_refused(kept: int, more: int, at: int, since: int) -> None:
    at, since = min(at, kept - 1), min(since, kept)
    forked, true = History(30, forked_at=at), History(30)
    site = known(true, *([since] if 0 < since < kept else []), kept)
    with pytest.raises(HistoryDiffers, match="does not extend the one that this site holds") as refused:
        check(site, plan_with(forked.heads[kept + more]), forked.shown(since, kept + more))
    assert refused.value.code is DeclineCode.AUDIT


def test_a_new_site_begins_with_whatever_it_is_first_shown() -> None:
    forked = History(9, forked_at=2)
    assert check(Known(), plan_with(forked.heads[9]), forked.shown(0, 9)) == b"".join(forked.digests)


TRUE = History(20)
LIES: dict[str, tuple[Callable[[], tuple[RoundPlan, ShownHistory]], type[PlanRefused], str]] = {
    "shorter": (
        lambda: (plan_with(TRUE.heads[7]), TRUE.shown(7, 7)),
        HistoryDiffers,
        "an audit log of 7 records, where this site holds a head of 8",
    ),
    "none at all": (
        lambda: (plan_with(EMPTY_HEAD), ShownHistory()),
        HistoryDiffers,
        "no audit log, where this site holds a head of 8 records",
    ),
    "a head of nothing": (lambda: (plan_with(OTHER), ShownHistory()), PlanRefused, "nothing says of how many records"),
    "not signed": (
        lambda: (plan_with(TRUE.heads[9]), replace(TRUE.shown(8, 9), signature=bytes(64))),
        PlanRefused,
        "is not signed by the coordinator",
    ),
    "signed for another federation": (
        lambda: (plan_with(TRUE.heads[9]), TRUE.shown(8, 9, federation="elsewhere")),
        PlanRefused,
        "is not signed by the coordinator",
    ),
    "signed for another size": (
        lambda: (plan_with(TRUE.heads[9]), replace(TRUE.shown(8, 9), size=10)),
        PlanRefused,
        "is not signed by the coordinator",
    ),
    "from a place unknown here": (
        lambda: (plan_with(TRUE.heads[9]), TRUE.shown(5, 9)),
        PlanRefused,
        "shown from record 5; this site holds a head of 8",
    ),
    "a digest too few": (
        lambda: (plan_with(TRUE.heads[10]), replace(TRUE.shown(8, 10), digests=TRUE.digests[8])),
        PlanRefused,
        "shown incompletely",
    ),
    "another head in the plan": (
        lambda: (plan_with(TRUE.heads[10]), replace(TRUE.shown(8, 10), digests=OTHER + TRUE.digests[9])),
        HistoryDiffers,
        "does not extend",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_does_not_extend_the_kept_head_is_refused(lie: str) -> None:
    make, kind, what = LIES[lie]
    plan, shown = make()
    with pytest.raises(PlanRefused, match=what) as refused:
        check(known(TRUE, 8), plan, shown)
    assert type(refused.value) is kind
    assert refused.value.code is DeclineCode.AUDIT


FINISHED = {"job-1": FinishedRound(3, 9, ("site-b", "site-a", "site-c"))}


def previous(
    survivors: tuple[str, ...], *, round_number: int = 4, rounds_total: int = 9, job: str = "job-1"
) -> RoundPlan:
    digest = survivors_digest(survivors)
    return make_plan(4, job=job, round_number=round_number, rounds_total=rounds_total, previous_survivors=digest)


def test_the_survivors_of_the_last_round_are_those_whom_this_site_helped_to_unmask() -> None:
    check_previous_survivors(FINISHED, previous(("site-a", "site-b", "site-c")))
    with pytest.raises(HistoryDiffers, match="survivors of round 3 are not those") as refused:
        check_previous_survivors(FINISHED, previous(("site-a", "site-b")))
    assert refused.value.code is DeclineCode.AUDIT


@pytest.mark.parametrize(
    "unknown", [{"round_number": 5}, {"round_number": 3}, {"rounds_total": 10}, {"job": "job-2"}], ids=str
)
def test_of_rounds_that_this_site_does_not_know_it_says_nothing(unknown: dict[str, int]) -> None:
    check_previous_survivors(FINISHED, previous(("somebody",), **unknown))  # type: ignore[arg-type]  # keywords


# --- the driver -------------------------------------------------------------------------------------------------------


def trail_in(folder: Path) -> SiteTrail:
    (folder / "state").mkdir(parents=True, exist_ok=True)
    own = AUTHORITY.roots.verify(CERTIFICATES[OWN], now=NOW)
    return SiteTrail.open(
        folder / "state" / LOG_NAME,
        federation="test",
        certificate=own.der,
        signer=signer_of_own(),
        clock=lambda: NOW,
        fsync=lambda _: None,
    )


def signer_of_own() -> SoftwareSigner:
    return signer_of(ISSUED[OWN])


@asynccontextmanager
async def a_site(folder: Path) -> AsyncIterator[Table]:
    """The participant under test, with its log on the disk."""
    folder.mkdir(exist_ok=True)
    trail = trail_in(folder)
    table = await Table(folder, audit=trail).start()
    try:
        yield table
    finally:
        await table.close()
        trail.close()


def records(folder: Path) -> list[Record]:
    judged = judge(folder / "state" / LOG_NAME, AUTHORITY.roots)
    assert judged.problems == []
    return [entry.record for entry in judged.chain.entries]


def of(folder: Path, kind: type[Record]) -> list[Record]:
    return [record for record in records(folder) if type(record) is kind]


def offer(table: Table, history: History, since: int, size: int, **changes: object) -> OpenSession:
    if changes.get("round_number", 3) == 4:  # after round 3, which everybody survived
        changes.setdefault("previous_survivors", survivors_digest(NAMES))
    made = table.offer(audit_head=history.heads[size], **changes)
    return replace(made, history=history.shown(since, size))


async def test_the_head_is_kept_before_the_keys_are_advertised(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        kept_when_sent: list[int] = []
        send = table.link.send

        def watching(session: bytes, message: object) -> None:
            if isinstance(message, AdvertiseKeys):
                kept_when_sent.append(len(of(tmp_path, HeadKept)))
            send(session, message)  # type: ignore[arg-type]

        table.link.send = watching  # type: ignore[method-assign]  # the fake's own
        await table.play(offer(table, TRUE, 0, 5))
        assert kept_when_sent == [1]
        assert table.ledger.last_audit_head("test") == TRUE.heads[5]
    (kept,) = of(tmp_path, HeadKept)
    assert isinstance(kept, HeadKept)
    assert (kept.size, kept.head, kept.since, kept.digests) == (5, TRUE.heads[5], 0, b"".join(TRUE.digests[:5]))
    (ended,) = of(tmp_path, SessionEnded)
    assert isinstance(ended, SessionEnded)
    assert ended.outcome == "released"


async def test_a_fork_is_declined_kept_as_evidence_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forked = History(20, forked_at=3)
    async with a_site(tmp_path) as table:
        await table.play(offer(table, TRUE, 0, 5))
        before = len(table.link.sent)
        session = await table.propose(offer(table, forked, 5, 9, round_number=4, attempt=1))
        assert [m for _, m in table.link.sent[before:]] == table.answers(session, Decline)
        (decline,) = table.answers(session, Decline)
        assert decline.code is DeclineCode.AUDIT
        assert table.driver.active_session() == b""
        assert "train" not in table.worker.calls[1:]
        assert [p.refused_because for p in table.ledger.plans("test")][-1] is not None
        assert table.ledger.last_audit_head("test") == TRUE.heads[5]
    (refused,) = of(tmp_path, HistoryRefused)
    assert isinstance(refused, HistoryRefused)
    assert "does not extend the one that this site holds" in refused.detail
    assert (refused.kept_size, refused.kept_head) == (5, TRUE.heads[5])
    assert (refused.offered_size, refused.offered_head) == (9, forked.heads[9])
    kept = SignedHead(refused.kept_size, refused.kept_head, refused.kept_signature)
    offered = SignedHead(refused.offered_size, refused.offered_head, refused.offered_signature)
    assert chain.is_signed_by(kept, "test", KEY)
    assert chain.is_signed_by(offered, "test", KEY)
    (declined,) = of(tmp_path, PlanDeclined)
    assert isinstance(declined, PlanDeclined)
    assert declined.session == session
    told = capsys.readouterr().out
    assert "the coordinator shows another history" in told
    assert f"--size 9 --head {forked.heads[9].hex()}" in told


async def test_a_site_that_starts_again_knows_its_head_and_its_last_round(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        await table.play(offer(table, TRUE, 0, 5, rounds_total=9))
    async with a_site(tmp_path) as table:
        forked = History(20, forked_at=3)
        session = await table.propose(offer(table, forked, 5, 9, round_number=4, rounds_total=9))
        assert [d.code for d in table.answers(session, Decline)] == [DeclineCode.AUDIT]
        true = offer(table, TRUE, 5, 9, round_number=4, rounds_total=9, previous_survivors=survivors_digest(NAMES[:3]))
        session = await table.propose(true)
        (decline,) = table.answers(session, Decline)
        assert "survivors of round 3 are not those" in decline.detail
        right = survivors_digest(NAMES)
        session = await table.propose(
            offer(table, TRUE, 5, 9, round_number=4, attempt=2, rounds_total=9, previous_survivors=right)
        )
        assert table.answers(session, AdvertiseKeys)


async def test_a_session_that_the_agent_did_not_live_to_end_is_told_at_the_next_start(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        session = await table.propose(offer(table, TRUE, 0, 5))
        assert table.answers(session, AdvertiseKeys)
        table.driver._audit.log.close()  # killed here: nothing more is written
        table.driver._audit = SiteTrail.in_memory(federation="test", certificate=b"", signer=signer_of_own())
    trail_in(tmp_path).close()
    (ended,) = of(tmp_path, SessionEnded)
    assert isinstance(ended, SessionEnded)
    assert (ended.session, ended.outcome) == (session, "lost")


async def test_a_long_history_is_fetched_and_checked_as_strictly(tmp_path: Path) -> None:
    def elsewhere(made: OpenSession, table: Table) -> OpenSession:
        """The digests to be fetched instead."""
        data = made.history.digests
        digest = hashlib.sha256(data).digest()
        table.link.blobs[digest] = data
        return replace(made, history=replace(made.history, digests=b"", digests_digest=digest))

    async with a_site(tmp_path) as table:
        await table.play(elsewhere(offer(table, TRUE, 0, 5), table))
        forked = History(20, forked_at=3)
        lie = elsewhere(offer(table, forked, 5, 9, round_number=4), table)
        session = await table.propose(lie)
        assert [d.code for d in table.answers(session, Decline)] == [DeclineCode.AUDIT]
        assert table.driver.active_session() == b""
        await table.play(elsewhere(offer(table, TRUE, 5, 11, round_number=4, attempt=2,
                                         previous_survivors=survivors_digest(NAMES)), table))  # fmt: skip
    heads = of(tmp_path, HeadKept)
    assert [(h.since, h.size, len(h.digests) // 32) for h in heads if isinstance(h, HeadKept)] == [
        (0, 5, 5),
        (5, 11, 6),
    ]
    assert len(of(tmp_path, HistoryRefused)) == 1


async def test_a_coordinator_without_a_log_is_taken_as_before(tmp_path: Path) -> None:
    async with a_site(tmp_path) as table:
        session = await table.play(table.offer())
        assert table.answers(session, AdvertiseKeys)
    assert of(tmp_path, HeadKept) == []
    assert len(of(tmp_path, Plan)) == 1


def test_a_log_that_was_cut_behind_the_ledgers_back_ends_the_start(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "state") as ledger:
        ledger.record_audit_head("test", TRUE.heads[5])
        trail = trail_in(tmp_path)
        assert not is_held(trail, ledger.last_audit_head("test"))
        trail.accept_history(5, TRUE.heads[5], "the log was lost")
        assert is_held(trail, ledger.last_audit_head("test"))
        assert trail.kept_size == 5
        trail.close()


def test_a_history_refused_again_and_again_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskwork.participant.audit.REFUSALS_KEPT", 3)
    trail = trail_in(tmp_path)
    trail.accept_history(8, TRUE.heads[8], "for a test")
    table_offer = History(20, forked_at=2)
    plan = plan_with(table_offer.heads[9])
    made = OpenSession(Proposal(encode_plan(plan), bytes(64), plan), b"", 1, bytes(32), 1, table_offer.shown(8, 9))
    for number in range(6):
        with pytest.raises(HistoryDiffers):
            trail.check(bytes([number]) * 32, made, KEY)
    trail.close()
    assert len(of(tmp_path, HistoryRefused)) == 3


def test_a_renewed_certificate_signs_the_log_from_its_own_record_on(tmp_path: Path) -> None:
    trail = trail_in(tmp_path)
    renewed = AUTHORITY.issue(Role.PARTICIPANT, NAMES[OWN], now=NOW)
    trail.renewed(der_of(renewed), signer_of(renewed))
    trail.renewed(der_of(renewed), signer_of(renewed))
    trail.close()
    assert [record.KIND for record in records(tmp_path)] == ["opened", "service", "signer"]
    trail_in(tmp_path).close()
    assert [record.KIND for record in records(tmp_path)][-2:] == ["signer", "service"]


def test_a_damaged_log_ends_the_start(tmp_path: Path) -> None:
    trail_in(tmp_path).close()
    path = tmp_path / "state" / LOG_NAME
    path.write_bytes(path.read_bytes().replace(b"started", b"stopped"))
    with pytest.raises(StoreError, match="record 1"):
        trail_in(tmp_path)
