"""Survivor sets that cut the ring: brute-force twins, what a cut does to the graph, and how often honest dropouts
are taken for one at the parameters of plans (semi-malicious, σ = 100).
"""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwork.secagg.graph import (
    GraphError,
    NeighbourGraph,
    ThreatModel,
    complete_graph,
    cuts_ring,
    find_parameters,
    harary_graph,
    parts_ring,
    window_bound,
    window_pair_bound,
)


@st.composite
def rings_and_survivors(draw: st.DrawFn) -> tuple[NeighbourGraph, frozenset[int]]:
    n = draw(st.integers(3, 24))
    made = harary_graph(n, 2 * draw(st.integers(1, (n - 1) // 2)), draw(st.binary(min_size=32, max_size=32)))
    return made, draw(st.frozensets(st.integers(0, n - 1)))


def runs(made: NeighbourGraph) -> list[frozenset[int]]:
    """The nodes of each run of k/2 ring positions, by its start."""
    n = made.size
    return [frozenset(made.ring_order[(p + i) % n] for i in range(made.degree // 2)) for p in range(n)]


def parted(made: NeighbourGraph, nodes: frozenset[int]) -> bool:
    """Whether the graph restricted to `nodes` falls apart."""
    if not nodes:
        return False
    seen, frontier = set(), [min(nodes)]
    while frontier:
        node = frontier.pop()
        seen.add(node)
        frontier.extend(other for other in made.neighbours(node) if other in nodes and other not in seen)
    return seen != nodes


@settings(max_examples=300, deadline=None)
@given(made_and_survivors=rings_and_survivors(), bound=st.integers(0, 12))
def test_both_rules_agree_with_brute_force(
    made_and_survivors: tuple[NeighbourGraph, frozenset[int]], bound: int
) -> None:
    made, survivors = made_and_survivors
    n, half, windows = made.size, made.degree // 2, runs(made)
    assert cuts_ring(made, survivors, bound) == any(len(run & survivors) <= bound for run in windows)
    assert parts_ring(made, survivors, bound) == any(
        len((windows[p] | windows[q]) & survivors) <= bound
        for p, q in combinations(range(n), 2)
        if half < q - p < n - half
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data(), made_and_survivors=rings_and_survivors())
def test_no_cut_of_the_honest_survivors_is_missed(
    data: st.DataObject, made_and_survivors: tuple[NeighbourGraph, frozenset[int]]
) -> None:
    made, survivors = made_and_survivors
    corrupt = data.draw(st.frozensets(st.integers(0, made.size - 1)))
    if parted(made, survivors - corrupt):
        most_in_a_run = max(len(run & corrupt) for run in runs(made))
        assert cuts_ring(made, survivors, most_in_a_run)
        most_in_two = max(len((one | other) & corrupt) for one, other in combinations(runs(made), 2))
        assert parts_ring(made, survivors, most_in_two)


def test_a_cut_that_parts_the_ring_is_found_and_a_single_run_parts_nothing() -> None:
    made = harary_graph(20, 6, bytes(32))
    ring = made.ring_order
    one_gap = frozenset(ring) - frozenset(ring[2:5])
    two_gaps = one_gap - frozenset(ring[10:13])
    assert (parted(made, one_gap), parted(made, two_gaps)) == (False, True)
    assert (cuts_ring(made, one_gap, 0), parts_ring(made, one_gap, 0)) == (True, False)
    assert (cuts_ring(made, two_gaps, 0), parts_ring(made, two_gaps, 0)) == (True, True)
    across_the_seam = frozenset(ring) - frozenset((ring[-1], ring[0], ring[1]))
    assert cuts_ring(made, across_the_seam, 0)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 6])
def test_nothing_cuts_the_complete_graph(n: int) -> None:
    assert not cuts_ring(complete_graph(n), [], n)
    assert not parts_ring(complete_graph(n), [], n)


@pytest.mark.parametrize("stranger", [-1, 20])
def test_a_survivor_that_is_no_node_is_refused(stranger: int) -> None:
    made = harary_graph(20, 6, bytes(32))
    with pytest.raises(GraphError, match=f"survivor {stranger}"):
        cuts_ring(made, [0, stranger], 1)
    with pytest.raises(GraphError, match=f"survivor {stranger}"):
        parts_ring(made, [0, stranger], 1)


def chance_at_most(population: int, survivors: int, drawn: int, bound: int) -> Fraction:
    low = sum(comb(survivors, x) * comb(population - survivors, drawn - x) for x in range(min(bound, drawn) + 1))
    return Fraction(low, comb(population, drawn))


@pytest.mark.parametrize("n", [129, 200, 500, 1_000, 10_000])
@pytest.mark.parametrize(("corrupt", "dropout"), [(5, 5), (10, 10), (5, 30), (10, 30)])
def test_how_often_the_planned_dropouts_are_taken_for_a_cut(n: int, corrupt: int, dropout: int) -> None:
    """Upper bounds, exact. One run: rare only where dropout is planned well above corruption. Two runs: always."""
    share = Fraction(corrupt, 100)
    found = find_parameters(
        n, corrupt=share, dropout=Fraction(dropout, 100), model=ThreatModel.SEMI_MALICIOUS, sigma=100
    )
    half, survivors = found.degree // 2, n - n * dropout // 100
    single = window_bound(n, corrupt=share, window=half, sigma=100)
    if dropout == 30:
        assert n * chance_at_most(n, survivors, half, single) < Fraction(1, 10**12)
    double = window_pair_bound(n, corrupt=share, window=half, sigma=100)
    assert Fraction(n * n, 2) * chance_at_most(n, survivors, 2 * half, double) < Fraction(1, 10**20)
