"""Where a job stands between sessions, as pure functions: whom to ask, when, with which plan, and what an abort means.

`decide` says whether to open an attempt, to wait, or to give up; `build_plan` writes the plan; `after_abort` and
`after_commit` move on. A session itself is `maskwork.secagg.server`'s; clocks, streams and tables are the driver's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from maskwork.drop_texts import named
from maskwork.job import JobSpec
from maskwork.metrics import statistic_specs
from maskwork.secagg import graph as graphs
from maskwork.secagg.encoding import Encoding, preset
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.plan import (
    COMPLETE_GRAPH_LIMIT,
    GraphPlan,
    PrivacyParameters,
    RosterEntry,
    RoundPlan,
    StageDeadlines,
    sparse_parameters,
    survivors_digest,
)

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 15.0
FIRST_PUT_OFF_S = 1.0
LONGEST_PUT_OFF_S = 60.0
"""While this machine's disk is full nothing is lost by waiting, and each try costs every site a training."""
SAME_ANSWERS = 3
"""A round whose sites withdraw for the same reasons so many times again will not come out differently."""


@dataclass(frozen=True, slots=True)
class PresentSite:
    """A connected participant: its name, its certificate's fingerprint, the tasks it is configured for."""

    name: str
    fingerprint: bytes
    tasks: frozenset[str]


@dataclass(frozen=True, slots=True)
class JobRun:
    """A running job between two sessions.

    Attributes:
        job_id: the job, as plans name it.
        spec: what was submitted.
        round_number: the round being worked on.
        attempt: the number that the next attempt at it will have.
        model: digest of the model that the round starts from.
        parameters: length of its flat vector.
        previous_survivors: names of the survivors of the last committed round.
        excluded: sites left out until they connect anew, each with why.
        sitting_out: sites left out of this round alone, by their own policy, each with why.
        barred: sites convicted of dishonesty, left out of the rest of the job, each with why.
        failures: attempts at this round that came to nothing.
        not_before: time before which no attempt is opened, by the clock that never jumps.
        ready_since: since when the minimum cohort has been there, by the same clock.
        only: when unmasking was asked for on this model: the survivors, the one cohort that sites answer for again.
        settled: the sites that the last attempt was opened with; while they are all there, nobody else is waited for.
        put_offs: attempts put off in a row, since the storage here could not take them; they are no failures.
        rolled_back: rounds that were taken back because their models were damaged; their numbers are used up.
        taken_back: why the last of them were, until the next commit; empty if none were.
    """

    job_id: str
    spec: JobSpec
    round_number: int
    attempt: int
    model: bytes
    parameters: int
    previous_survivors: tuple[str, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)
    sitting_out: Mapping[str, str] = field(default_factory=dict)
    barred: Mapping[str, str] = field(default_factory=dict)
    failures: int = 0
    not_before: float = 0.0
    ready_since: float | None = None
    only: frozenset[str] = frozenset()
    settled: frozenset[str] = frozenset()
    last_abort: str = ""
    repeats: int = 0
    put_offs: int = 0
    rolled_back: int = 0
    taken_back: str = ""


