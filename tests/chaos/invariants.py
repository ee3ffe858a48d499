"""What must hold after a run, whatever was broken in it: pure functions from what was written to what is wrong with it.

Each returns sentences, none if all is well. `ALL` are those that need no model; `wrong_sums` reads the models. Each is
fed violations in `test_chaos_invariants`.

What does not count as a failure: attempts that came to nothing, sites that were dropped, rounds that took long, a job
that was submitted twice because the coordinator was killed while it answered. Rounds are compared by what is known of
each site's update alone, so nothing of what the processes computed is believed.
"""

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np
from tests.chaos.known_update import CLIP_NORM, WEIGHT_CAP, examples, known_loss, known_update, weighted_mean
from tests.chaos.written import Round, Written

from maskwork.secagg.encoding import preset
from maskwork.task import training_seed
from maskwork.tensors import Float32Array

COMMITTED: Final = "committed"
SECRET_WORDS: Final = re.compile(
    r"PRIVATE KEY|\b(?:mask_sk|enc_sk|b_u|self_seed|session_seed|share_value)\b\W{0,3}[=:]"
)
SEED: Final = 0
"""Of every site's configuration: the default."""


def rounds_out_of_order(written: Written) -> Iterator[str]:
    """Each job is complete, its rounds committed once each, in order, each on the model of the one before."""
    for job in written.jobs:
        rounds = [r for r in written.rounds if r.job == job.job]
        if job.state != "completed":
            yield f"job {job.job} is {job.state} ({job.reason})"
        if [r.round_number for r in rounds] != list(range(1, job.rounds_total + 1)):
            yield f"job {job.job}: the rounds are {[r.round_number for r in rounds]}, not 1 to {job.rounds_total}"
        if any(a.committed_at > b.committed_at for a, b in itertools.pairwise(rounds)):
            yield f"job {job.job}: a round was committed before the one before it"
        if rounds and job.current_model != rounds[-1].model:
            yield f"job {job.job}: its model is not that of its last round"


def commits_of_attempts(written: Written) -> Iterator[str]:
    """Each round has one committed attempt, the one that its row names, on the model of the round before."""
    bases = {(job.job, 1): job.initial_model for job in written.jobs}
    bases |= {(r.job, r.round_number + 1): r.model for r in written.rounds}
    by_round = {(r.job, r.round_number): r for r in written.rounds}
    committed: Counter[tuple[str, int]] = Counter()
    for attempt in written.attempts:
        where = f"job {attempt.job}, round {attempt.round_number}, attempt {attempt.attempt}"
        if not attempt.outcome:
            yield f"{where} never ended"
        if attempt.base_model != bases.get((attempt.job, attempt.round_number)):
            yield f"{where} began from another model than the round before ended with"
        if attempt.outcome == COMMITTED:
            committed[attempt.job, attempt.round_number] += 1
            row = by_round.get((attempt.job, attempt.round_number))
            if row is None or (row.session, row.attempt) != (attempt.session, attempt.attempt):
                yield f"{where} is committed, but its round was committed by another session"
    for key in by_round:
        if committed[key] != 1:
            yield f"job {key[0]}, round {key[1]} has {committed[key]} committed attempts"


def commits_said_twice(written: Written) -> Iterator[str]:
    """No log says twice of a round that it was committed, not even the logs of two processes."""
    said: Counter[tuple[str, str]] = Counter(
        (str(line["job"]), str(line["round"])) for _, line in _lines(written, "round committed")
    )
    for (job, number), count in said.items():
        if count > 1:
            yield f"job {job}, round {number} was said to be committed {count} times"


def damaged_models(written: Written) -> Iterator[str]:
    """Every model file hashes to its name, and every model that a row names is there."""
    for name, found in written.models.items():
        if name != found:
            yield f"the model file {name} has the digest {found}"
    for wanted in [*(job.initial_model for job in written.jobs), *(r.model for r in written.rounds)]:
        if wanted not in written.models:
            yield f"the committed model {wanted} is missing"


def attempts_that_do_not_grow(written: Written) -> Iterator[str]:
    """In each site's ledger (round, attempt) only grows within a job, and is one that the coordinator opened."""
    opened = {(a.job, a.round_number, a.attempt): a.session for a in written.attempts}
    for site, ledger in written.ledgers.items():
        highest: dict[str, tuple[int, int]] = {}
        for taken in ledger.taken_up:
            this = (taken.round_number, taken.attempt)
            if this <= highest.get(taken.job, (0, 0)):
                yield f"{site} took up {taken.job} {this} after {highest[taken.job]}"
            highest[taken.job] = this
            if opened.get((taken.job, *this)) != taken.session:
                yield f"{site} took up {taken.job} {this} in a session that the coordinator does not know"


def second_survivor_sets(written: Written) -> Iterator[str]:
    """On one model each site answered for one survivor set, which is what the coordinator asked for in that session."""
    asked = {released.session: released.survivors for released in written.asked}
    for site, ledger in written.ledgers.items():
        on_model: defaultdict[str, set[frozenset[str]]] = defaultdict(set)
        for released in ledger.released:
            on_model[released.base_model].add(released.survivors)
            if asked.get(released.session) != released.survivors:
                yield f"{site} answered in session {released.session} for a set that was not asked for"
            if site not in released.survivors:
                yield f"{site} answered in session {released.session} for a set without itself"
        for model, sets in on_model.items():
            if len(sets) > 1:
                yield f"{site} answered for {len(sets)} survivor sets on the model {model}"


