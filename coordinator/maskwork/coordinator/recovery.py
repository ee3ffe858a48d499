"""From what is on the disk to a job that goes on: after a restart, and when a model turns out to be damaged.

It reads the store and the models, rolls a job back to its newest intact model if it must, and restores the one session
that had asked for unmasking. It opens no attempt, sends nothing and knows nothing of streams: those are the driver's.

Rule: only a file that is missing, or whose bytes are not those of its name, rolls anything back. A disk that cannot be
read raises `StoreError` and changes nothing.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import structlog

from maskwork.coordinator import rounds
from maskwork.coordinator.models import ModelDamaged, ModelStore
from maskwork.coordinator.records import JobRecord, ResumeRecord
from maskwork.coordinator.rounds import JobRun
from maskwork.coordinator.session import public_keys
from maskwork.coordinator.store import Store
from maskwork.job import parse_spec
from maskwork.secagg import server
from maskwork.secagg.messages import Proposal
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.server_states import CollectingUnmask
from maskwork.tensors import ModelFileError, read_schema
from maskwork.wire import codec

log = structlog.get_logger("maskwork.coordinator")


class JobLost(Exception):
    """A job cannot go on; the text is its reason, for people."""


@dataclass(frozen=True, slots=True)
class RestoredSession:
    """A session that had asked for unmasking, as it was saved."""

    plan: RoundPlan
    state: CollectingUnmask
    certificates: tuple[bytes, ...]
    survivors: int


def run_of(record: JobRecord, *, store: Store, models: ModelStore) -> JobRun:
    """A running job as it stands, rolled back first if its model is damaged.

    Raises:
        JobLost: its spec cannot be read any more, or no model of it is intact.
        StoreError: the disk cannot be read, or the rollback cannot be written.
    """
    try:
        spec = parse_spec(record.spec_json.encode())
    except ValueError as error:
        raise JobLost(str(error)) from error
    record, taken_back = _on_an_intact_model(record, store, models)
    try:
        schema = read_schema(models.file(record.current_model))
    except ModelFileError as error:
        log.error("a model cannot be read", job=record.job_id, detail=str(error))
        said = str(error).removeprefix(f"{models.file(record.current_model)}: ")
        raise JobLost(f"model {record.current_model.hex()}: {said}") from error
    run = JobRun(
        record.job_id,
        spec,
        record.next_round,
        record.next_attempt,
        record.current_model,
        schema.size,
        store.last_survivors(record.job_id),
        settled=still_there(store, record.job_id),
        rolled_back=record.rolled_back,
        taken_back=taken_back,
    )
    return rounds.repeat_only(run, answered_on(store, record.job_id, record.current_model))


def answered_on(store: Store, job_id: str, model: bytes) -> tuple[str, ...]:
    """The survivors whose unmasking was asked for on a model; none if it never was."""
    sets = [released.survivors for released in store.releases(job_id) if released.base_model == model]
    return sets[-1] if sets else ()


def still_there(store: Store, job_id: str) -> frozenset[str]:
    """The sites of the last attempt without those that it lost: after a restart no other need be waited for."""
    attempts = store.attempts(job_id)
    if not attempts:
        return frozenset()
    last = attempts[-1]
    lost = {drop.participant for drop in store.drops(job_id, last.round_number) if drop.attempt == last.attempt}
    return frozenset(entry.participant for entry in codec.decode_plan(last.plan_bytes).roster) - lost


def restore(resume: ResumeRecord) -> RestoredSession:
    """The protocol's state of a session that was saved before Unmask."""
    transcript = codec.decode_transcript(resume.blob)
    plan = codec.decode_plan(transcript.plan_bytes)
    state = server.restore(
        Proposal(transcript.plan_bytes, transcript.plan_signature, plan),
        public_keys(transcript.certificates),
        advertised=transcript.advertised,
        dealings=transcript.dealings,
        u3=transcript.u3,
        signatures=transcript.signatures,
    )
    return RestoredSession(plan, state, transcript.certificates, len(transcript.u3))


def remove_all_but(sessions: Path, keep: str) -> None:
    """Delete the files of every session but one: nothing of them is used again."""
    for folder in sessions.iterdir():
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _on_an_intact_model(record: JobRecord, store: Store, models: ModelStore) -> tuple[JobRecord, str]:
    """The job as it is, or rolled back; and, when it was rolled back, why."""
    damage = _damage(models, record.current_model)
    if damage is None:
        before = store.rolled_back_rounds(record.job_id)
        # Until a round commits on it, the job still stands on the model that it was rolled back to.
        recent = bool(before) and before[-1].committed.round_number == record.next_round - 1
        return record, before[-1].reason if recent else ""
    committed = store.rounds(record.job_id)
    # What becomes the job's reason is for researchers: the model by its digest. Where it lies here is for our log.
    said = f"model {record.current_model.hex()} {damage.what}"
    log.error("a model is damaged", job=record.job_id, file=damage.file, detail=damage.what, remedy=damage.remedy)
    if not committed:
        raise JobLost(f"the initial model is not usable, and no round was committed: {said}. {_SUBMIT_AGAIN}")
    to_round = _newest_intact(models, [(r.round_number, r.model) for r in committed], record.initial_model)
    if to_round is None:
        raise JobLost(f"no model of this job is intact, from the initial one to the newest: {said}. {_SUBMIT_AGAIN}")
    reason = _told(committed[-1].round_number, to_round, said)
    store.roll_back(record.job_id, to_round=to_round, reason=reason)
    log.error("job rolled back", job=record.job_id, to_round=to_round, reason=reason)
    after = store.job(record.job_id)
    assert after is not None
    return after, reason


def _newest_intact(models: ModelStore, committed: list[tuple[int, bytes]], initial: bytes) -> int | None:
    candidates = reversed([(0, initial), *committed])
    return next((number for number, digest in candidates if _damage(models, digest) is None), None)


def _damage(models: ModelStore, digest: bytes) -> ModelDamaged | None:
    try:
        models.verify(digest)
    except ModelDamaged as damage:
        return damage
    return None


def _told(newest: int, to_round: int, damage: str) -> str:
    goes_on = f"the model of round {to_round}" if to_round else "the initial model"
    taken = f"round {newest}" if newest == to_round + 1 else f"rounds {to_round + 1} to {newest}"
    return f"{taken} rolled back to {goes_on}, the newest that is intact: {damage}"


_SUBMIT_AGAIN = (
    "Submit another job whose `model` is an export of yours, or a file from a backup of the models directory"
)