@dataclass(frozen=True, slots=True)
class OpenAttempt:
    """Open an attempt with these sites, in roster order."""

    cohort: tuple[PresentSite, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before `until` (None: until a site connects); `why` is for people."""

    why: str
    until: float | None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The job cannot go on."""

    reason: str


Decision: TypeAlias = OpenAttempt | Wait | GiveUp


def decide(run: JobRun, present: Collection[PresentSite], *, now: float, rand: bytes) -> tuple[JobRun, Decision]:
    """What to do with a job now.

    Args:
        run: where it stands.
        present: every connected site.
        now: seconds by a clock that never jumps.
        rand: fresh bytes; they choose who takes part when more sites than wanted are there.
    """
    if run.failures >= run.spec.max_attempts or run.repeats >= SAME_ANSWERS:
        return run, GiveUp(_why_given_up(run))
    usable = _usable(run, present)
    cohort = run.spec.cohort
    if run.only:
        usable = [site for site in usable if site.name in run.only]
        missing = run.only - {site.name for site in usable}
        if missing:
            return replace(run, ready_since=None), Wait(_only_these(run, missing), None)
    if len(usable) < cohort.min_participants:
        return replace(run, ready_since=None), Wait(_shortage(run, present, usable), None)
    since = now if run.ready_since is None else run.ready_since
    waiting = replace(run, ready_since=since)
    if now < run.not_before:
        if run.put_offs:
            why = f"round {run.round_number} goes on by itself once the coordinator can store it: {run.last_abort}"
        else:
            why = f"retrying round {run.round_number} after {run.last_abort}"
        return waiting, Wait(why, run.not_before)
    names = {s.name for s in usable}
    settled = run.settled - _left_out(run).keys()
    complete = names in (set(cohort.participants), run.only) or (bool(settled) and settled <= names)
    if not complete and len(usable) < cohort.max_participants and now < since + cohort.wait_s:
        return waiting, Wait(f"{len(usable)} sites are ready; waiting for more", since + cohort.wait_s)
    chosen = sorted(usable, key=lambda s: hashlib.sha256(rand + s.name.encode()).digest())[: cohort.max_participants]
    opened = replace(waiting, settled=frozenset(s.name for s in chosen))
    return opened, OpenAttempt(tuple(sorted(chosen, key=lambda s: s.name)))


def after_abort(
    run: JobRun,
    *,
    reason: AbortReason,
    excluded: Mapping[str, str],
    barred: Mapping[str, str],
    now: float,
    sitting_out: Mapping[str, str] | None = None,
    drops: Mapping[str, str] | None = None,
    detail: str = "",
) -> JobRun:
    """The job after an attempt that came to nothing: a new attempt number, a pause that grows, the blamed left out.

    `drops` says why each site was dropped in it; an attempt that only repeats what sites said the last time counts
    towards `SAME_ANSWERS`. One that this machine's storage put an end to is no failure of anybody's, however often it
    happens: it is tried again, later and later, with `detail` as the reason.
    """
    if reason is AbortReason.STORAGE_FAILED:
        following = replace(
            run,
            attempt=run.attempt + 1,
            excluded={**run.excluded, **excluded},
            sitting_out={**run.sitting_out, **(sitting_out or {})},
        )
        return put_off(following, detail, now=now)
    why = "; ".join([reason.value, *(named(name, said) for name, said in sorted((drops or {}).items()))])
    full = AbortReason.STORAGE_FAILED.value  # a site's disk: what it answers changes when somebody mends it
    answered = bool(drops) and all(s.startswith("withdrew") and full not in s for s in (drops or {}).values())
    pause = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** min(run.failures, 20))
    return replace(
        run,
        attempt=run.attempt + 1,
        failures=run.failures + 1,
        not_before=now + pause,
        ready_since=None,
        excluded={**run.excluded, **excluded},
        sitting_out={**run.sitting_out, **(sitting_out or {})},
        barred={**run.barred, **barred},
        last_abort=why,
        repeats=run.repeats + 1 if answered and why == run.last_abort else 0,
        put_offs=0,
    )


def put_off(run: JobRun, why: str, *, now: float) -> JobRun:
    """The job when the storage here cannot take an attempt: looked at again after a pause that grows."""
    pause = min(LONGEST_PUT_OFF_S, FIRST_PUT_OFF_S * 2 ** min(run.put_offs, 20))
    return replace(run, put_offs=run.put_offs + 1, not_before=now + pause, ready_since=None, last_abort=why)


def after_commit(run: JobRun, *, model: bytes, survivors: tuple[str, ...]) -> JobRun | None:
    """The job at its next round; None when that was the last one."""
    if run.round_number >= run.spec.rounds + run.rolled_back:
        return None
    return replace(
        run,
        round_number=run.round_number + 1,
        attempt=1,
        model=model,
        previous_survivors=survivors,
        sitting_out={},
        only=frozenset(),
        failures=0,
        not_before=0.0,
        ready_since=None,
        last_abort="",
        repeats=0,
        put_offs=0,
        taken_back="",
    )


def repeat_only(run: JobRun, survivors: Collection[str]) -> JobRun:
    """The job when unmasking was asked for on its model with these survivors (none: never) and came to nothing.

    Sites answer again for that cohort alone. If a convicted dealer was among them that cohort is not to be had: then
    the others are asked, and each site's policy decides.
    """
    only = frozenset(survivors)
    return replace(run, only=frozenset() if only & run.barred.keys() else only)


def exclude(run: JobRun, sites: Mapping[str, str]) -> JobRun:
    """The job without some sites, each with why, until they connect anew."""
    return replace(run, excluded={**run.excluded, **sites})


def readmit(run: JobRun, site: str) -> JobRun:
    """A site that declined or was dropped is asked again after it has connected anew: its operator may have acted.

    One that was convicted is not: a dishonest dealer that reconnects would cost the job an attempt each time.
    """
    excluded, sitting_out = dict(run.excluded), dict(run.sitting_out)
    excluded.pop(site, None)
    sitting_out.pop(site, None)
    return replace(run, excluded=excluded, sitting_out=sitting_out)


def build_plan(
    run: JobRun,
    cohort: tuple[PresentSite, ...],
    *,
    federation: str,
    nonce: bytes,
    training_digest: bytes,
    revocation_digest: bytes = bytes(32),
    revocation_number: int = 0,
    audit_head: bytes = bytes(32),
) -> RoundPlan:
    """The plan of the next attempt.

    Args:
        run: the job.
        cohort: who takes part, in roster order.
        federation: its name.
        nonce: 16 fresh bytes.
        training_digest: SHA-256 of the training config's canonical JSON.
        revocation_digest: SHA-256 of the revocation list in force; zeros when there is none.
        revocation_number: its number; 0 when there is none.
        audit_head: head of the coordinator's audit chain.

    Raises:
        PlanError, EncodingParameterError, GraphError: the job asks for something that cannot be (too many bits for
            the cohort, a graph that no search finds).
    """
    spec = run.spec
    return RoundPlan(
        federation=federation,
        job=run.job_id,
        task=spec.task,
        round_number=run.round_number,
        rounds_total=spec.rounds + run.rolled_back,
        attempt=run.attempt,
        nonce=nonce,
        model_digest=run.model,
        parameters=run.parameters,
        training_digest=training_digest,
        roster=tuple(RosterEntry(s.name, s.fingerprint) for s in cohort),
        graph=_graph(spec, len(cohort)),
        min_survivors=spec.cohort.min_survivors,
        encoding=_encoding(spec, len(cohort)),
        statistics=statistic_specs(spec.metrics, spec.encoding.weight_cap),
        privacy=PrivacyParameters(),
        revocation_digest=revocation_digest,
        revocation_number=revocation_number,
        audit_head=audit_head,
        previous_survivors=survivors_digest(run.previous_survivors),
        deadlines=_deadlines(spec),
    )