def survivors_not_asked_for(written: Written) -> Iterator[str]:
    """A committed round's survivors are those that were asked for; at most one set was asked for on a model."""
    asked = {released.session: released.survivors for released in written.asked}
    for r in written.rounds:
        if asked.get(r.session) != frozenset(r.survivors):
            yield f"job {r.job}, round {r.round_number}: its survivors are not those of its session"
    on_model: defaultdict[str, set[frozenset[str]]] = defaultdict(set)
    for released in written.asked:
        on_model[released.base_model].add(released.survivors)
    for model, sets in on_model.items():
        if len(sets) > 1:
            yield f"{len(sets)} survivor sets were asked for on the model {model}"


def repeated_sessions(written: Written) -> Iterator[str]:
    """No session id and no plan's nonce twice."""
    for what, values in (
        ("session id", [a.session for a in written.attempts]),
        ("nonce", [a.nonce for a in written.attempts]),
    ):
        for value, count in Counter(values).items():
            if count > 1:
                yield f"the {what} {value} was used {count} times"


def work_done_twice(written: Written) -> Iterator[str]:
    """Between two plans that a site's process accepted it trained at most once."""
    for file, lines in written.logs.items():
        trained = 0
        for line in map(_parsed, lines):
            if line.get("event") == "plan accepted":
                trained = 0
            elif line.get("event") == "trained":
                trained += 1
                if trained > 1:
                    yield f"{file}: round {line.get('round')} was trained {trained} times for one plan"


def complaints(written: Written) -> Iterator[str]:
    """No traceback and no line that is none of our log lines."""
    for file, lines in written.logs.items():
        for line in lines:
            if "Traceback" in line:
                yield f"{file}: a traceback: {line[:300]}"
            elif not _parsed(line):
                yield f"{file}: a line that is no log line: {line[:300]}"


def told_secrets(written: Written) -> Iterator[str]:
    """No log holds a line of a private key or names a session's secret with a value."""
    for file, lines in written.logs.items():
        for number, line in enumerate(lines, 1):
            if SECRET_WORDS.search(line) or any(secret in line for secret in written.secrets):
                yield f"{file}, line {number} tells a secret"


def bad_ends(written: Written) -> Iterator[str]:
    """Every process was killed by the run or ended with 0 when asked, and left nothing behind."""
    for life in written.lives:
        if life.orphans:
            yield f"{life.service} (start {life.number}) left processes behind: {life.orphans}"
        if life.killed and life.code == -9:
            continue
        if life.code != 0 or life.killed:
            yield f"{life.service} (start {life.number}) ended by itself with {life.code}"


def audit_logs_that_do_not_tell(written: Written) -> Iterator[str]:
    """The coordinator's audit log verifies, also against every site's, and no site was shown two histories."""
    yield from written.audit


ALL: Final = (
    rounds_out_of_order,
    commits_of_attempts,
    commits_said_twice,
    damaged_models,
    attempts_that_do_not_grow,
    second_survivor_sets,
    survivors_not_asked_for,
    repeated_sessions,
    work_done_twice,
    complaints,
    told_secrets,
    bad_ends,
    audit_logs_that_do_not_tell,
)


def violations(written: Written) -> list[str]:
    """Everything that is wrong, without the sums."""
    return [wrong for check in ALL for wrong in check(written)]


def wrong_sums(written: Written, vector: Callable[[str], Float32Array]) -> Iterator[str]:
    """Each committed model is its base model and the weighted mean of its survivors' known updates.

    The number of examples names the survivors exactly (weights are powers of two), and so does the mean loss; a
    coordinate may be off by the rounding: less than one unit of each survivor, and what float32 adds to that.
    """
    bases = {a.session: a.base_model for a in written.attempts}
    rosters = {a.session: len(a.roster) for a in written.attempts}
    for r in written.rounds:
        where = f"job {r.job}, round {r.round_number}"
        base = vector(bases[r.session])
        seeds = {s: training_seed(SEED, job=r.job, round_number=r.round_number, participant=s) for s in r.survivors}
        total = sum(examples(site) for site in r.survivors)
        if r.statistics.get("examples") != total:
            yield f"{where}: {r.statistics.get('examples')} examples, the survivors have {total}"
        loss = sum(examples(site) * known_loss(seed) for site, seed in seeds.items()) / total
        if abs(r.statistics.get("train.loss", np.inf) - loss) > 1e-9:
            yield f"{where}: the mean loss is {r.statistics.get('train.loss')}, the survivors have {loss}"
        mean = weighted_mean([(examples(site), known_update(base, seed)) for site, seed in seeds.items()])
        off = float(np.abs(vector(r.model).astype(np.float64) - (base.astype(np.float64) + mean)).max())
        if off > tolerance(r, cohort=rosters[r.session], largest=float(np.abs(base).max())):
            yield f"{where}: the model is off by {off:g} from what its survivors make it"


def tolerance(r: Round, *, cohort: int, largest: float) -> float:
    encoding = preset("exact", cohort=cohort, clip_norm=CLIP_NORM, weight_cap=WEIGHT_CAP)
    unit = CLIP_NORM / encoding.scale * WEIGHT_CAP / sum(examples(site) for site in r.survivors)
    return len(r.survivors) * unit + 4 * float(np.spacing(np.float32(largest + 2e-3)))


def _lines(written: Written, event: str) -> Iterable[tuple[str, dict[str, object]]]:
    return (
        (f, line) for f, lines in written.logs.items() for line in map(_parsed, lines) if line.get("event") == event
    )


def _parsed(text: str) -> dict[str, object]:
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}
