"""The participant's driver: what it answers, records, keeps and forgets, whatever becomes of session and connection."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog
from tests.participant.local_site import NAMES, OWN, Table

from maskwork.errors import StoreError, UserError
from maskwork.participant.policy import Policy
from maskwork.secagg import client_states, server
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Complaint,
    ConsistencyCheck,
    Decline,
    DeliveredShares,
    SessionClosed,
    ShareKeys,
    SurvivorSets,
    Unmask,
    Withdraw,
)
from maskwork.wire.codec import UploadGrant, UploadReady, Welcome
from maskwork.worker import WorkerDied


@pytest.fixture
async def table(tmp_path: Path) -> AsyncIterator[Table]:
    made = await Table(tmp_path / "site").start()
    yield made
    await made.close()


@pytest.fixture
def logged() -> Iterator[list[structlog.typing.EventDict]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


def scratch(table: Table) -> list[str]:
    folder = table.folder / "scratch"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


async def test_a_whole_session_is_answered_recorded_and_forgotten(table: Table) -> None:
    session = await table.play(table.offer())
    assert isinstance(table.state, core.Completed)
    assert table.state.survivors == frozenset(range(4))
    said = [type(m) for s, m in table.link.sent if s == session]
    assert said == [AdvertiseKeys, ShareKeys, UploadReady, ConsistencyCheck, Unmask]
    assert table.ledger.highest_attempt("test", "job-1") == (3, 1)
    assert table.ledger.releases("test", table.offer().proposal.plan.model_digest) == (frozenset(NAMES),)
    await table.settle()
    assert (scratch(table), table.worker.kept) == ([], set())
    assert table.driver.active_session() == b""


async def test_a_second_session_uses_the_same_worker(table: Table) -> None:
    await table.play(table.offer())
    await table.play(table.offer(attempt=2))
    assert isinstance(table.state, core.Completed)
    assert table.worker.calls == ["train", "mask", "discard", "train", "mask", "discard"]
    assert not table.worker.cancelled


# --- offers ---------------------------------------------------------------------------------------------------------


async def test_a_declined_plan_is_told_and_recorded(tmp_path: Path) -> None:
    table = await Table(tmp_path / "site", Policy(min_weight_cap=1, min_cohort=5)).start()
    try:
        session = await table.propose(table.offer())
        assert table.answers(session, Decline) == [Decline(DeclineCode.COHORT_TOO_SMALL, "cohort 4 < 5")]
        ((_, refused),) = [(p.session_id, p) for p in table.ledger.plans("test")]
        assert dataclasses.asdict(refused)["session_id"] == session
        assert "cohort 4 < 5" in repr(dataclasses.asdict(refused).values())
        assert table.ledger.highest_attempt("test", "job-1") is None
        assert table.worker.calls == []
    finally:
        await table.close()


async def test_a_plan_that_the_coordinator_did_not_sign_is_declined_and_is_no_evidence(table: Table) -> None:
    offer = table.offer()
    forged = dataclasses.replace(offer, proposal=dataclasses.replace(offer.proposal, signature=bytes(64)))
    session = await table.propose(forged)
    (decline,) = table.answers(session, Decline)
    assert decline.code is DeclineCode.BAD_PLAN
    assert table.ledger.plans("test") == ()
    assert scratch(table) == []


async def test_an_unsigned_plan_is_no_evidence_whatever_else_is_wrong_with_it(tmp_path: Path) -> None:
    table = await Table(tmp_path / "site", Policy(min_weight_cap=1, min_cohort=5)).start()
    try:
        offer = table.offer()
        forged = dataclasses.replace(offer, proposal=dataclasses.replace(offer.proposal, signature=bytes(64)))
        session = await table.propose(forged)
        assert [decline.code for decline in table.answers(session, Decline)] == [DeclineCode.BAD_PLAN]
        assert table.ledger.plans("test") == ()
    finally:
        await table.close()


async def test_an_offer_that_is_declined_does_not_end_the_session_that_runs(table: Table) -> None:
    running = await table.propose(table.offer())
    await table.propose(table.offer(attempt=2, task="another"))
    assert table.driver.active_session() == running


async def test_an_offer_under_another_sessions_id_is_ignored(table: Table) -> None:
    await table.say(bytes(32), table.offer())
    assert table.link.sent == []
    assert scratch(table) == []


async def test_a_repeated_offer_is_answered_to_the_letter_and_trained_for_once(table: Table) -> None:
    offer = table.offer()
    session = await table.propose(offer)
    await table.propose(offer)
    first, second = table.answers(session, AdvertiseKeys)
    assert first == second
    assert table.worker.calls.count("train") == 1


async def test_an_attempt_once_joined_is_never_joined_again(table: Table) -> None:
    await table.play(table.offer())
    session = await table.propose(table.offer(nonce=b"another attempt!"))
    (decline,) = table.answers(session, Decline)
    assert decline.code is DeclineCode.STALE_ATTEMPT
    later = await table.propose(table.offer(attempt=2))
    assert table.answers(later, AdvertiseKeys)


async def test_an_attempt_recorded_while_the_model_was_fetched_is_not_joined_twice(table: Table) -> None:
    table.link.held_downloads = True
    session = await table.propose(table.offer())
    table.ledger.record_attempt(
        "test", "job-1", 3, attempt=1, session_id=b"o" * 32, plan_bytes=b"p", plan_signature=b"s", at=1.0
    )
    table.link.go.set()
    await table.settle()
    (decline,) = table.answers(session, Decline)
    assert decline.code is DeclineCode.STALE_ATTEMPT
    assert (scratch(table), table.driver.active_session()) == ([], b"")


async def test_a_session_that_is_superseded_leaves_nothing_running(table: Table) -> None:
    table.worker.held = {"train"}
    first = await table.propose(table.offer())
    second = await table.propose(table.offer(attempt=2))
    assert table.worker.cancelled == ["train"]
    assert scratch(table) == [second.hex()]
    assert table.driver.active_session() == second
    assert table.answers(first, Withdraw) == []
    table.worker.go.set()
    await table.settle()
    assert table.worker.kept == {second}


async def test_a_session_on_a_model_answered_for_needs_the_same_survivors(table: Table) -> None:
    await table.play(table.offer())
    session = await uploading(table, attempt=2)
    await table.say(session, SurvivorSets(frozenset(range(4)), frozenset(range(4)), frozenset({0, 1, 2})))
    assert table.answers(session, ConsistencyCheck) == []
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.SAME_MODEL)]


# --- fetching -------------------------------------------------------------------------------------------------------


async def test_a_session_closed_while_fetching_is_forgotten(table: Table) -> None:
    table.link.held_downloads = True
    session = await table.propose(table.offer())
    assert scratch(table) == [session.hex()]
    assert table.driver.active_session() == session  # so that the coordinator does not give us up when we reconnect
    await table.say(session, SessionClosed(False, "over"))
    assert (scratch(table), table.driver.active_session()) == ([], b"")
    table.link.go.set()
    await table.settle()
    assert table.worker.calls == []
    assert table.link.sent == []


async def test_an_interrupted_download_goes_on(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskwork.participant.errands.DOWNLOAD_PAUSE_S", 0.0)
    table.link.broken_downloads = 3
    session = await table.propose(table.offer())
    await table.settle()
    assert table.answers(session, AdvertiseKeys)


async def test_a_model_is_fetched_after_however_long_a_cut(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskwork.participant.errands.DOWNLOAD_PAUSE_S", 0.0)
    table.link.held_downloads = True
    session = await table.propose(table.offer())
    await table.disconnect()
    table.link.held_downloads = False
    table.link.go.set()
    await table.settle()  # time for more tries than are made over a link that is up
    assert table.driver.active_session() == session
    await table.connect()
    assert table.answers(session, AdvertiseKeys)


async def test_a_model_that_cannot_be_had_is_a_decline(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskwork.participant.errands.DOWNLOAD_PAUSE_S", 0.0)
    offer = table.offer()
    table.link.blobs.clear()
    session = await table.propose(offer)
    await table.settle()
    (decline,) = table.answers(session, Decline)
    assert decline.code is DeclineCode.WRONG_MODEL
    assert scratch(table) == []


async def test_certificates_that_do_not_fit_the_roster_are_a_decline(table: Table) -> None:
    offer = table.offer()
    table.link.blobs[offer.certificates_digest] = b"\0\0\0\1x"
    session = await table.propose(offer)
    (decline,) = table.answers(session, Decline)
    assert decline.code is DeclineCode.WRONG_MODEL


async def test_a_cohorts_certificates_are_fetched_once_and_again_when_they_change(table: Table) -> None:
    bad = b"\0\0\0\1x"
    other = dataclasses.replace(table.offer(), certificates_digest=hashlib.sha256(bad).digest())
    table.link.blobs[other.certificates_digest] = bad
    assert table.answers(await table.propose(other), Decline)
    offer = table.offer(attempt=2)
    assert table.answers(await table.propose(offer), AdvertiseKeys)
    again = table.offer(attempt=3)
    del table.link.blobs[again.certificates_digest]  # they are here
    assert table.answers(await table.propose(again), AdvertiseKeys)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        WorkerDied("was ended by SIGKILL"),
        RuntimeError("CUDA error"),
        KeyError("label"),
        ZeroDivisionError(),
        OSError(28),
    ],
)
async def test_training_that_fails_in_whatever_way_is_a_withdrawal(
    table: Table, error: Exception, logged: list[structlog.typing.EventDict]
) -> None:
    table.worker.failures["train"] = error
    session = await table.propose(table.offer())
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.TRAINING_FAILED)]
    (line,) = [e for e in logged if e["event"] == "session aborted"]
    assert line["detail"] == (str(error) or "ZeroDivisionError")
    assert (scratch(table), table.driver.active_session()) == ([], b"")
    await table.play(table.offer(attempt=2))
    assert isinstance(table.state, core.Completed)


async def test_masking_that_fails_is_a_withdrawal(table: Table) -> None:
    table.worker.failures["mask"] = ValueError("the update holds NaN at 3")
    session = await table.play(table.offer(), until=core.CollectingSignatures | core.Aborted)  # type: ignore[arg-type]
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.ENCODING_REFUSED)]


async def test_a_worker_that_dies_while_masking_is_no_refusal_of_the_update(table: Table) -> None:
    table.worker.failures["mask"] = WorkerDied("was ended by SIGKILL")
    session = await table.play(table.offer(), until=core.CollectingSignatures | core.Aborted)  # type: ignore[arg-type]
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.TRAINING_FAILED)]


async def test_a_worker_that_cannot_start_again_to_forget_an_update_is_one_line_in_the_log(
    table: Table, logged: list[structlog.typing.EventDict]
) -> None:
    """It is ended with a cancelled training; the next one may not find the site's data any more."""
    table.worker.held = {"train"}
    table.worker.failures["discard"] = UserError("task readmission: no such file: stays.csv")
    session = await table.propose(table.offer())
    await table.say(session, SessionClosed(False, "session ended"))
    await table.settle()
    (line,) = [e for e in logged if e["event"] == "worker gone"]
    assert "stays.csv" in line["detail"]


