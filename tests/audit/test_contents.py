"""A coordinator that lies in its own log, in good order and signed with its own key: what cannot be so is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.audit.recorded import judged, recorded, rewritten, rewritten_with_plans, signed_plan, site_signer
from tests.simulation.identities import COORDINATOR_CERTIFICATE, ROOTS, member

from maskwork.audit.committed import committed_models
from maskwork.audit.contents import Facts
from maskwork.audit.lines import decode_line
from maskwork.audit.records import (
    AttemptEnded,
    Certificate,
    Committed,
    Dropped,
    HeadKept,
    JobEnded,
    ModelReceived,
    Operator,
    Plan,
    Record,
    Released,
    RolledBack,
    Sent,
    SessionEnded,
    SetsSigned,
    Survivors,
)
from maskwork.errors import UserError
from maskwork.net.identity import fingerprint
from maskwork.secagg.plan import RosterEntry
from maskwork.wire.plan_codec import decode_plan

LOG = recorded().coordinator
Records = list[tuple[Record, float]]
OTHER = bytes(range(32))


def changed_record(kind: str, *, last: bool = False, **changes: object) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        index = recorded().index_of(kind, last=last)
        record, at = records[index]
        records[index] = (record.model_copy(update=changes), at)

    return change


def changed_plan(**changes: object) -> Callable[[Records], None]:
    """The last plan, another one, well signed; what followed it in the log stays."""

    def change(records: Records) -> None:
        index = recorded().index_of("plan", last=True)
        record, at = records[index]
        assert isinstance(record, Plan)
        plan = replace(decode_plan(record.plan), **changes)  # type: ignore[arg-type]  # fields of a plan
        records[index] = (signed_plan(plan, record.audit_size), at)

    return change


def without(kind: str) -> Callable[[Records], None]:
    return lambda records: records.__delitem__(recorded().index_of(kind))


def inserted(record: Record, before: str | None = None) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        at = len(records) if before is None else recorded().index_of(before, last=True)
        records.insert(at, (record, records[-1][1]))

    return change


def survivors() -> Survivors:
    record = recorded().entries[recorded().index_of("survivors")].record
    assert isinstance(record, Survivors)
    return record


def committed(*, last: bool = False) -> Committed:
    record = recorded().entries[recorded().index_of("committed", last=last)].record
    assert isinstance(record, Committed)
    return record


def few(record: Survivors, count: int) -> dict[int, bytes]:
    return dict(list(record.signatures.items())[:count])


STRANGER = Certificate(certificate=member(7).certificate, fingerprint=OTHER)
SWAPPED = dict(zip(survivors().signatures, list(survivors().signatures.values())[::-1], strict=True))

LIES: dict[str, tuple[Callable[[Records], None], str, str]] = {
    "certificate-removed": (without("certificate"), "plan", "the certificate of site-1 in the roster is not in this"),
    "fingerprint": (inserted(STRANGER), "certificate", "the fingerprint is not that of the certificate"),
    "plan-signature": (changed_record("plan", signature=bytes(64)), "plan", "not signed by the coordinator"),
    "plan-session": (changed_record("plan", session=OTHER), "plan", "the session id is not that of the plan"),
    "plan-bytes": (changed_record("plan", plan=b"\x08\x01"), "plan", "plan"),
    "plan-federation": (changed_plan(federation="elsewhere"), "plan", "is of the federation elsewhere"),
    "plan-head": (changed_plan(audit_head=OTHER), "plan", "names a head that this log did not have"),
    "plan-later-head": (changed_record("plan", audit_size=99), "plan", "names a head that this log did not have"),
    "plan-model": (changed_plan(model_digest=OTHER), "plan", "not from the job's model"),
    "plan-previous": (changed_plan(previous_survivors=OTHER), "plan", "previous survivors are not those"),
    "plan-attempt": (changed_plan(round_number=1), "plan", "comes after (2, 1)"),
    "plan-job": (changed_plan(job="other"), "plan", "no record says that job other was submitted"),
    "job-removed": (without("job-submitted"), "plan", "no record says that job job-1 was submitted"),
    "sets-unknown-session": (changed_record("survivors", session=OTHER), "survivors", "no plan of session"),
    "sets-order": (changed_record("survivors", u3=b"\x1f", u2=b"\x0f"), "survivors", "U3 ⊆ U2 ⊆ U1"),
    "sets-too-few": (changed_record("survivors", u3=b"\x03"), "survivors", "2 survivors where the plan asks for"),
    "sets-bitmap": (changed_record("survivors", u1=b"\xff"), "survivors", "beyond the roster"),
    "sets-u1": (changed_record("survivors", u1=b"\x1f", advertisements={}), "survivors", "not those of U1"),
    "signatures-few": (
        changed_record("survivors", signatures=few(survivors(), 3)),
        "survivors",
        "3 holders of site-1's secrets signed; t = 4",
    ),
    "signatures-swapped": (changed_record("survivors", signatures=SWAPPED), "survivors", "is not over these sets"),
    "signature-of-a-dropout": (
        changed_record("survivors", signatures={**survivors().signatures, 4: bytes(64)}),
        "survivors",
        "signed and is not in U3",
    ),
    "survivors-removed": (without("survivors"), "committed", "nobody signed the survivors of this round"),
    "survivors-twice": (inserted(survivors()), "survivors", "there may be one only"),
    "commit-unknown": (changed_record("committed", session=OTHER), "committed", "no plan of session"),
    "commit-survivors": (changed_record("committed", survivors=("site-1",)), "committed", "not those that were signed"),
    "commit-round": (changed_record("committed", round_number=7), "committed", "not the round of its plan"),
    "commit-model-in": (changed_record("committed", model_in=OTHER), "committed", "begin from the model of its plan"),
    "commit-model-out": (changed_record("committed", model_out=OTHER), "plan", "not from the job's model"),
    "commit-twice": (inserted(committed()), "committed", "there may be one only"),
    "commit-after-end": (
        inserted(AttemptEnded(session=committed().session, outcome="aborted", reason="")),
        "attempt-ended",
        "had been committed before",
    ),
    "commit-of-what-had-ended": (
        inserted(AttemptEnded(session=committed(last=True).session, outcome="aborted", reason=""), before="committed"),
        "committed",
        "its attempt had ended before",
    ),
    "dropped-stranger": (changed_record("dropped", participant="nobody"), "dropped", "was not in the roster"),
    "dropped-nowhere": (
        changed_record("dropped", round_number=9, attempt=9),
        "dropped",
        "no plan of that attempt comes before it",
    ),
    "rolled-back-nothing": (
        inserted(RolledBack(job="job-1", rounds=(9,), model=OTHER, reason="")),
        "rolled-back",
        "had not been committed",
    ),
    "rolled-back-elsewhere": (
        inserted(RolledBack(job="job-1", rounds=(3,), model=OTHER, reason="")),
        "rolled-back",
        "model of the last round that stands",
    ),
    "rolled-back-stranger": (
        inserted(RolledBack(job="other", rounds=(3,), model=OTHER, reason="")),
        "rolled-back",
        "no record says that job other",
    ),
    "ended-stranger": (inserted(JobEnded(job="other", state="failed")), "job-ended", "no record says that job other"),
}


MOVES_HEADS = {"certificate-removed", "job-removed", "commit-model-out"}
"""Lies about what comes before a plan, which names the head of it: the liar signs its plans anew too."""


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_cannot_be_so_is_named(lie: str, tmp_path: Path) -> None:
    change, kind, what = LIES[lie]
    rewrite = rewritten_with_plans if lie in MOVES_HEADS else rewritten
    found = judged(tmp_path, rewrite(LOG, change)).problems
    assert any(p.kind == kind and what in p.what for p in found), found


def test_a_member_with_somebody_elses_certificate_is_named(tmp_path: Path) -> None:
    """The coordinator puts a certificate of its own into the roster under a site's name."""

    def change(records: Records) -> None:
        index = recorded().index_of("plan", last=True)
        record, at = records[index]
        assert isinstance(record, Plan)
        plan = decode_plan(record.plan)
        own = fingerprint(COORDINATOR_CERTIFICATE)
        roster = (RosterEntry(plan.roster[0].participant, own), *plan.roster[1:])
        records[index] = (signed_plan(replace(plan, roster=roster), record.audit_size), at)
        first = recorded().index_of("plan")
        records[first:first] = [(Certificate(certificate=COORDINATOR_CERTIFICATE, fingerprint=own), at)]

    found = judged(tmp_path, rewritten_with_plans(LOG, change)).problems
    assert any(p.kind == "plan" and "has the certificate of" in p.what for p in found), found


