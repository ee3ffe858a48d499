"""What the records of a coordinator's log say about each other: is it a history that the protocol could have had? Pure.

A chain that is whole proves that nothing was changed since; it does not prove that what was written is so. Here plans
are decoded and their signatures verified, rosters are matched with certificates of the CA, the survivors' signatures
are counted against the threshold of every secret, and models are followed from round to round.

What remains the coordinator's word: statistics, times, why it dropped somebody, and that the model's digest is that of
the mean of what was uploaded. A site's log is judged by `site_contents`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.audit.examining import Contradiction, Examining, Steps
from maskwork.audit.lines import Entry
from maskwork.audit.records import (
    AttemptEnded,
    Certificate,
    Committed,
    Dropped,
    JobEnded,
    JobSubmitted,
    Opened,
    Operator,
    Plan,
    RolledBack,
    Survivors,
)
from maskwork.audit.verify import Chain, Problem
from maskwork.net.identity import Role, TrustRoots, VerifiedCertificate
from maskwork.secagg import graph as graphs
from maskwork.secagg import keys
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.messages import ConsistencyCheck, Members, MessageError, SurvivorSets, decode_members
from maskwork.secagg.plan import RoundPlan, neighbour_graph, session_id, survivors_digest
from maskwork.wire.errors import WireError
from maskwork.wire.plan_codec import decode_plan


@dataclass(slots=True)
class SessionFacts:
    """What a log says of one session, and what of that was found to hold.

    Attributes:
        plan_at: number of the plan's record.
        record: the plan's record.
        plan: the plan, decoded.
        certificates: of the roster, verified, by roster index.
        survivors: the record of the sets, once there is one.
        sets: those sets.
        signers: members whose signatures over the sets are good.
        committed: the commit's record, if it came to that.
        ended: the record of another end.
        drops: who was left out.
    """

    plan_at: int
    record: Plan
    plan: RoundPlan
    certificates: dict[int, VerifiedCertificate]
    survivors: Survivors | None = None
    sets: SurvivorSets | None = None
    signers: Members = frozenset()
    committed: Committed | None = None
    ended: AttemptEnded | None = None
    drops: list[Dropped] = field(default_factory=list)


@dataclass(slots=True)
class JobFacts:
    """What a log says of one job.

    Attributes:
        submitted: how it came in; None if that was before the log began.
        sessions: its attempts, in order.
        rolled_back: rounds taken back.
        ended: how it ended.
        operators: who asked for what.
        model: digest of the model that the next plan must name; None while that is not known.
        last: survivors of the last round that stands; None while that is not known.
        newest: highest (round, attempt).
    """

    submitted: JobSubmitted | None = None
    sessions: list[SessionFacts] = field(default_factory=list)
    rolled_back: list[RolledBack] = field(default_factory=list)
    ended: JobEnded | None = None
    operators: list[Operator] = field(default_factory=list)
    model: bytes | None = None
    last: tuple[str, ...] | None = None
    newest: tuple[int, int] = (0, 0)

    def standing(self) -> list[Committed]:
        """The commits that were not taken back, in order."""
        taken_back = {number for record in self.rolled_back for number in record.rounds}
        commits = [s.committed for s in self.sessions if s.committed is not None]
        return [commit for commit in commits if commit.round_number not in taken_back]


@dataclass(slots=True)
class Facts:
    """What a coordinator's log says.

    Attributes:
        jobs: by id.
        sessions: by session id.
        problems: records that contradict others, or whose signatures do not hold.
    """

    jobs: dict[str, JobFacts] = field(default_factory=dict)
    sessions: dict[bytes, SessionFacts] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def examine(chain: Chain, roots: TrustRoots) -> Facts:
    """Check what the records of a coordinator's log say. The chain should be whole: see `verify_chain`."""
    return _CoordinatorsLog(chain, roots).facts