async def test_training_that_outlives_its_session_is_ended(table: Table) -> None:
    table.worker.held = {"train"}
    session = await table.propose(table.offer())
    await table.say(session, SessionClosed(False, "session ended"))
    assert table.worker.cancelled == ["train"]
    assert table.answers(session, Withdraw) == []
    assert scratch(table) == []


async def test_shares_may_come_before_training_ends_and_after(table: Table) -> None:
    table.worker.held = {"train"}
    session = await table.play(table.offer(), until=core.CollectingUpdates)
    assert table.answers(session, ShareKeys)
    assert "mask" not in table.worker.calls
    table.worker.go.set()
    await table.settle()


# --- uploads --------------------------------------------------------------------------------------------------------


async def uploading(table: Table, **changes: object) -> bytes:
    """Bring a session to where the update is masked and offered, but no slot was granted."""
    session = await table.play(table.offer(**changes), until=core.CollectingUpdates)
    assert isinstance(table.state, core.CollectingUpdates)
    (delivered,) = server.step(table.state, core.Reconnected(OWN)).effects
    assert isinstance(delivered, core.SendTo)
    assert isinstance(delivered.message, DeliveredShares)
    await table.say(session, delivered.message)
    assert table.answers(session, UploadReady)
    return session


async def test_a_resumed_upload_sends_the_same_bytes_from_the_durable_offset(table: Table) -> None:
    session = await uploading(table)
    table.link.breaks_after = [40]
    await table.say(session, UploadGrant(0, 0))
    async with asyncio.timeout(10):
        while len(table.answers(session, UploadReady)) < 2:
            await asyncio.sleep(0.01)
    await table.say(session, UploadGrant(40, 0))
    await table.say(session, UploadGrant(100, 5))
    (_, cut), (_, rest), (_, end) = table.link.uploads
    whole = cut + rest
    assert len(cut) == 40
    assert whole.endswith(end)
    assert len(whole) == 100 + 16
    assert end == whole[105:]
    assert table.worker.calls.count("mask") == 1  # encoded and masked once