@pytest.mark.parametrize("kind", ["opened", "job-submitted", "certificate", "dropped", "committed"])
def test_the_survivors_signatures_hold_what_came_before_their_plan(kind: str, tmp_path: Path) -> None:
    """Found from the log alone, although its owner made every head, plan and signature of its own anew.

    A plan names the head before it, its session is the hash of it, and t sites signed that session's survivors.
    """
    at = recorded().index_of(kind)

    def change(records: Records) -> None:
        record, when = records[at]
        records[at] = (record, when + 0.5)

    found = judged(tmp_path, rewritten_with_plans(LOG, change)).problems
    assert any(p.kind == "survivors" and "is not over these sets" in p.what for p in found), found


def test_operators_and_ends_are_told_with_their_job(tmp_path: Path) -> None:
    asked = Operator(action="export", by="spiffe://simulated/auditor/ada", fingerprint=OTHER, job="job-1")
    facts = judged(tmp_path, rewritten(LOG, inserted(asked))).facts
    assert isinstance(facts, Facts)
    assert facts.jobs["job-1"].operators == [asked]
    assert facts.jobs["job-1"].ended is not None
    assert [c.round_number for c in facts.jobs["job-1"].standing()] == [1, 2, 3]


def test_a_rollback_is_followed(tmp_path: Path) -> None:
    second = [e.record for e in recorded().entries if e.kind == "committed"][1]
    assert isinstance(second, Committed)
    taken = RolledBack(job="job-1", rounds=(3,), model=second.model_out, reason="damaged")
    found = judged(tmp_path, rewritten(LOG, inserted(taken)))
    assert found.problems == []
    assert found.facts is not None
    assert [c.round_number for c in found.facts.jobs["job-1"].standing()] == [1, 2]