def verified_sets(
    plan: RoundPlan, record: Survivors, public_keys: dict[int, ec.EllipticCurvePublicKey]
) -> tuple[SurvivorSets, Members]:
    """The sets of a record and the signers; every signature holds and there are enough for every secret.

    Raises:
        Contradiction: a set is not within the one before, too few survived, a signature is not good, or too few signed.
    """
    try:
        sets = SurvivorSets(*(decode_members(bitmap, plan.cohort) for bitmap in (record.u1, record.u2, record.u3)))
    except MessageError as error:
        raise Contradiction(str(error)) from None
    if not sets.u3 <= sets.u2 <= sets.u1:
        raise Contradiction("U3 ⊆ U2 ⊆ U1 does not hold")
    if len(sets.u3) < plan.survivor_floor:
        raise Contradiction(f"{len(sets.u3)} survivors where the plan asks for {plan.survivor_floor}")
    if frozenset(record.advertisements) != sets.u1:
        raise Contradiction("the advertisements are not those of U1")
    signers = verified_signers(plan, record.session, sets, record.signatures, public_keys)
    digests = [record.advertisements.get(i, graphs.ABSENT_DIGEST) for i in range(plan.cohort)]
    seed = graphs.graph_seed(record.session, digests) if plan.graph.kind is GraphKind.SPARSE else b""
    graph = neighbour_graph(plan, seed)
    for owner in sorted(sets.u2):
        found = sum(holder in signers for holder in graph.holders(owner))
        if found < plan.graph.threshold:
            name = plan.roster[owner].participant
            raise Contradiction(f"{found} holders of {name}'s secrets signed; t = {plan.graph.threshold} are needed")
    return sets, signers


def verified_signers(
    plan: RoundPlan,
    session: bytes,
    sets: SurvivorSets,
    signatures: dict[int, bytes],
    public_keys: dict[int, ec.EllipticCurvePublicKey],
) -> Members:
    """Who signed the sets; every one of them is a survivor and every signature holds.

    Raises:
        Contradiction: somebody else signed, or a signature is not over these sets.
    """
    for index, signature in signatures.items():
        if index not in sets.u3:
            raise Contradiction(f"member {index} signed and is not in U3")
        name = plan.roster[index].participant
        if index not in public_keys:
            raise Contradiction(f"the certificate of {name} is not in this log: its signature cannot be verified")
        signed = ConsistencyCheck.signed_bytes(sets, plan.cohort, session=session, sender=index)
        if not keys.verify_signature(public_keys[index], signature, signed):
            raise Contradiction(f"the signature of {name} is not over these sets")
    return frozenset(signatures)


def decoded_plan(record: Plan, federation: str, signers: list[ec.EllipticCurvePublicKey]) -> RoundPlan:
    """The plan of a record, if it is canonical, of this session and federation, and signed by one of these keys.

    Raises:
        Contradiction: it is not.
    """
    try:
        plan = decode_plan(record.plan)
    except WireError as error:
        raise Contradiction(str(error)) from None
    if session_id(record.plan) != record.session:
        raise Contradiction("the session id is not that of the plan")
    if plan.federation != federation:
        raise Contradiction(f"the plan is of the federation {plan.federation}, and the log of {federation}")
    signed = keys.signed_message("plan", session=record.session, sender=keys.COORDINATOR_INDEX, fields=b"")
    if not any(keys.verify_signature(key, record.signature, signed) for key in signers):
        raise Contradiction("the plan is not signed by the coordinator")
    return plan


