"""Who shares keys with whom: the neighbour graph, its parameters (k, t), thresholds, and cuts of the ring.

Two graphs: the complete one, on which every participant holds shares of every secret (its own included), and a
Harary graph over a randomly permuted ring, on which a participant's holders are its k neighbours.

It is NOT a place for policy (which graph a site accepts, how many colluders it wants tolerated), and it never
chooses a seed: the permutation follows from the session and from everybody's advertisements (`graph_seed`).

Rules:
1. Nothing is decided in floating point. Probabilities are ratios of integers, compared by cross-multiplication.
2. Everything is a function of its arguments, so that two implementations find the same graph.

Sources: Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead", CCS 2020, section 3 (good graphs) and section 4 (semi-malicious server); the formulae of the parameter
search, including how σ is split over the two bad events, are those of ``fcp/secagg/server/
graph_parameter_finder.cc`` in google-parfait/federated-compute. Bonawitz et al., CCS 2017, for 2t > m + c.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

SEED_BYTES = 32
DIGEST_BYTES = 32
ABSENT_DIGEST = bytes(DIGEST_BYTES)
"""What a roster member that never advertised contributes to `graph_seed`."""
MAX_POPULATION = 1_000_000
MIN_COHORT = 3
"""With two participants each would read the other's update off the sum."""

_SEED_LABEL = b"maskwork/v1/graph-seed\0"
_ORDER_LABEL = b"maskwork/v1/graph-order\0"
_FEASIBLE = Fraction(9, 10)


class GraphError(ValueError):
    """Arguments from which no graph, or no (k, t), follows."""


class ThresholdError(ValueError):
    """A threshold under which the protocol would be unsafe, or could never finish."""


class GraphKind(StrEnum):
    """The two neighbour graphs."""

    COMPLETE = "complete"
    SPARSE = "sparse"


class ThreatModel(StrEnum):
    """What the coordinator is assumed to do, in the words of Bell et al."""

    SEMI_HONEST = "semi-honest"
    """It follows the protocol and colludes with the corrupt participants."""
    SEMI_MALICIOUS = "semi-malicious"
    """It is honest while the graph is made; later it may tell different participants different survivor sets."""


@dataclass(frozen=True, slots=True)
class GraphParameters:
    """The degree k of a Harary graph and the threshold t of the secrets shared among its k neighbours."""

    degree: int
    threshold: int


class _TailQuantile:
    """The smallest q with Pr[X > q] < bound for X ~ Hypergeometric(population, marked, k), as k grows from 0 by one.

    All quantities are integers over the common denominator ``falling = population·(population-1)···`` (k factors),
    the number of ordered samples. One more draw changes both terms by small factors:

        at(k+1, q)      = at(k, q) · (k+1)(unmarked - k + q) / (k+1-q)
        at(k+1, q+1)    = at(k, q) · (k+1)(marked - q) / (q+1)
        above(k+1, q)   = above(k, q) · (population - k) + at(k, q) · (marked - q)

    and q never has to grow by more than one (one more draw marks at most one more), so the search is exact and
    each step costs a few multiplications of a long integer by a short one.
    """

    def __init__(self, population: int, marked: int, inverse_bound: int) -> None:
        self._population = population
        self._marked = marked
        self._inverse_bound = inverse_bound
        self._drawn = 0
        self._at = 1  # ordered samples with exactly `quantile` marked
        self._above = 0  # ordered samples with more
        self.quantile = 0

    def draw(self, falling: int) -> None:
        """Go from k to k + 1 draws; `falling` is the number of ordered samples of k + 1."""
        k, q, marked = self._drawn, self.quantile, self._marked
        above = self._above * (self._population - k) + self._at * (marked - q)
        if above * self._inverse_bound < falling:
            self._at = self._at * ((k + 1) * (self._population - marked - k + q)) // (k + 1 - q)
            self._above = above
        else:
            self._at = self._at * ((k + 1) * (marked - q)) // (q + 1)
            self._above = above - self._at
            self.quantile = q + 1
        self._drawn = k + 1