async def test_grants_that_were_not_asked_for_are_ignored(table: Table) -> None:
    table.worker.held = {"train"}
    session = await table.propose(table.offer())
    await table.say(session, UploadGrant(0, 0))
    await table.say(bytes(32), UploadGrant(0, 0))
    assert table.link.uploads == []


async def test_an_upload_offered_while_the_connection_was_down_is_offered_again(table: Table) -> None:
    session = await uploading(table)
    offered = len(table.answers(session, UploadReady))
    await table.disconnect()
    await table.connect()
    assert len(table.answers(session, UploadReady)) == offered + 1


async def test_what_is_uploaded_has_no_name_on_the_disk_and_is_closed_in_the_end(table: Table) -> None:
    session = await uploading(table)
    assert sorted(p.name for p in (table.folder / "scratch" / session.hex()).iterdir()) == [
        "certificates",
        "model.safetensors",
    ]
    work = table.driver._work
    assert work is not None
    assert work.update is not None
    await table.say(session, SessionClosed(False, "over"))
    assert work.update.closed
    assert scratch(table) == []


# --- what the coordinator should not say ----------------------------------------------------------------------------


async def test_messages_about_other_sessions_and_second_welcomes_change_nothing(
    table: Table, logged: list[structlog.typing.EventDict]
) -> None:
    table.worker.held = {"train"}
    session = await table.propose(table.offer())
    await table.say(b"?" * 32, SessionClosed(False, "that session is over"))
    await table.say(b"?" * 32, SurvivorSets(frozenset(), frozenset(), frozenset()))
    assert not [e for e in logged if e["log_level"] == "error"]
    await table.say(b"", Welcome(1, b""))
    assert [e["event"] for e in logged if e["log_level"] == "error"] == ["a second Welcome"]
    assert table.driver.active_session() == session


