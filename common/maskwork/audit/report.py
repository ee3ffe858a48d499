"""What a compliance officer asks about a job, answered from logs: data for the page and for JSON. Pure.

Who took part, what left each site, under which parameters, which model came out; and each claim with how it was checked
just now and what came of it. Nothing is claimed that was not recomputed: what is only the coordinator's word is listed
as such.

It writes no file and no markup (`report_page` does), and judges nothing that `reading.judge` did not judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from maskwork.audit.contents import JobFacts, SessionFacts
from maskwork.audit.reading import Judged, SiteLog
from maskwork.audit.records import CertificateEvent, Committed
from maskwork.errors import UserError
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.ring import packed_size


class Outcome(StrEnum):
    """What came of checking a claim."""

    HOLDS = "holds"
    FAILS = "fails"
    UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Claim:
    """Something that the report says, how it was checked, and what came of it."""

    claim: str
    how: str
    outcome: Outcome
    found: str


@dataclass(frozen=True, slots=True)
class Member:
    """A participant of the job: its certificates, and how often it was in a roster and in a sum."""

    name: str
    fingerprints: tuple[str, ...]
    invited: int
    survived: int
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """A committed round."""

    round_number: int
    attempt: int
    session: str
    model_in: str
    model_out: str
    roster: tuple[str, ...]
    survivors: tuple[str, ...]
    dropouts: tuple[str, ...]
    signatures: int
    threshold: int
    statistics: Mapping[str, float]
    committed_at: float
    rolled_back: bool


@dataclass(frozen=True, slots=True)
class Left:
    """What left one site for the job, in bytes by kind of message; from the site's own log, or from the plans."""

    site: str
    source: str
    sessions: int
    bytes_by_kind: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class JobReport:
    """Everything that the page says; field by field what it shows."""

    federation: str
    job: str
    name: str
    task: str
    submitted_by: str
    state: str
    reason: str
    made_at: float
    log_owner: str
    log_records: int
    log_head: str
    initial_model: str
    final_model: str
    parameters: tuple[Mapping[str, str], ...]
    members: tuple[Member, ...]
    rounds: tuple[Round, ...]
    failed_attempts: tuple[str, ...]
    left: tuple[Left, ...]
    actions: tuple[str, ...]
    certificate_events: tuple[str, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    word_only: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


WORD_ONLY = (
    "that the statistics are those of the survivors: they are sums that only the coordinator unmasked",
    "that the new model is the old one with the mean of the survivors' updates: nobody else has the sum",
    "when things happened, and why a participant was left out: times and reasons are the coordinator's",
    "what a site left out of its own log: bytes and digests of what left it are that site's word",
)
"""What no log can show."""


def job_report(judged: Judged, wanted: str, *, now: float) -> JobReport:
    """The report of a job, by its id, its name or the beginning of its id.

    Raises:
        UserError: the log is not a coordinator's, or holds no such job, or several.
    """
    facts = judged.facts
    if facts is None or judged.chain.owner is None:
        raise UserError("a report is made from the coordinator's log: give a site's log with --site-log")
    job_id, job = _find(facts.jobs, wanted)
    standing = job.standing()
    first = job.submitted.model.hex() if job.submitted is not None else "(before this log began)"
    return JobReport(
        federation=judged.chain.owner.federation,
        job=job_id,
        name=job_id if job.submitted is None else job.submitted.name,
        task="" if job.submitted is None else job.submitted.task,
        submitted_by="" if job.submitted is None else job.submitted.submitted_by,
        state="running" if job.ended is None else job.ended.state,
        reason="" if job.ended is None else job.ended.reason,
        made_at=now,
        log_owner=judged.chain.owner.uri,
        log_records=judged.chain.size,
        log_head=judged.chain.heads[-1].hex(),
        initial_model=first,
        final_model=standing[-1].model_out.hex() if standing else first,
        parameters=_parameters(job),
        members=_members(job),
        rounds=tuple(_rounds(job, standing)),
        failed_attempts=tuple(_failed(job)),
        left=tuple(_left(job, job_id, judged.sites)),
        actions=tuple(_actions(job)),
        certificate_events=tuple(_certificate_events(judged)),
        claims=tuple(_claims(judged, job_id, job)),
        notes=tuple(judged.notes),
        problems=tuple(map(str, judged.problems)),
        word_only=WORD_ONLY,
    )


def _find(jobs: Mapping[str, JobFacts], wanted: str) -> tuple[str, JobFacts]:
    if wanted in jobs:
        return wanted, jobs[wanted]
    found = [
        (job_id, job)
        for job_id, job in jobs.items()
        if wanted and (job_id.startswith(wanted) or (job.submitted is not None and job.submitted.name == wanted))
    ]
    if len(found) == 1:
        return found[0]
    which = f"none of {len(jobs)}" if not found else ", ".join(job_id for job_id, _ in found[:5])
    raise UserError(f"{wanted!r} means {which} of the jobs in this log: give a job's id, its name or the beginning")


def _parameters(job: JobFacts) -> tuple[Mapping[str, str], ...]:
    """Each set of parameters that plans of the job had, with the rounds that it was for."""
    sets: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for session in job.sessions:
        sets.setdefault(tuple(_parameters_of(session.plan).items()), []).append(session.plan.round_number)
    return tuple(
        {"rounds": ", ".join(map(str, sorted(set(rounds)))), **dict(parameters)} for parameters, rounds in sets.items()
    )


def _parameters_of(plan: RoundPlan) -> dict[str, str]:
    g, e = plan.graph, plan.encoding
    kind = "complete" if g.kind is GraphKind.COMPLETE else f"sparse, {g.degree} neighbours each"
    return {
        "members of the roster": str(plan.cohort),
        "graph": kind,
        "shares that open a secret (t)": str(g.threshold),
        "colluding holders tolerated (c)": str(g.colluders),
        "fewest survivors": str(plan.survivor_floor),
        "parameters of the model": str(plan.parameters),
        "clip norm": f"{e.clip_norm:g}",
        "most examples that a site counts for": str(e.weight_cap),
        "bits of a value, of the ring": f"{e.value_bits}, {e.ring_bits}",
        "privacy mechanism": f"{plan.privacy.mechanism.name.lower()} beyond masking",
        "revocation list": str(plan.revocation_number) if plan.revocation_number else "none",
    }


def _members(job: JobFacts) -> tuple[Member, ...]:
    fingerprints: dict[str, dict[str, None]] = {}
    invited: dict[str, int] = {}
    survived: dict[str, int] = {}
    out: dict[str, list[str]] = {}
    for session in job.sessions:
        for entry in session.plan.roster:
            fingerprints.setdefault(entry.participant, {})[entry.fingerprint.hex()] = None
            invited[entry.participant] = invited.get(entry.participant, 0) + 1
        for name in () if session.committed is None else session.committed.survivors:
            survived[name] = survived.get(name, 0) + 1
        for drop in session.drops:
            where = f"round {drop.round_number}, attempt {drop.attempt}, {drop.stage}"
            out.setdefault(drop.participant, []).append(f"{where}: {drop.reason} ({drop.detail})")
    return tuple(
        Member(name, tuple(fingerprints[name]), invited[name], survived.get(name, 0), tuple(out.get(name, ())))
        for name in sorted(fingerprints)
    )


def _rounds(job: JobFacts, standing: list[Committed]) -> Iterator[Round]:
    kept = {commit.session for commit in standing}
    for session in job.sessions:
        commit, plan = session.committed, session.plan
        if commit is not None:
            yield Round(
                round_number=plan.round_number,
                attempt=plan.attempt,
                session=commit.session.hex(),
                model_in=commit.model_in.hex(),
                model_out=commit.model_out.hex(),
                roster=tuple(entry.participant for entry in plan.roster),
                survivors=commit.survivors,
                dropouts=commit.dropouts,
                signatures=len(session.signers),
                threshold=plan.graph.threshold,
                statistics=dict(commit.statistics),
                committed_at=commit.committed_at,
                rolled_back=commit.session not in kept,
            )


def _failed(job: JobFacts) -> Iterator[str]:
    for session in job.sessions:
        if session.committed is None:
            how = "still open" if session.ended is None else f"{session.ended.outcome}: {session.ended.reason}"
            asked = "unmasking had been asked for" if session.sets is not None else "no share was asked for"
            yield f"round {session.plan.round_number}, attempt {session.plan.attempt}: {how} ({asked})"


def _left(job: JobFacts, job_id: str, sites: list[SiteLog]) -> Iterator[Left]:
    logs = {site.name: site for site in sites}
    names = sorted({entry.participant for session in job.sessions for entry in session.plan.roster})
    for name in names:
        if name in logs:
            yield _left_by_log(name, job_id, logs[name])
        else:
            yield _left_by_plan(name, job)


def _left_by_log(name: str, job_id: str, site: SiteLog) -> Left:
    total: dict[str, int] = {}
    sessions = [s for s in site.facts.sessions.values() if s.plan.job == job_id]
    for sent in (sent for session in sessions for sent in session.sent):
        total[sent.what] = total.get(sent.what, 0) + sent.bytes
    return Left(name, "the site's own log, each message with its SHA-256", len(sessions), total)


def _left_by_plan(name: str, job: JobFacts) -> Left:
    summed = [s for s in job.sessions if s.committed is not None and name in s.committed.survivors]
    update = sum(packed_size(s.plan.parameters, s.plan.encoding.ring_bits) for s in summed)
    statistics = sum(8 * len(s.plan.statistics) for s in summed)
    source = "the plans: no log of this site was given; the masked upload of each round it survived"
    return Left(name, source, len(summed), {"update": update, "statistics": statistics} if summed else {})


def _actions(job: JobFacts) -> Iterator[str]:
    for done in job.operators:
        about = f", round {done.round_number}" if done.round_number else ""
        model = f", model {done.model.hex()[:16]}…" if done.model else ""
        yield f"{done.action} by {done.by}{about}{model}, certificate {done.fingerprint.hex()[:16]}…"


def _certificate_events(judged: Judged) -> Iterator[str]:
    for entry in judged.chain.entries:
        record = entry.record
        if isinstance(record, CertificateEvent):
            number = "" if record.number is None else f" list {record.number}"
            yield f"{record.event}{number} {record.subject} {record.fingerprint.hex()[:16]} {record.detail}".strip()


# --- claims ---------------------------------------------------------------------------------------------------------


def _claims(judged: Judged, job_id: str, job: JobFacts) -> Iterator[Claim]:
    chain, sessions = judged.chain, job.sessions
    summed = [session for session in sessions if session.survivors is not None]
    yield _claim(
        "No record of the coordinator's log was altered, removed, moved or inserted.",
        f"{chain.size} heads recomputed and {chain.size} signatures of {_owner(judged)} verified",
        [str(problem) for problem in chain.problems],
    )
    yield _against(judged)
    yield _claim(
        "Every plan was signed by the coordinator, and names a head of this very log.",
        f"{len(sessions)} plans decoded, their signatures verified, their heads looked up in the chain",
        _problems(judged, sessions, "plan"),
    )
    yield _claim(
        "Everybody in a roster held a participant's certificate of the federation's CA.",
        f"{len({e.fingerprint for s in sessions for e in s.plan.roster})} certificates verified against the CA",
        [*_problems_of_kind(judged, "certificate"), *_without_certificates(sessions)],
    )
    yield _claim(
        "A sum was unmasked only after enough holders of every secret had signed who is in it.",
        f"{sum(len(s.signers) for s in summed)} signatures of {len(summed)} survivor sets verified, counted against t",
        [*_problems_of_kind(judged, "survivors"), *_unsigned(sessions)],
    )
    yield _same_model(sessions)
    yield _claim(
        "Each round began from the model of the last one that stands, and from its survivors.",
        f"{len(job.standing())} rounds followed from the initial model, digest by digest",
        [*_problems_of_kind(judged, "committed"), *_problems_of_kind(judged, "rolled-back")],
    )
    for site in judged.sites:
        yield _site_claim(judged, job_id, job, site)


def _claim(claim: str, how: str, wrong: list[str]) -> Claim:
    if wrong:
        return Claim(claim, how, Outcome.FAILS, "; ".join(wrong[:3]) + ("; …" if len(wrong) > 3 else ""))
    return Claim(claim, how, Outcome.HOLDS, "")


def _owner(judged: Judged) -> str:
    return "its owner" if judged.chain.owner is None else judged.chain.owner.uri


def _against(judged: Judged) -> Claim:
    claim = "Nothing was cut off at the end of the log, and the history was not written anew."
    holding = [site for site in judged.sites if site.facts.heads]
    if judged.chain.problems or not holding:
        why = "the log itself is broken" if judged.chain.problems else "no site's log that holds a head was given"
        return Claim(claim, "compared with heads that sites hold", Outcome.UNCHECKED, why)
    heads, names = sum(len(site.facts.heads) for site in holding), ", ".join(site.name for site in holding)
    how = f"{heads} signed heads held by {names} looked up in the chain"
    return _claim(claim, how, [str(problem) for problem in judged.problems if problem.by_head])


def _problems_of_kind(judged: Judged, kind: str) -> list[str]:
    found = [] if judged.facts is None else judged.facts.problems
    return [str(problem) for problem in found if problem.kind == kind]


def _problems(judged: Judged, sessions: list[SessionFacts], kind: str) -> list[str]:
    return _problems_of_kind(judged, kind) or ([] if sessions else ["there is no plan of this job"])


def _without_certificates(sessions: list[SessionFacts]) -> list[str]:
    return [
        f"round {s.plan.round_number}: {s.plan.cohort - len(s.certificates)} members without a certificate"
        for s in sessions
        if len(s.certificates) != s.plan.cohort
    ]


def _unsigned(sessions: list[SessionFacts]) -> list[str]:
    return [
        f"round {s.plan.round_number}, attempt {s.plan.attempt} committed without signed survivors"
        for s in sessions
        if s.committed is not None and s.sets is None
    ]


def _same_model(sessions: list[SessionFacts]) -> Claim:
    sets: dict[bytes, set[tuple[str, ...]]] = {}
    for session in sessions:
        if session.sets is not None:
            names = session.plan.participants(session.sets.u3)
            sets.setdefault(session.plan.model_digest, set()).add(names)
    wrong = [
        f"on model {model.hex()[:16]}… {len(found)} different survivor sets were answered for"
        for model, found in sets.items()
        if len(found) > 1
    ]
    how = f"survivor sets compared on each of {len(sets)} models; sites whose policy allows a difference permit more"
    return _claim(
        "On one model only one set of survivors was ever unmasked, so no difference shows a site.", how, wrong
    )


def _site_claim(judged: Judged, job_id: str, job: JobFacts, site: SiteLog) -> Claim:
    mine = {session.record.session for session in job.sessions}
    theirs = {session for session, seen in site.facts.sessions.items() if seen.plan.job == job_id}
    released = sum(seen.released is not None for key, seen in site.facts.sessions.items() if key in mine)
    how = (
        f"{len(mine & theirs)} plans and {released} releases in the log of {site.name} compared with the coordinator's"
    )
    claim = f"{site.name} saw the same plans, and helped to unmask the same survivors."
    if judged.chain.problems:
        return Claim(claim, how, Outcome.UNCHECKED, "the coordinator's log itself is broken")
    return _claim(claim, how, [str(problem) for problem in judged.problems if problem.log == site.name])