def find_parameters(
    population: int,
    *,
    corrupt: Fraction,
    dropout: Fraction,
    model: ThreatModel,
    sigma: int = 40,
    eta: int = 20,
) -> GraphParameters:
    """The smallest even degree k, with its smallest threshold t, that the published search admits.

    With M = ⌊corrupt·n⌋ corrupt nodes, D = ⌊dropout·n⌋ dropouts and B = M + D, a degree k passes when

    1. ``n(n-k-1)/2 · B!(n-k)! / (n!(B-k)!) < 2^-(σ+1)``: no two runs of k/2 ring positions are all corrupt or gone
       (union bound over pairs of runs), so the honest survivors stay connected;
    2. t ≥ t1 + 1, where t1 is the smallest with ``Pr[corrupt neighbours > t1] < 2^-(σ+1)/n``; for the semi-malicious
       model 2t > k + t1, so that no secret gives up both kinds of share;
    3. t ≤ t2, the greatest with ``Pr[surviving neighbours < t2] < 2^-η/n``; and t ≥ 2.

    Where condition 2 would do with t = 1, condition 3 is asked of t = 2; the published code asks it of t = 1, which
    makes a difference in its two tabulated rows with n = 10 and 33 % dropout, semi-honest.

    Args:
        population: number of participants n, 3 to 1,000,000.
        corrupt: fraction of them that may collude with the coordinator, in [0, 1).
        dropout: fraction that may vanish, in [0, 1).
        model: which coordinator.
        sigma: security failures have probability below 2^-sigma in a session.
        eta: failures to finish have probability below 2^-eta in a session.

    Raises:
        GraphError: an argument is out of range, corrupt + dropout (semi-malicious: corrupt + 2·dropout) exceeds 0.9,
            or no degree below n - 1 passes.
    """
    _check_search(population, corrupt, dropout, model)
    if sigma < 1 or eta < 1:
        raise GraphError(f"sigma = {sigma} and eta = {eta} must both be at least 1")
    return _search(
        population, math.floor(corrupt * population), math.floor(dropout * population), model, sigma=sigma, eta=eta
    )


def _check_search(population: int, corrupt: Fraction, dropout: Fraction, model: ThreatModel) -> None:
    if not MIN_COHORT <= population <= MAX_POPULATION:
        raise GraphError(f"a population of {population} is not within {MIN_COHORT}..{MAX_POPULATION}")
    if not (0 <= corrupt < 1 and 0 <= dropout < 1):
        raise GraphError(f"corrupt = {corrupt} and dropout = {dropout} must both be in [0, 1)")
    weight = 2 if model is ThreatModel.SEMI_MALICIOUS else 1
    if corrupt + weight * dropout > _FEASIBLE:
        raise GraphError(
            f"corrupt + {weight}·dropout = {corrupt + weight * dropout} exceeds {_FEASIBLE}: "
            "no threshold separates colluders from survivors; lower one of them"
        )


@lru_cache(maxsize=256)  # each participant of a process, and each parse of a plan, asks for the same few values
def _search(
    population: int, corrupt: int, dropouts: int, model: ThreatModel, *, sigma: int, eta: int
) -> GraphParameters:
    n = population
    falling = 1  # n!/(n-k)!
    bad_falling = 1  # B!/(B-k)!
    connected = False
    corrupt_neighbours = _TailQuantile(n, corrupt, n << (sigma + 1))
    lost_neighbours = _TailQuantile(n, dropouts, n << eta)
    for k in range(1, n - 1):
        falling *= n - k + 1
        corrupt_neighbours.draw(falling)
        lost_neighbours.draw(falling)
        if not connected:  # the bound only falls as k grows, so it is not looked at again
            bad_falling *= max(corrupt + dropouts - k + 1, 0)
            connected = (n * (n - k - 1) * bad_falling) << sigma < falling
        if k % 2 or not connected:
            continue
        t1, t2 = corrupt_neighbours.quantile, k - lost_neighbours.quantile
        least = (k + t1) // 2 + 1 if model is ThreatModel.SEMI_MALICIOUS else t1 + 1
        threshold = max(least, 2)
        if threshold <= t2:
            return GraphParameters(degree=k, threshold=threshold)
    raise GraphError(
        f"no degree below {n - 1} is safe for {n} participants with {corrupt} corrupt and {dropouts} dropouts "
        f"at sigma = {sigma}, eta = {eta} ({model.value}); use the complete graph or lower the fractions"
    )