async def test_a_malformed_message_ends_the_session(table: Table) -> None:
    table.worker.held = {"train"}
    session = await table.propose(table.offer())
    await table.say(session, SurvivorSets(frozenset(), frozenset(), frozenset()), size=40)
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.UNEXPECTED_MESSAGE)]


async def test_equivocation_is_answered_with_a_withdrawal(table: Table) -> None:
    session = await table.play(table.offer(), until=core.CollectingShares)
    await table.say(session, SurvivorSets(frozenset(range(4)), frozenset(range(4)), frozenset(range(4))))
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.UNEXPECTED_MESSAGE)]
    assert table.answers(session, Complaint) == []


# --- the end --------------------------------------------------------------------------------------------------------


async def test_leaving_is_told(table: Table) -> None:
    table.worker.held = {"train"}
    session = await table.propose(table.offer())
    table.driver.leave()
    assert table.answers(session, Withdraw) == [Withdraw(AbortReason.CANCELLED)]
    await table.settle()
    assert table.worker.cancelled == ["train"]
    await table.driver.close()
    assert table.worker.closed
    assert "discard" not in table.worker.calls  # nobody starts a worker to forget what it lost


async def test_leaving_while_the_model_is_fetched_is_told_too(table: Table) -> None:
    table.link.held_downloads = True
    session = await table.propose(table.offer())
    table.driver.leave()
    assert table.answers(session, Decline) == [Decline(DeclineCode.PAUSED, "the site stops")]
    assert scratch(table) == []


