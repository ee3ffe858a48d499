"""The round plan: everything both sides must agree on before a key is made, and the session id that binds it.

A plan that exists is well-formed: ranges, lengths, uniqueness and finiteness are checked on construction, the
thresholds and the encoding's head-room included. Whether a *site* accepts it is the policy's business, not ours.

The plan's bytes are made and parsed in ``maskwork.wire.codec``; a participant hashes the bytes that it received,
never bytes that it made itself, so two participants shown different plans are in different sessions.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction

from maskwork.secagg import graph
from maskwork.secagg.encoding import Encoding as Encoding
from maskwork.secagg.encoding import EncodingParameterError, check_capacity, check_statistics_capacity
from maskwork.secagg.errors import PlanError
from maskwork.secagg.graph import GraphKind, NeighbourGraph, ThreatModel, ThresholdError

SUITE = 1
"""X25519, HKDF-SHA256, AES-256-GCM, AES-128-CTR, ECDSA P-256 with SHA-256, Shamir over 2^256 + 297."""

SESSION_LABEL = b"maskwork/v1/session"
DIGEST_BYTES = 32
NONCE_BYTES = 16
MAX_ROSTER = 20_000
"""A plan travels as one control message; 20,000 roster entries are about 1.5 MB."""
MAX_PARAMETERS = 1 << 34
MAX_STATISTICS = 256
COMPLETE_GRAPH_LIMIT = 128
"""Above this many participants the sparse graph may be used (DESIGN section 4)."""
GRAPH_SIGMA = 100
GRAPH_ETA = 20

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")
_STATISTIC = re.compile(r"[a-z][a-z0-9_.]{0,63}")


class PrivacyMechanism(IntEnum):
    """Which differential-privacy mechanism a plan claims. Only NONE can be run so far; the rest is refused."""

    NONE = 0


@dataclass(frozen=True, slots=True)
class PrivacyParameters:
    """The privacy claim of a plan.

    Attributes:
        mechanism: NONE, or one that this version refuses.
        noise_multiplier: standard deviation of the noise in units of the clip norm; 0 without a mechanism.
        delta: the δ of the claimed (ε, δ); 0 without a mechanism.
        min_honest_survivors: the number of honest survivors the noise is provisioned for; 0 without one.
    """

    mechanism: PrivacyMechanism = PrivacyMechanism.NONE
    noise_multiplier: float = 0.0
    delta: float = 0.0
    min_honest_survivors: int = 0


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One member of a cohort: its name within the federation and the SHA-256 of its certificate's DER bytes."""

    participant: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class StatisticSpec:
    """A number that every participant adds to the masked statistics, and the bound on its absolute value."""

    name: str
    bound: float


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Who shares keys with whom, and how many shares open a secret.

    Attributes:
        kind: complete, or sparse (a Harary graph on a permuted ring).
        degree: neighbours of each member: n - 1 on the complete graph, even and smaller on the sparse one.
        threshold: shares that reconstruct a secret, and signatures that a participant wants to see (t).
        colluders: share holders of one secret that may collude with the coordinator (c); 2t > m + c.
        corrupt_permille: fraction of corrupt participants that the sparse graph's search assumed; 0 if complete.
        dropout_permille: the same for participants that vanish.
    """

    kind: GraphKind
    degree: int
    threshold: int
    colluders: int
    corrupt_permille: int = 0
    dropout_permille: int = 0

    @property
    def corrupt(self) -> Fraction:
        """The assumed corrupt fraction as an exact number."""
        return Fraction(self.corrupt_permille, 1000)

    @property
    def dropout(self) -> Fraction:
        """The assumed dropout fraction as an exact number."""
        return Fraction(self.dropout_permille, 1000)


@dataclass(frozen=True, slots=True)
class StageDeadlines:
    """How long the coordinator waits for each step, in milliseconds from the moment the step opens."""

    advertise_keys_ms: int
    share_keys_ms: int
    masked_update_ms: int
    consistency_check_ms: int
    unmask_ms: int


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """One attempt at one round. Field meanings follow docs/protocol.md, section "The plan".

    Raises:
        PlanError: on construction, naming the field, when anything is out of range or contradicts itself.
    """

    federation: str
    job: str
    task: str
    round_number: int
    rounds_total: int
    attempt: int
    nonce: bytes
    model_digest: bytes
    parameters: int
    training_digest: bytes
    roster: tuple[RosterEntry, ...]
    graph: GraphPlan
    min_survivors: int
    encoding: Encoding
    statistics: tuple[StatisticSpec, ...]
    privacy: PrivacyParameters
    revocation_digest: bytes
    revocation_number: int
    audit_head: bytes
    previous_survivors: bytes
    deadlines: StageDeadlines
    suite: int = SUITE

    def __post_init__(self) -> None:
        _check_names(self)
        _check_lengths(self)
        _check_roster(self)
        _check_graph(self)
        _check_encoding(self)
        _check_privacy(self)

    @property
    def cohort(self) -> int:
        """Number of participants in the roster (n)."""
        return len(self.roster)

    @property
    def survivor_floor(self) -> int:
        """The fewest survivors that the plan itself admits: max(plan, c + 2, 3)."""
        return max(self.min_survivors, self.graph.colluders + 2, 3)

    def index_of(self, participant: str, fingerprint: bytes) -> int | None:
        """Roster index of the member with this name *and* certificate, or None."""
        for index, entry in enumerate(self.roster):
            if entry.participant == participant and entry.fingerprint == fingerprint:
                return index
        return None

    def participants(self, members: frozenset[int]) -> tuple[str, ...]:
        """The names of some roster indices, in roster order."""
        return tuple(self.roster[i].participant for i in sorted(members))


def session_id(plan_bytes: bytes) -> bytes:
    """SHA-256 over the label and the plan's bytes as received: 32 bytes, bound into everything that follows."""
    return hashlib.sha256(SESSION_LABEL + plan_bytes).digest()