def complete_threshold(population: int) -> int:
    """The threshold on the complete graph, ⌊2n/3⌋ + 1.

    Raises:
        ThresholdError: fewer than 3 participants.
    """
    if population < MIN_COHORT:
        raise ThresholdError(f"a cohort of {population} is smaller than {MIN_COHORT}")
    return 2 * population // 3 + 1


def check_threshold(*, threshold: int, holders: int, colluders: int, cohort: int) -> None:
    """Refuse a threshold t that is unsafe for m share holders of one secret, c of them colluding.

    With ``2t > m + c`` any two sets of t holders share an honest one, and an honest holder answers for one survivor
    set only: the coordinator cannot collect t shares of both of a participant's secrets.

    Raises:
        ThresholdError: cohort < 3, t < 1, c < 0, t > m or 2t ≤ m + c; the message says which.
    """
    if cohort < MIN_COHORT:
        raise ThresholdError(f"cohort = {cohort} is smaller than {MIN_COHORT}: the sum would give away its terms")
    if threshold < 1:
        raise ThresholdError(f"threshold t = {threshold} is smaller than 1")
    if colluders < 0:
        raise ThresholdError(f"colluders c = {colluders} is negative")
    if threshold > holders:
        raise ThresholdError(f"t = {threshold} exceeds the m = {holders} share holders: nothing could be reconstructed")
    if 2 * threshold <= holders + colluders:
        raise ThresholdError(
            f"2t = {2 * threshold} is not greater than m + c = {holders} + {colluders}: "
            "both shares of one participant could be collected"
        )


@dataclass(frozen=True, slots=True)
class NeighbourGraph:
    """An undirected regular graph over roster indices 0..n-1. Made by `complete_graph` and `harary_graph`.

    Attributes:
        kind: complete, or sparse (a Harary graph).
        degree: neighbours of each node: n - 1, or the even k of the Harary graph.
        ring_order: roster index at each ring position; the identity on the complete graph.

    Raises:
        GraphError: on construction, when `ring_order` is not a permutation or the degree does not fit the kind.
    """

    kind: GraphKind
    degree: int
    ring_order: tuple[int, ...] = field(repr=False)
    _position: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = len(self.ring_order)
        position = [-1] * n
        for place, node in enumerate(self.ring_order):
            if not 0 <= node < n or position[node] != -1:
                raise GraphError("the ring order is not a permutation of the roster indices")
            position[node] = place
        if self.kind is GraphKind.COMPLETE and self.degree != n - 1:
            raise GraphError(f"a complete graph of {n} nodes has degree {n - 1}, not {self.degree}")
        if self.kind is GraphKind.SPARSE and (self.degree % 2 or not 2 <= self.degree < n):
            raise GraphError(f"degree {self.degree} of a Harary graph of {n} nodes is not even and within 2..{n - 1}")
        object.__setattr__(self, "_position", tuple(position))

    @property
    def size(self) -> int:
        """Number of nodes n."""
        return len(self.ring_order)

    def neighbours(self, index: int) -> tuple[int, ...]:
        """N(u): the neighbours of a node, ascending, without the node itself.

        Raises:
            GraphError: no such node.
        """
        n = self.size
        if not 0 <= index < n:
            raise GraphError(f"node {index} is not within 0..{n - 1}")
        if self.kind is GraphKind.COMPLETE:
            return tuple(range(index)) + tuple(range(index + 1, n))
        place, half = self._position[index], self.degree // 2
        order = self.ring_order
        return tuple(sorted(order[(place + step) % n] for step in range(-half, half + 1) if step))

    def holders(self, index: int) -> tuple[int, ...]:
        """Who holds shares of a node's secrets, ascending: everyone on the complete graph (m = n), else N(u) (m = k).

        Raises:
            GraphError: no such node.
        """
        if self.kind is GraphKind.SPARSE:
            return self.neighbours(index)
        if not 0 <= index < self.size:
            raise GraphError(f"node {index} is not within 0..{self.size - 1}")
        return self.ring_order


def complete_graph(population: int) -> NeighbourGraph:
    """The graph on which everyone is everyone's neighbour.

    Raises:
        GraphError: `population` is not positive.
    """
    if population < 1:
        raise GraphError(f"a graph needs nodes, not {population}")
    return NeighbourGraph(GraphKind.COMPLETE, population - 1, tuple(range(population)))