async def test_leaving_without_a_session_says_nothing(table: Table) -> None:
    table.driver.leave()
    assert table.link.sent == []


async def test_a_ledger_that_cannot_be_written_ends_the_participant_before_anything_is_sent(table: Table) -> None:
    class FullLedger:
        def __getattr__(self, name: str) -> object:
            return getattr(table.ledger, name)

        def record_attempt(self, *_: object, **__: object) -> None:
            raise StoreError("the disk is full", file="ledger.sqlite", remedy="Free some space.")

    table.driver._ledger = FullLedger()  # type: ignore[assignment]
    with pytest.raises(StoreError, match="the disk is full"):
        await table.propose(table.offer())
    assert table.link.sent == []
    table.loop = None


# --- secrets --------------------------------------------------------------------------------------------------------


def secrets_in(value: object, depth: int = 0) -> Iterator[bytes]:
    """Every byte string of 16 bytes or more within a state."""
    if isinstance(value, bytes | bytearray):
        if len(value) >= 16:
            yield bytes(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in dataclasses.fields(value):
            yield from secrets_in(getattr(value, item.name), depth + 1)
    elif isinstance(value, dict):
        for item in value.values():
            yield from secrets_in(item, depth + 1)
    elif isinstance(value, tuple | list | frozenset):
        for item in value:
            yield from secrets_in(item, depth + 1)


async def test_no_secret_of_a_session_is_ever_logged(
    table: Table, logged: list[structlog.typing.EventDict], caplog: pytest.LogCaptureFixture
) -> None:
    secrets: set[bytes] = set()
    original = table.driver._perform

    def watching(work: object, step: client_states.Step) -> None:
        for part in (step.state, *step.effects):
            secrets.update(s for s in secrets_in(getattr(part, "secrets", None)))
            secrets.update(s for s in secrets_in(getattr(part, "held", None)))
            secrets.update(s for s in secrets_in(getattr(part, "keys", None)))
            secrets.update(s for s in secrets_in(getattr(part, "stream_key", None)))
        original(work, step)  # type: ignore[arg-type]

    table.driver._perform = watching  # type: ignore[method-assign]
    await table.play(table.offer())
    await table.play(table.offer(attempt=2), until=core.CollectingShares)
    await table.say(table.driver.active_session(), SurvivorSets(frozenset(), frozenset(), frozenset()))
    table.worker.failures["train"] = RuntimeError("lost")
    await table.propose(table.offer(attempt=3))
    assert len(secrets) > 20
    assert len(logged) >= 8
    told = repr(logged) + caplog.text + repr(table.worker.requests) + repr(table.driver._work)
    for secret in secrets:
        for form in (secret.hex(), base64.b64encode(secret).decode().rstrip("="), repr(secret)[2:-1]):
            assert form not in told