class _CoordinatorsLog(Examining):
    """One pass over the records of a coordinator's log."""

    def __init__(self, chain: Chain, roots: TrustRoots) -> None:
        super().__init__(chain, roots)
        self.facts = Facts()
        steps: Steps = {
            Opened: self._opened,
            Certificate: self._certificate,
            JobSubmitted: self._submitted,
            Plan: self._plan,
            Dropped: self._dropped,
            Survivors: self._survivors,
            Committed: self._committed,
            AttemptEnded: self._attempt_ended,
            RolledBack: self._rolled_back,
            JobEnded: self._job_ended,
            Operator: self._operator,
        }
        self.go_through(steps, self.facts.problems)

    def _opened(self, entry: Entry) -> None:
        assert isinstance(entry.record, Opened)
        for job, (round_number, attempt) in entry.record.earlier.items():
            self.facts.jobs[job] = JobFacts(newest=(round_number, attempt - 1))

    def _certificate(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Certificate)
        self.verified(record, entry.at)

    def _submitted(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, JobSubmitted)
        self.facts.jobs[record.job] = JobFacts(submitted=record, model=record.model, last=())

    def _plan(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Plan)
        plan = decoded_plan(record, self.federation, [key for _, key in self.chain.owner_keys])
        at = record.audit_size
        if at > entry.index or at >= len(self.chain.heads) or self.chain.heads[at] != plan.audit_head:
            raise Contradiction(f"the plan names a head that this log did not have at {record.audit_size} records")
        job = self.facts.jobs.get(plan.job)
        if job is None:
            raise Contradiction(f"no record says that job {plan.job} was submitted")
        certificates = self._roster(plan)
        if (plan.round_number, plan.attempt) <= job.newest:
            raise Contradiction(f"round {plan.round_number}, attempt {plan.attempt} comes after {job.newest}")
        job.newest = (plan.round_number, plan.attempt)
        session = SessionFacts(entry.index, record, plan, certificates)
        job.sessions.append(session)
        self.facts.sessions[record.session] = session
        if job.model is not None and plan.model_digest != job.model:
            raise Contradiction(f"the plan begins from {plan.model_digest.hex()[:16]}…, not from the job's model")
        if job.last is not None and plan.previous_survivors != survivors_digest(job.last):
            raise Contradiction("the plan's previous survivors are not those of the last committed round")
        job.model = plan.model_digest

    def _roster(self, plan: RoundPlan) -> dict[int, VerifiedCertificate]:
        found = {}
        for index, member in enumerate(plan.roster):
            certificate = self.certificates.get(member.fingerprint)
            if certificate is None:
                raise Contradiction(f"the certificate of {member.participant} in the roster is not in this log")
            if (certificate.identity.role, certificate.name) != (Role.PARTICIPANT, member.participant):
                raise Contradiction(f"{member.participant} in the roster has the certificate of {certificate.identity}")
            found[index] = certificate
        return found

    def _session(self, session: bytes) -> SessionFacts:
        found = self.facts.sessions.get(session)
        if found is None:
            raise Contradiction(f"no plan of session {session.hex()[:16]}… comes before it")
        return found

    def _dropped(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Dropped)
        job = self.facts.jobs.get(record.job, JobFacts())
        at = (record.round_number, record.attempt)
        for session in job.sessions:
            if (session.plan.round_number, session.plan.attempt) == at:
                if record.participant not in {member.participant for member in session.plan.roster}:
                    raise Contradiction(f"{record.participant} was not in the roster")
                session.drops.append(record)
                return
        if job.newest < at:
            raise Contradiction("no plan of that attempt comes before it")

    def _survivors(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Survivors)
        session = self._session(record.session)
        public_keys = {index: certificate.public_key for index, certificate in session.certificates.items()}
        session.sets, session.signers = verified_sets(session.plan, record, public_keys)
        session.survivors = record

    def _committed(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Committed)
        session = self._session(record.session)
        plan, job = session.plan, self.facts.jobs[session.plan.job]
        session.committed = record
        if session.ended is not None:
            raise Contradiction("its attempt had ended before")
        if session.sets is None:
            raise Contradiction("nobody signed the survivors of this round")
        if (record.job, record.round_number, record.attempt) != (plan.job, plan.round_number, plan.attempt):
            raise Contradiction("it is not the round of its plan")
        if record.survivors != plan.participants(session.sets.u3):
            raise Contradiction("its survivors are not those that were signed")
        if record.model_in != plan.model_digest:
            raise Contradiction("it does not begin from the model of its plan")
        job.model, job.last = record.model_out, record.survivors

    def _attempt_ended(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, AttemptEnded)
        session = self.facts.sessions.get(record.session)
        if session is not None:
            session.ended = record
            if session.committed is not None:
                raise Contradiction("its round had been committed before")

    def _rolled_back(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, RolledBack)
        job = self.facts.jobs.get(record.job)
        if job is None:
            raise Contradiction(f"no record says that job {record.job} was submitted")
        before = {commit.round_number for commit in job.standing()}
        job.rolled_back.append(record)
        if job.submitted is not None:
            if not set(record.rounds) <= before:
                raise Contradiction("a round that was taken back had not been committed")
            standing = job.standing()
            if record.model != (standing[-1].model_out if standing else job.submitted.model):
                raise Contradiction("the job does not go on from the model of the last round that stands")
            job.last = standing[-1].survivors if standing else ()
        else:
            job.last = None
        job.model = record.model

    def _job_ended(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, JobEnded)
        if (job := self.facts.jobs.get(record.job)) is None:
            raise Contradiction(f"no record says that job {record.job} was submitted")
        job.ended = record

    def _operator(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Operator)
        if (job := self.facts.jobs.get(record.job)) is not None:
            job.operators.append(record)
