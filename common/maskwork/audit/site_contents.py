"""What the records of a site's log say about each other: the plans it took up, the heads it kept, what it signed. Pure.

The site's log holds the coordinator's certificates, so the plans and heads that the coordinator signed are verified
from the CA's certificate and this log alone. What left the site is the site's own word: bytes and digests.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.audit import chain as chains
from maskwork.audit.chain import EMPTY_HEAD, SignedHead
from maskwork.audit.contents import decoded_plan, verified_signers
from maskwork.audit.examining import Contradiction, Examining, Steps
from maskwork.audit.lines import Entry
from maskwork.audit.records import (
    Certificate,
    HeadKept,
    HistoryAccepted,
    HistoryRefused,
    ModelReceived,
    Plan,
    PlanDeclined,
    Released,
    Sent,
    SessionEnded,
    SetsSigned,
)
from maskwork.audit.verify import Chain, Problem
from maskwork.net.identity import Role, TrustRoots
from maskwork.secagg import keys
from maskwork.secagg.messages import ConsistencyCheck, MessageError, SurvivorSets, decode_members
from maskwork.secagg.plan import RoundPlan


@dataclass(slots=True)
class SiteSession:
    """What a site's log says of one session."""

    plan_at: int
    plan: RoundPlan
    declined: PlanDeclined | None = None
    model: ModelReceived | None = None
    signed: SetsSigned | None = None
    released: Released | None = None
    sent: list[Sent] = field(default_factory=list)
    ended: SessionEnded | None = None


@dataclass(slots=True)
class SiteFacts:
    """What a site's log says.

    Attributes:
        sessions: by session id, those declined too.
        heads: every head kept, with the record's number.
        accepted: number of the last record by which the operator accepted another history; -1: none.
        refused: histories that the site refused, with the record's number.
        problems: records that contradict others, or whose signatures do not hold.
    """

    sessions: dict[bytes, SiteSession] = field(default_factory=dict)
    heads: list[tuple[int, HeadKept]] = field(default_factory=list)
    accepted: int = -1
    accepted_head: HistoryAccepted | None = None
    refused: list[tuple[int, HistoryRefused]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def examine_site(chain: Chain, roots: TrustRoots) -> SiteFacts:
    """Check what the records of a site's log say. The chain should be whole: see `verify_chain`."""
    return _SitesLog(chain, roots).facts


class _SitesLog(Examining):
    """One pass over the records of a site's log."""

    def __init__(self, chain: Chain, roots: TrustRoots) -> None:
        super().__init__(chain, roots)
        self.facts = SiteFacts()
        self._coordinators: list[ec.EllipticCurvePublicKey] = []
        self._kept: tuple[int, bytes] = (0, EMPTY_HEAD)
        steps: Steps = {
            Certificate: self._certificate,
            Plan: self._plan,
            PlanDeclined: self._declined,
            HeadKept: self._head,
            HistoryRefused: self._refused,
            HistoryAccepted: self._accepted,
            ModelReceived: self._model,
            SetsSigned: self._sets,
            Released: self._released,
            Sent: self._sent,
            SessionEnded: self._ended,
        }
        self.go_through(steps, self.facts.problems)

    def _certificate(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Certificate)
        verified = self.verified(record, entry.at)
        if verified.identity.role is Role.COORDINATOR:
            self._coordinators.append(verified.public_key)

    def _plan(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Plan)
        plan = decoded_plan(record, self.federation, self._coordinators)
        self.facts.sessions[record.session] = SiteSession(entry.index, plan)

    def _declined(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, PlanDeclined)
        shown = Plan(session=record.session, plan=record.plan, signature=record.signature, audit_size=0)
        plan = decoded_plan(shown, self.federation, self._coordinators)
        self.facts.sessions.setdefault(record.session, SiteSession(entry.index, plan)).declined = record

    def _head(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, HeadKept)
        self.facts.heads.append((entry.index, record))
        size, head = self._kept
        self._kept = (record.size, record.head)
        if record.size:  # a coordinator that keeps no log signs no head
            self._signed(SignedHead(record.size, record.head, record.signature))
        session = self.facts.sessions.get(record.session)
        if session is None or session.plan.audit_head != record.head:
            raise Contradiction("no signed plan before it names that head")
        if record.since != size:
            raise Contradiction(f"it extends a head of {record.since} records, and {size} was kept")
        if record.digests and chains.fold(head, size, record.digests) != record.head:
            raise Contradiction("the records shown do not lead to that head")

    def _signed(self, signed: SignedHead) -> None:
        if not any(chains.is_signed_by(signed, self.federation, key) for key in self._coordinators):
            raise Contradiction("the head is not signed by the coordinator")

    def _refused(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, HistoryRefused)
        self.facts.refused.append((entry.index, record))

    def _accepted(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, HistoryAccepted)
        self._kept = (record.size, record.head)
        self.facts.accepted, self.facts.accepted_head = entry.index, record

    def _session(self, session: bytes) -> SiteSession:
        found = self.facts.sessions.get(session)
        if found is None:
            raise Contradiction(f"no plan of session {session.hex()[:16]}… comes before it")
        return found

    def _model(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, ModelReceived)
        session = self._session(record.session)
        session.model = record
        if record.model != session.plan.model_digest:
            raise Contradiction("it is not the model of the plan")

    def _sets(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, SetsSigned)
        session = self._session(record.session)
        sets = decoded_sets(session.plan, record)
        index = next((i for i, m in enumerate(session.plan.roster) if m.participant == self._name), None)
        if index is None:
            raise Contradiction("this site is not in the roster")
        signed = ConsistencyCheck.signed_bytes(sets, session.plan.cohort, session=record.session, sender=index)
        own = [key for at, key in self.chain.owner_keys if at <= entry.index]
        if not any(keys.verify_signature(key, record.signature, signed) for key in own):
            raise Contradiction("the signature is not this site's, over these sets")
        session.signed = record

    @property
    def _name(self) -> str:
        return "" if self.chain.owner is None else self.chain.owner.name

    def _released(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Released)
        session = self._session(record.session)
        session.released = record
        if session.signed is None:
            raise Contradiction("this site signed no survivor sets in that session")
        sets, plan = decoded_sets(session.plan, session.signed), session.plan
        if frozenset(record.survivors) != frozenset(plan.participants(sets.u3)):
            raise Contradiction("the survivors are not those that this site signed")
        if record.model != plan.model_digest:
            raise Contradiction("it is not about the model of the plan")
        known = {i: self.certificates.get(member.fingerprint) for i, member in enumerate(plan.roster)}
        public_keys = {i: certificate.public_key for i, certificate in known.items() if certificate is not None}
        signers = verified_signers(plan, record.session, sets, record.signatures, public_keys)
        if len(signers) < plan.graph.threshold:
            raise Contradiction(f"{len(signers)} signatures were verified; t = {plan.graph.threshold} are needed")

    def _sent(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, Sent)
        self._session(record.session).sent.append(record)

    def _ended(self, entry: Entry) -> None:
        record = entry.record
        assert isinstance(record, SessionEnded)
        self._session(record.session).ended = record


def decoded_sets(plan: RoundPlan, record: SetsSigned) -> SurvivorSets:
    """The sets of a record.

    Raises:
        Contradiction: they are not of the plan's roster.
    """
    try:
        return SurvivorSets(*(decode_members(bitmap, plan.cohort) for bitmap in (record.u1, record.u2, record.u3)))
    except MessageError as error:
        raise Contradiction(str(error)) from None