def _usable(run: JobRun, present: Collection[PresentSite]) -> list[PresentSite]:
    wanted, left_out = set(run.spec.cohort.participants), _left_out(run)
    return [
        site
        for site in present
        if site.name not in left_out and run.spec.task in site.tasks and (not wanted or site.name in wanted)
    ]


def _left_out(run: JobRun) -> Mapping[str, str]:
    """Sites that are not asked now, each with why."""
    return {**run.sitting_out, **run.excluded, **run.barred}


def _shortage(run: JobRun, present: Collection[PresentSite], usable: list[PresentSite]) -> str:
    parts = [f"{len(usable)} of the {run.spec.cohort.min_participants} sites needed are ready"]
    without = sorted(s.name for s in present if run.spec.task not in s.tasks)
    if without:
        parts.append(f"not configured for task {run.spec.task}: {', '.join(without)}")
    parts.extend(named(name, why) for name, why in sorted(_left_out(run).items()))
    missing = sorted(set(run.spec.cohort.participants) - {s.name for s in present})
    if missing:
        parts.append(f"not connected: {', '.join(missing)}")
    return "; ".join(parts)


def _why_given_up(run: JobRun) -> str:
    if AbortReason.SAME_MODEL.value in run.last_abort:
        advice = "begin from another model (maskwork model init with another --seed), or with exactly the same sites"
    elif run.round_number > 1:
        advice = "a job that begins from the last committed model (maskwork model export) goes on from there"
    else:
        advice = "see to what is said here; the sites' and the coordinator's own logs say more"
    return f"round {run.round_number} failed {run.failures} times. The last time: {run.last_abort}. To go on: {advice}"


def _only_these(run: JobRun, missing: Collection[str]) -> str:
    why = run.taken_back or "unmasking was asked for and came to nothing"
    return (
        f"round {run.round_number}: {why}; on the same model sites answer only for the same survivors "
        f"({', '.join(sorted(run.only))}). Missing: {', '.join(sorted(missing))}. Start them again, and the job goes "
        f"on by itself. If they will not come back: {_another_model(run)}"
    )


def _another_model(run: JobRun) -> str:
    """What is possible without the sites that a model was answered on with, in commands."""
    end, anew = f"`maskwork job abort {run.job_id}`", "a new initial model (`maskwork model init` with another --seed)"
    if run.round_number == 1:
        return f"{end}, then submit a job with {anew}"
    return (
        f"{end}, then submit a job with {anew}, or with the model of an earlier round (`maskwork model export "
        f"{run.job_id} --round N --output FILE`) if the survivors of the round that followed it are all here "
        f"(`maskwork job show {run.job_id}`)"
    )


def _graph(spec: JobSpec, members: int) -> GraphPlan:
    if spec.cohort.graph == "complete" or members <= COMPLETE_GRAPH_LIMIT:
        threshold = graphs.complete_threshold(members)
        # As many colluders as the threshold bears (2t > n + c), but never so many that all others must survive.
        colluders = min(2 * threshold - members - 1, members - 2)
        return GraphPlan(GraphKind.COMPLETE, members - 1, threshold, colluders)
    corrupt, dropout = spec.cohort.corrupt_permille, spec.cohort.dropout_permille
    found = sparse_parameters(members, corrupt, dropout)
    colluders = 2 * found.threshold - found.degree - 1
    return GraphPlan(GraphKind.SPARSE, found.degree, found.threshold, colluders, corrupt, dropout)


def _encoding(spec: JobSpec, members: int) -> Encoding:
    chosen = preset(
        spec.encoding.preset,
        cohort=members,
        clip_norm=spec.encoding.clip_norm,
        weight_cap=spec.encoding.weight_cap,
    )
    if spec.encoding.value_bits is None:
        return chosen
    bits = spec.encoding.value_bits
    return replace(chosen, value_bits=bits, ring_bits=bits + math.ceil(math.log2(members)))


def _deadlines(spec: JobSpec) -> StageDeadlines:
    d = spec.deadlines
    return StageDeadlines(
        *(
            max(1, round(1000 * seconds))
            for seconds in (
                d.advertise_keys_s,
                d.share_keys_s,
                d.masked_update_s,
                d.consistency_check_s,
                d.unmask_s,
            )
        )
    )