def survivors_digest(participants: tuple[str, ...]) -> bytes:
    """Digest of a survivor set by names, sorted; 32 zero bytes for the empty set (no round before)."""
    if not participants:
        return bytes(DIGEST_BYTES)
    digest = hashlib.sha256(b"maskwork/v1/survivors\0")
    for name in sorted(participants):
        digest.update(len(name).to_bytes(2, "big") + name.encode())
    return digest.digest()


def neighbour_graph(plan: RoundPlan, seed: bytes) -> NeighbourGraph:
    """The graph of a plan; `seed` (32 bytes, from `graph.graph_seed`) matters on the sparse graph only."""
    if plan.graph.kind is GraphKind.COMPLETE:
        return graph.complete_graph(plan.cohort)
    return graph.harary_graph(plan.cohort, plan.graph.degree, seed)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise PlanError(problem)


def _check_names(plan: RoundPlan) -> None:
    _require(plan.suite == SUITE, f"suite {plan.suite} is not known; this version speaks suite {SUITE}")
    for field in ("federation", "job", "task"):
        _require(_NAME.fullmatch(getattr(plan, field)) is not None, f"{field} is not a valid name")
    _require(1 <= plan.round_number <= plan.rounds_total <= 1_000_000, "round_number is not within 1..rounds_total")
    _require(1 <= plan.attempt <= 1_000_000_000, "attempt is out of range")


def _check_lengths(plan: RoundPlan) -> None:
    _require(len(plan.nonce) == NONCE_BYTES, f"nonce is not {NONCE_BYTES} bytes")
    for field in ("model_digest", "training_digest", "revocation_digest", "audit_head", "previous_survivors"):
        _require(len(getattr(plan, field)) == DIGEST_BYTES, f"{field} is not {DIGEST_BYTES} bytes")
    _require(1 <= plan.parameters <= MAX_PARAMETERS, "parameters is out of range")
    _require(0 <= plan.revocation_number < 1 << 63, "revocation_number is out of range")
    stages = plan.deadlines
    for field in StageDeadlines.__dataclass_fields__:
        _require(1 <= getattr(stages, field) <= 30 * 86_400_000, f"deadlines.{field} is not within 1 ms..30 days")