def harary_graph(population: int, degree: int, seed: bytes) -> NeighbourGraph:
    r"""The Harary graph: nodes on a permuted ring, each adjacent to the degree/2 next ones on either side.

    The permutation is Durstenfeld's form of the Fisher–Yates shuffle: starting from ring_order = 0, 1, …, n-1, for
    i = n-1 down to 1 draw j uniformly from 0..i and swap entries i and j. Random 32-bit words come from
    ``SHA-256("maskwork/v1/graph-order\0" ‖ seed ‖ block)``, block = 0, 1, 2, … as 8 bytes big-endian; each digest
    gives eight words, big-endian, first bytes first. To draw from 0..i take the next word w; if
    w ≥ 2^32 - (2^32 mod (i+1)) throw it away and take the next one; then j = w mod (i+1).

    Args:
        population: number of nodes n, 3 to 1,000,000.
        degree: k, even, 2 ≤ k < n.
        seed: 32 bytes, public, from `graph_seed`.

    Raises:
        GraphError: an argument is out of range.
    """
    if len(seed) != SEED_BYTES:
        raise GraphError(f"a graph seed has {SEED_BYTES} bytes, not {len(seed)}")
    if not MIN_COHORT <= population <= MAX_POPULATION:
        raise GraphError(f"a population of {population} is not within {MIN_COHORT}..{MAX_POPULATION}")
    words = _words(seed)
    order = list(range(population))
    for i in range(population - 1, 0, -1):
        j = _below(i + 1, words)
        order[i], order[j] = order[j], order[i]
    return NeighbourGraph(GraphKind.SPARSE, degree, tuple(order))


def _words(seed: bytes) -> Iterator[int]:
    """The 32-bit words that `harary_graph` specifies, without end."""
    prefix = hashlib.sha256(_ORDER_LABEL + seed)
    block = 0
    while True:
        state = prefix.copy()
        state.update(block.to_bytes(8, "big"))
        digest = state.digest()
        for start in range(0, len(digest), 4):
            yield int.from_bytes(digest[start : start + 4], "big")
        block += 1


def _below(limit: int, words: Iterator[int]) -> int:
    """A uniform number in 0..limit-1: words from the incomplete last run of residues are thrown away."""
    bound = (1 << 32) - (1 << 32) % limit
    word = next(words)
    while word >= bound:
        word = next(words)
    return word % limit


def graph_seed(session_id: bytes, advertisement_digests: Sequence[bytes]) -> bytes:
    """The seed of a session's ring: SHA-256 over label, session id and every member's advertisement; 32 bytes.

    Args:
        session_id: 32 bytes.
        advertisement_digests: one for each roster entry, in roster order, 32 bytes each; `ABSENT_DIGEST` for a member
            that did not advertise.

    Raises:
        GraphError: a wrong length.
    """
    if len(session_id) != DIGEST_BYTES:
        raise GraphError(f"a session id has {DIGEST_BYTES} bytes, not {len(session_id)}")
    for index, digest in enumerate(advertisement_digests):
        if len(digest) != DIGEST_BYTES:
            raise GraphError(f"advertisement digest {index} has {len(digest)} bytes, not {DIGEST_BYTES}")
    return hashlib.sha256(_SEED_LABEL + session_id + b"".join(advertisement_digests)).digest()


def window_bound(population: int, *, corrupt: Fraction, window: int, sigma: int) -> int:
    """The most corrupt nodes that any run of `window` ring positions holds, but for probability 2^-sigma.

    The smallest w with ``n · Pr[Hypergeometric(n, ⌊corrupt·n⌋, window) > w] ≤ 2^-sigma``: a union bound over the n
    runs of a uniformly permuted ring.

    Raises:
        GraphError: an argument is out of range.
    """
    _check_window(population, corrupt, window, sigma)
    return _tail_bound(population, math.floor(corrupt * population), window, events=population << sigma)


def window_pair_bound(population: int, *, corrupt: Fraction, window: int, sigma: int) -> int:
    """The most corrupt nodes that any two separate runs hold together, but for probability 2^-sigma.

    The smallest w with ``n(n-2·window-1)/2 · Pr[Hypergeometric(n, ⌊corrupt·n⌋, 2·window) > w] ≤ 2^-sigma``, over the
    pairs of runs of `window` positions with a position or more between them on either side; 0 when there is none.

    Raises:
        GraphError: an argument is out of range.
    """
    _check_window(population, corrupt, window, sigma)
    pairs = population * (population - 2 * window - 1) // 2
    if pairs <= 0:
        return 0
    return _tail_bound(population, math.floor(corrupt * population), 2 * window, events=pairs << sigma)