# --- a site that lies in its own --------------------------------------------------------------------------------------

SITE = recorded().sites["site-1"]


def site_record(kind: str) -> int:
    return next(e.index for e in map(decode_line, SITE) if e.kind == kind)


def changed_site(kind: str, **changes: object) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        record, at = records[site_record(kind)]
        records[site_record(kind)] = (record.model_copy(update=changes), at)

    return change


SITE_LIES: dict[str, tuple[Callable[[Records], None], str, str]] = {
    "plan": (changed_site("plan", signature=bytes(64)), "plan", "not signed by the coordinator"),
    "head": (changed_site("head-kept", head=OTHER), "head-kept", "not signed by the coordinator"),
    "head-signature": (changed_site("head-kept", signature=bytes(64)), "head-kept", "head is not signed"),
    "head-session": (changed_site("head-kept", session=OTHER), "head-kept", "no signed plan before it names"),
    "head-since": (changed_site("head-kept", since=2), "head-kept", "it extends a head of 2 records, and 0 was kept"),
    "head-digests": (changed_site("head-kept", digests=OTHER), "head-kept", "do not lead to that head"),
    "model": (changed_site("model-received", model=OTHER), "model-received", "not the model of the plan"),
    "sets": (changed_site("sets-signed", u3=b"\x07"), "sets-signed", "is not this site's, over these sets"),
    "sets-size": (changed_site("sets-signed", u3=b""), "sets-signed", "has 1 bytes, not 0"),
    "released": (changed_site("released", survivors=("site-1",)), "released", "not those that this site signed"),
    "released-model": (changed_site("released", model=OTHER), "released", "not about the model of the plan"),
    "released-few": (changed_site("released", signatures={}), "released", "0 signatures were verified"),
    "sets-twice": (
        lambda records: records.append(records[site_record("sets-signed")]),
        "sets-signed",
        "there may be one only",
    ),
    "sent-unknown": (changed_site("sent", session=OTHER), "sent", "no plan of session"),
    "released-unknown": (changed_site("released", session=OTHER), "released", "no plan of session"),
}


