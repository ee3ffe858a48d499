"""What a site must not forget: attempts taken up, survivor sets released, the newest lists seen.

The ledger is written before the step that it guards: each method is one transaction, durable when it returns.
It is NOT the policy: it says what was, `policy.py` says what may be. It holds no secret of any session; those live in
memory only (DESIGN section 4).

Rules
1. (round, attempt) of a (federation, job) only grows: before step 0 `record_attempt`, which refuses anything else.
2. Plans are kept as received with their signatures, the refused ones too: two plans for one attempt prove equivocation.
3. A released survivor set is kept under the model's digest, whatever the coordinator calls the job; never deleted.
4. One U3 per session, ever.
5. One agent for each state directory, held by a lock that a killed process lets go of.

Errors: `StaleAttempt` when the coordinator offers what is not new; `StoreError` when the world failed; `RuntimeError`
when the caller broke a rule. Each changes nothing.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from types import TracebackType

from sqlalchemy import URL, Engine, func, select
from sqlalchemy.orm import Session

from maskwork.database import open_engine, world_failures
from maskwork.errors import StoreError
from maskwork.participant.migrations import MIGRATIONS, tables

DATABASE_NAME = "ledger.sqlite"
LOCK_NAME = "agent.lock"
REFUSED_PLANS_KEPT = 1000  # enough to prove anything, and a coordinator cannot fill the disk
_DIGEST_BYTES = 32


class StaleAttempt(Exception):
    """The coordinator offers a (round, attempt) that is not higher than one this site has taken up.

    Attributes:
        highest: The highest (round, attempt) on record.
    """

    def __init__(self, where: str, highest: tuple[int, int]) -> None:
        super().__init__(f"{where} is not higher than round {highest[0]}, attempt {highest[1]}, which is on record")
        self.highest = highest


@dataclass(frozen=True, slots=True)
class SignedPlan:
    """A plan as it was received.

    Attributes:
        federation: The federation.
        job: The job.
        round_number: From 1.
        attempt: From 1.
        session_id: SHA-256 session id of `plan_bytes`.
        plan_bytes: The plan.
        plan_signature: The coordinator's signature; the caller has verified it.
        at: When it was received, Unix time in seconds.
        refused_because: Why this site refused it; None if it was taken up.
    """

    federation: str
    job: str
    round_number: int
    attempt: int
    session_id: bytes
    plan_bytes: bytes
    plan_signature: bytes
    at: float
    refused_because: str | None = None


class Ledger:
    """A site's state directory. Use `Ledger.open`, and `close` it, or use it as a context manager."""

    def __init__(self, engine: Engine, *, file: Path, lock: int | None, refused_plans_kept: int) -> None:
        self._engine = engine
        self._reading_engine = engine.execution_options(maskwork_reading=True)
        self._file = str(file)
        self._lock = lock
        self._refused_plans_kept = refused_plans_kept

    @classmethod
    def open(
        cls, directory: str | Path, *, busy_timeout_s: float = 5.0, refused_plans_kept: int = REFUSED_PLANS_KEPT
    ) -> "Ledger":
        """Open the ledger in a state directory, creating or migrating it as needed.

        Args:
            directory: The agent's state directory; created for its user alone if missing.
            busy_timeout_s: How long a transaction waits for another one, in seconds.
            refused_plans_kept: Most refused plans kept for each federation.

        Raises:
            StoreError: It cannot be opened or written, another agent has it, it is damaged or of a newer schema.
        """
        directory = Path(directory).absolute()
        lock = _lock(directory)
        file = directory / DATABASE_NAME
        try:
            url = URL.create("sqlite", database=str(file))
            engine = open_engine(MIGRATIONS, url.render_as_string(hide_password=False), busy_timeout_s=busy_timeout_s)
        except BaseException:
            os.close(lock)
            raise
        return cls(engine, file=file, lock=lock, refused_plans_kept=refused_plans_kept)

    @classmethod
    def read(cls, directory: str | Path, *, busy_timeout_s: float = 5.0) -> "Ledger":
        """Open the ledger of a state directory to look into it; the agent may run meanwhile.

        Raises:
            StoreError: There is none, or it cannot be read.
        """
        file = Path(directory).absolute() / DATABASE_NAME
        with world_failures(str(file)):
            found = file.is_file()
        if not found:
            remedy = "Name the directory that `state` says in the participant's file; an agent makes it when it starts."
            raise StoreError("there is no ledger here", file=file, remedy=remedy)
        url = URL.create("sqlite", database=str(file))
        engine = open_engine(MIGRATIONS, url.render_as_string(hide_password=False), busy_timeout_s=busy_timeout_s)
        return cls(engine, file=file, lock=None, refused_plans_kept=0)

    def close(self) -> None:
        """Close the ledger and let another agent have the directory. Calling it again does nothing."""
        self._engine.dispose()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Attempts

    def highest_attempt(self, federation: str, job: str) -> tuple[int, int] | None:
        """The highest (round, attempt) taken up in a job, or None."""
        with self._reading() as session:
            return _highest(session, federation, job)

    def rounds_taken(self, federation: str, job: str) -> frozenset[int]:
        """The rounds of a job in which this site took up an attempt, whatever became of it."""
        table = tables.Attempt
        query = select(table.round_number).where(table.federation == federation, table.job == job).distinct()
        with self._reading() as session:
            return frozenset(session.scalars(query))

    def sessions_taken_up(self) -> frozenset[bytes]:
        """The sessions of every attempt taken up, in any federation."""
        with self._reading() as session:
            return frozenset(session.scalars(select(tables.Attempt.session_id)))

    def record_attempt(
        self,
        federation: str,
        job: str,
        round_number: int,
        *,
        attempt: int,
        session_id: bytes,
        plan_bytes: bytes,
        plan_signature: bytes,
        at: float,
    ) -> None:
        """Take up an attempt; call it before step 0.

        Args:
            federation: The federation.
            job: The job.
            round_number: From 1.
            attempt: From 1.
            session_id: SHA-256 session id of the plan.
            plan_bytes: The plan as received.
            plan_signature: Its verified signature.
            at: Unix time, seconds.

        Raises:
            StaleAttempt: If (round, attempt) is not higher than every one on record for (federation, job).
        """
        _check_digest(session_id, "session id")
        with self._writing() as session:
            highest = _highest(session, federation, job)
            if highest is not None and (round_number, attempt) <= highest:
                where = f"federation {federation}, job {job}: round {round_number}, attempt {attempt}"
                raise StaleAttempt(where, highest)
            session.add(
                tables.Attempt(
                    federation=federation,
                    job=job,
                    round_number=round_number,
                    attempt=attempt,
                    session_id=session_id,
                    plan_bytes=plan_bytes,
                    plan_signature=plan_signature,
                    at=at,
                )
            )

    def record_refused_plan(self, plan: SignedPlan) -> bool:
        """Keep a plan that was refused, once its signature has been verified.

        Returns:
            Whether it is kept: False if as many others of the federation are as may be, or it was itself taken up.

        Raises:
            RuntimeError: If it does not say why it was refused.
        """
        _check_digest(plan.session_id, "session id")
        if plan.refused_because is None:
            raise RuntimeError("a refused plan says why it was refused")
        refused, accepted = tables.RefusedPlan, tables.Attempt
        with self._writing() as session:
            if _find(session, refused, plan) is not None:
                return True
            kept = session.scalar(select(func.count()).where(refused.federation == plan.federation)) or 0
            if kept >= self._refused_plans_kept or _find(session, accepted, plan) is not None:
                return False
            session.add(
                refused(
                    federation=plan.federation,
                    job=plan.job,
                    round_number=plan.round_number,
                    attempt=plan.attempt,
                    session_id=plan.session_id,
                    plan_bytes=plan.plan_bytes,
                    plan_signature=plan.plan_signature,
                    why=plan.refused_because,
                    at=plan.at,
                )
            )
        return True

    def plans(self, federation: str) -> tuple[SignedPlan, ...]:
        """Every plan on record, taken up or refused, ordered by job, round, attempt; the one taken up comes first."""
        with self._reading() as session:
            taken = session.scalars(select(tables.Attempt).where(tables.Attempt.federation == federation)).all()
            refused = session.scalars(
                select(tables.RefusedPlan)
                .where(tables.RefusedPlan.federation == federation)
                .order_by(tables.RefusedPlan.position)
            ).all()
            found = [_plan(row, None) for row in taken] + [_plan(row, row.why) for row in refused]
        return tuple(sorted(found, key=_attempt_of))

    def federations(self) -> tuple[str, ...]:
        """The federations that any plan on record is of."""
        with self._reading() as session:
            found = [session.scalars(select(t.federation).distinct()) for t in (tables.Attempt, tables.RefusedPlan)]
            return tuple(sorted({name for names in found for name in names}))

    def equivocations(self, federation: str) -> tuple[tuple[SignedPlan, SignedPlan], ...]:
        """Pairs of different plans that the coordinator signed for one and the same attempt."""
        return tuple(
            pair
            for _, plans in groupby(self.plans(federation), key=_attempt_of)
            for pair in combinations(plans, 2)
            if pair[0].plan_bytes != pair[1].plan_bytes
        )

    # Releases

    def record_release(
        self,
        federation: str,
        job: str,
        model_digest: bytes,
        *,
        session_id: bytes,
        survivors: Sequence[str],
        at: float,
    ) -> None:
        """Record the survivor set of a session; call it before Unmask is sent. The same once more changes nothing.

        Args:
            federation: The federation.
            job: The job, as the coordinator calls it.
            model_digest: SHA-256 of the model that the session's updates are relative to.
            session_id: The session.
            survivors: U3, by participant id.
            at: Unix time, seconds.

        Raises:
            RuntimeError: If the session released another set or model before, or the set is empty or repeats a name.
        """
        _check_digest(model_digest, "model digest")
        _check_digest(session_id, "session id")
        names = frozenset(survivors)
        if not names or len(names) != len(survivors):
            raise RuntimeError("a survivor set is not empty and names nobody twice")
        table = tables.Release
        with self._writing() as session:
            earlier = session.scalar(
                select(table).where(table.federation == federation, table.session_id == session_id)
            )
            if earlier is None:
                session.add(
                    table(
                        federation=federation,
                        job=job,
                        model_digest=model_digest,
                        session_id=session_id,
                        survivors_json=json.dumps(sorted(names)),
                        at=at,
                    )
                )
            elif (earlier.job, earlier.model_digest, _survivors(earlier)) != (job, model_digest, names):
                raise RuntimeError(f"session {session_id.hex()}: it released another survivor set: one U3 per session")

    def releases(self, federation: str, model_digest: bytes) -> tuple[frozenset[str], ...]:
        """The distinct survivor sets released on a model, under whatever job, in order of release."""
        table = tables.Release
        query = (
            select(table)
            .where(table.federation == federation, table.model_digest == model_digest)
            .order_by(table.position)
        )
        with self._reading() as session:
            return tuple(dict.fromkeys(_survivors(row) for row in session.scalars(query)))

    def sessions_released(self) -> frozenset[bytes]:
        """The sessions of every survivor set released, in any federation."""
        with self._reading() as session:
            return frozenset(session.scalars(select(tables.Release.session_id)))

    # Marks

    def highest_revocation_number(self, federation: str) -> int | None:
        """The number of the newest revocation list seen, or None."""
        with self._reading() as session:
            mark = session.get(tables.Mark, federation)
            return None if mark is None else mark.revocation_number

    def record_revocation_number(self, federation: str, number: int) -> None:
        """Record that a revocation list was seen; the same number again changes nothing.

        Raises:
            RuntimeError: If a newer one is on record: the caller refuses the older list first.
        """
        with self._writing() as session:
            mark = _mark(session, federation)
            if mark.revocation_number is not None and number < mark.revocation_number:
                newest = mark.revocation_number
                raise RuntimeError(f"federation {federation}: revocation list {number} is older than {newest}")
            mark.revocation_number = number

    def last_audit_head(self, federation: str) -> bytes | None:
        """SHA-256 head of the coordinator's audit chain as last recorded, or None."""
        with self._reading() as session:
            mark = session.get(tables.Mark, federation)
            return None if mark is None else mark.audit_head

    def record_audit_head(self, federation: str, head: bytes) -> None:
        """Record the head of the coordinator's audit chain; the caller has checked that it extends the last one."""
        _check_digest(head, "audit head")
        with self._writing() as session:
            _mark(session, federation).audit_head = head

    # Transactions

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        if self._lock is None:
            raise RuntimeError("this ledger is closed, or was opened for reading")
        with world_failures(self._file), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with world_failures(self._file), Session(self._reading_engine) as session:
            yield session