def _check_window(population: int, corrupt: Fraction, window: int, sigma: int) -> None:
    if not 1 <= window <= population <= MAX_POPULATION or not 0 <= corrupt < 1 or sigma < 0:
        raise GraphError(f"window = {window}, n = {population}, corrupt = {corrupt}, sigma = {sigma}: out of range")


@lru_cache(maxsize=256)
def _tail_bound(population: int, marked: int, drawn: int, *, events: int) -> int:
    """The smallest w with events · Pr[Hypergeometric(population, marked, drawn) > w] ≤ 1, from the top down."""
    unmarked = population - marked
    bound = min(drawn, marked)
    allowed = math.comb(population, drawn)
    at = math.comb(marked, bound) * math.comb(unmarked, drawn - bound)  # samples with exactly `bound` marked
    above = 0  # samples with more
    while bound > 0 and events * (above + at) <= allowed:
        above += at
        at = at * (bound * (unmarked - drawn + bound)) // ((marked - bound + 1) * (drawn - bound + 1))
        bound -= 1
    return bound


def cuts_ring(graph: NeighbourGraph, survivors: Collection[int], bound: int) -> bool:
    """Whether some k/2 consecutive ring positions hold no more than `bound` survivors.

    Such a run may be all corrupt or gone; two of them part the honest survivors into groups whose sums the
    coordinator could read separately. Always False on the complete graph, which nothing cuts.

    Args:
        graph: the session's graph.
        survivors: roster indices in U3.
        bound: from `window_bound` with window = k/2.

    Raises:
        GraphError: a survivor is not a node of the graph.
    """
    return graph.kind is GraphKind.SPARSE and min(_survivors_in_runs(graph, survivors)) <= bound


def parts_ring(graph: NeighbourGraph, survivors: Collection[int], bound: int) -> bool:
    """Whether two separate runs of k/2 ring positions together hold no more than `bound` survivors.

    Exactly what parting the honest survivors takes: unless the corrupt nodes beat `window_pair_bound`, every U3 that
    parts them is found. Unlike `cuts_ring` it seldom finds anything else, because honest dropouts would have to
    empty two runs at once. Always False on the complete graph.

    Args:
        graph: the session's graph.
        survivors: roster indices in U3.
        bound: from `window_pair_bound` with window = k/2.

    Raises:
        GraphError: a survivor is not a node of the graph.
    """
    n, apart = graph.size, graph.degree // 2 + 1
    if graph.kind is GraphKind.COMPLETE or n < 2 * apart:
        return False
    held = _survivors_in_runs(graph, survivors)
    partner = _cyclic_minima(held, n - 2 * apart + 1)  # a run at p goes with those at p + apart .. p + n - apart
    return any(count + partner[(place + apart) % n] <= bound for place, count in enumerate(held))


def _survivors_in_runs(graph: NeighbourGraph, survivors: Collection[int]) -> list[int]:
    """For each ring position, how many survivors the k/2 positions from there on hold."""
    present = [0] * graph.size
    for node in survivors:
        if not 0 <= node < graph.size:
            raise GraphError(f"survivor {node} is not within 0..{graph.size - 1}")
        present[node] = 1
    around = [present[node] for node in graph.ring_order]
    window = graph.degree // 2
    running = list(accumulate(around + around[: window - 1], initial=0))
    return [high - low for low, high in zip(running, running[window:], strict=False)]


def _cyclic_minima(values: Sequence[int], length: int) -> list[int]:
    """The minimum of each cyclic run of `length` values, by its start; linear time with a queue of rising values."""
    n = len(values)
    rising: deque[int] = deque()  # positions, counted on past n; the first one holds the minimum of the run
    minima = []
    for end in range(n + length - 1):
        while rising and values[rising[-1] % n] >= values[end % n]:
            rising.pop()
        rising.append(end)
        if rising[0] <= end - length:
            rising.popleft()
        if end >= length - 1:
            minima.append(values[rising[0] % n])
    return minima