def _check_roster(plan: RoundPlan) -> None:
    _require(3 <= plan.cohort <= MAX_ROSTER, f"a roster of {plan.cohort} is not within 3..{MAX_ROSTER}")
    for entry in plan.roster:
        _require(_NAME.fullmatch(entry.participant) is not None, "a participant's id in the roster is not a valid name")
        _require(len(entry.fingerprint) == DIGEST_BYTES, f"fingerprint of {entry.participant} is not 32 bytes")
    _require(len({e.participant for e in plan.roster}) == plan.cohort, "the roster repeats a participant")
    _require(len({e.fingerprint for e in plan.roster}) == plan.cohort, "the roster repeats a certificate")


def _check_graph(plan: RoundPlan) -> None:
    g = plan.graph
    if g.kind is GraphKind.COMPLETE:
        _require(g.degree == plan.cohort - 1, f"degree {g.degree} is not n - 1 on the complete graph")
        _require(g.corrupt_permille == g.dropout_permille == 0, "the complete graph takes no corrupt/dropout fractions")
        holders = plan.cohort
    else:
        _require(plan.cohort > COMPLETE_GRAPH_LIMIT, f"a sparse graph needs more than {COMPLETE_GRAPH_LIMIT} members")
        _require(2 <= g.degree < plan.cohort and g.degree % 2 == 0, "a sparse graph's degree is even and below n")
        _require(
            0 < g.corrupt_permille < 500 and 0 < g.dropout_permille < 500, "corrupt/dropout fractions out of range"
        )
        _require(plan.cohort * g.corrupt_permille >= 1000, "corrupt_permille admits not even one corrupt member")
        holders = g.degree
    _require(g.colluders >= 0, "colluders is negative")
    try:
        graph.check_threshold(threshold=g.threshold, holders=holders, colluders=g.colluders, cohort=plan.cohort)
    except ThresholdError as error:
        raise PlanError(str(error)) from error
    if g.kind is GraphKind.SPARSE:
        try:
            found = sparse_parameters(plan.cohort, g.corrupt_permille, g.dropout_permille)
        except graph.GraphError as error:
            raise PlanError(str(error)) from error
        _require(
            (g.degree, g.threshold) == (found.degree, found.threshold),
            f"(k, t) = ({g.degree}, {g.threshold}) is not what the search gives: ({found.degree}, {found.threshold})",
        )
    _require(1 <= plan.min_survivors <= plan.cohort, "min_survivors is not within 1..n")
    _require(plan.survivor_floor <= plan.cohort, "fewer members than survivors required")


def sparse_parameters(cohort: int, corrupt_permille: int, dropout_permille: int) -> graph.GraphParameters:
    """(k, t) of a sparse plan: the semi-malicious search at σ = 100, η = 20 (DESIGN section 4)."""
    return graph.find_parameters(
        cohort,
        corrupt=Fraction(corrupt_permille, 1000),
        dropout=Fraction(dropout_permille, 1000),
        model=ThreatModel.SEMI_MALICIOUS,
        sigma=GRAPH_SIGMA,
        eta=GRAPH_ETA,
    )


def _check_encoding(plan: RoundPlan) -> None:
    names = [s.name for s in plan.statistics]
    _require(1 <= len(names) <= MAX_STATISTICS, f"{len(names)} statistics are not within 1..{MAX_STATISTICS}")
    _require(len(set(names)) == len(names), "the statistics repeat a name")
    _require(names[0] == "examples", "the first statistic is not the example count")
    for spec in plan.statistics:
        _require(_STATISTIC.fullmatch(spec.name) is not None, "a statistic's name is not valid")
        _require(math.isfinite(spec.bound) and spec.bound > 0, f"bound of {spec.name} is not a positive finite number")
    _require(plan.statistics[0].bound == plan.encoding.weight_cap, "the bound of examples is not the weight cap")
    try:
        check_capacity(plan.encoding, plan.cohort)
        check_statistics_capacity([s.bound for s in plan.statistics], plan.cohort)
    except EncodingParameterError as error:
        raise PlanError(str(error)) from error


def _check_privacy(plan: RoundPlan) -> None:
    p = plan.privacy
    _require(math.isfinite(p.noise_multiplier) and math.isfinite(p.delta), "a privacy parameter is not finite")
    if p.mechanism is PrivacyMechanism.NONE:
        _require(
            p.noise_multiplier == 0 and p.delta == 0 and p.min_honest_survivors == 0,
            "privacy parameters are set but no mechanism is",
        )