def _highest(session: Session, federation: str, job: str) -> tuple[int, int] | None:
    table = tables.Attempt
    query = (
        select(table.round_number, table.attempt)
        .where(table.federation == federation, table.job == job)
        .order_by(table.round_number.desc(), table.attempt.desc())
        .limit(1)
    )
    row = session.execute(query).first()
    return None if row is None else (row.round_number, row.attempt)


def _find(session: Session, table: type[tables.Attempt] | type[tables.RefusedPlan], plan: SignedPlan) -> bytes | None:
    # The session id is the digest of the plan's bytes, so it stands for them.
    query = select(table.session_id).where(table.federation == plan.federation, table.session_id == plan.session_id)
    return session.scalar(query)


def _plan(row: tables.Attempt | tables.RefusedPlan, why: str | None) -> SignedPlan:
    return SignedPlan(
        federation=row.federation,
        job=row.job,
        round_number=row.round_number,
        attempt=row.attempt,
        session_id=row.session_id,
        plan_bytes=row.plan_bytes,
        plan_signature=row.plan_signature,
        at=row.at,
        refused_because=why,
    )


def _attempt_of(plan: SignedPlan) -> tuple[str, int, int]:
    return plan.job, plan.round_number, plan.attempt


def _mark(session: Session, federation: str) -> tables.Mark:
    mark = session.get(tables.Mark, federation)
    if mark is None:
        mark = tables.Mark(federation=federation)
        session.add(mark)
    return mark


def _survivors(row: tables.Release) -> frozenset[str]:
    return frozenset(str(name) for name in json.loads(row.survivors_json))


def _check_digest(digest: bytes, what: str) -> None:
    if len(digest) != _DIGEST_BYTES:
        raise RuntimeError(f"{what}: a SHA-256 has {_DIGEST_BYTES} bytes, this one has {len(digest)}")


def _lock(directory: Path) -> int:
    """Hold the directory while this process lives; a killed one lets go of it at once."""
    path = directory / LOCK_NAME
    with world_failures(str(path)):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as cause:
        os.close(lock)
        remedy = "Stop the other agent, or give this one a state directory of its own."
        raise StoreError("is in use by another agent", file=directory, remedy=remedy) from cause
    return lock