@pytest.mark.parametrize("lie", SITE_LIES)
def test_a_sites_record_that_cannot_be_so_is_named(lie: str, tmp_path: Path) -> None:
    change, kind, what = SITE_LIES[lie]
    found = judged(tmp_path, rewritten(SITE, change, site_signer("site-1"))).problems
    assert any(p.kind == kind and what in p.what for p in found), found


def test_the_records_of_a_site_are_those_that_are_promised() -> None:
    kinds = {entry.kind for entry in map(decode_line, SITE)}
    promised = (Plan, HeadKept, ModelReceived, SetsSigned, Released, Certificate)
    assert {record.KIND for record in promised} <= kinds
    assert {"opened", "service", "session-ended"} <= kinds


def test_what_left_a_site_is_told_in_bytes_and_digests() -> None:
    records = [e.record for e in map(decode_line, SITE)]
    first = next(record.session for record in records if isinstance(record, Sent))
    left = {record.what: record for record in records if isinstance(record, Sent) and record.session == first}
    assert set(left) == {"AdvertiseKeys", "ShareKeys", "ConsistencyCheck", "Unmask", "update", "statistics"}
    assert all(sent.bytes > 0 for sent in left.values())
    assert {len(sent.digest) for kind, sent in left.items() if kind != "update"} == {32}


def test_what_left_a_site_that_was_killed_is_in_its_log_all_the_same(tmp_path: Path) -> None:
    """Each message is written down before it leaves, not when the session ends."""
    killed = recorded().sites["site-5"]
    records = [e.record for e in map(decode_line, killed)]
    (lost,) = [record.session for record in records if isinstance(record, SessionEnded) and record.outcome == "lost"]
    assert "AdvertiseKeys" in {record.what for record in records if isinstance(record, Sent) and record.session == lost}
    assert judged(tmp_path, killed).problems == []


def test_a_drop_says_why() -> None:
    dropped = recorded().entries[recorded().index_of("dropped")].record
    assert isinstance(dropped, Dropped)
    assert (dropped.participant, dropped.reason) == ("site-5", "disconnected")


def test_the_models_that_a_log_committed_are_read_from_a_log_that_is_whole(tmp_path: Path) -> None:
    log, lines = tmp_path / "log", recorded().coordinator
    log.write_bytes(b"".join(lines))
    found = committed_models(log, ROOTS)
    commits = [e.record for e in recorded().entries if isinstance(e.record, Committed)]
    assert found.models == {(c.job, c.round_number): c.model_out for c in commits}
    assert len(found.models) == 3
    assert len(found.heads) == len(lines) + 1

    log.write_bytes(b"".join(lines[:5] + lines[6:]))
    with pytest.raises(UserError, match="not to be relied upon: record 5"):
        committed_models(log, ROOTS)
    log.write_bytes(b"".join(recorded().sites["site-1"]))
    with pytest.raises(UserError, match="a site's log"):
        committed_models(log, ROOTS)
