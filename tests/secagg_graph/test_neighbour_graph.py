"""The two graphs: symmetric, regular, connected, reproducible from the seed; and the seed itself."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwork.secagg import graph
from maskwork.secagg.graph import (
    ABSENT_DIGEST,
    GraphError,
    GraphKind,
    NeighbourGraph,
    complete_graph,
    graph_seed,
    harary_graph,
)

SEEDS = st.binary(min_size=32, max_size=32)


@st.composite
def sparse_graphs(draw: st.DrawFn) -> NeighbourGraph:
    n = draw(st.integers(3, 60))
    degree = 2 * draw(st.integers(1, (n - 1) // 2))
    return harary_graph(n, degree, draw(SEEDS))


def reachable(made: NeighbourGraph, start: int) -> set[int]:
    seen, frontier = {start}, [start]
    while frontier:
        for node in made.neighbours(frontier.pop()):
            if node not in seen:
                seen.add(node)
                frontier.append(node)
    return seen


def slow_order(population: int, seed: bytes) -> tuple[int, ...]:
    """`harary_graph`'s permutation, written again from its docstring."""
    stream = b""
    for block in range(population):
        stream += hashlib.sha256(b"maskwork/v1/graph-order\x00" + seed + block.to_bytes(8, "big")).digest()
    words = [int.from_bytes(stream[i : i + 4], "big") for i in range(0, len(stream), 4)]
    order, used = list(range(population)), 0
    for i in range(population - 1, 0, -1):
        while words[used] >= 2**32 - (2**32 % (i + 1)):
            used += 1
        j = words[used] % (i + 1)
        used += 1
        order[i], order[j] = order[j], order[i]
    return tuple(order)


@given(made=sparse_graphs())
def test_a_harary_graph_is_symmetric_regular_and_connected(made: NeighbourGraph) -> None:
    everyone = [made.neighbours(i) for i in range(made.size)]
    for node, neighbours in enumerate(everyone):
        assert len(neighbours) == len(set(neighbours)) == made.degree
        assert list(neighbours) == sorted(neighbours)
        assert node not in neighbours
        assert all(node in everyone[other] for other in neighbours)
        assert made.holders(node) == neighbours
    assert reachable(made, 0) == set(range(made.size))
    assert made.kind is GraphKind.SPARSE


@given(made=sparse_graphs())
def test_neighbours_are_those_within_half_the_degree_on_the_ring(made: NeighbourGraph) -> None:
    for (p, node), (q, other) in itertools.combinations(enumerate(made.ring_order), 2):
        distance = min(q - p, made.size - (q - p))
        assert (other in made.neighbours(node)) == (distance <= made.degree // 2)


@settings(max_examples=50)
@given(n=st.integers(3, 300), seed=SEEDS)
def test_the_ring_order_is_the_specified_shuffle(n: int, seed: bytes) -> None:
    assert harary_graph(n, 2, seed).ring_order == slow_order(n, seed)


def test_incomplete_residues_are_thrown_away() -> None:
    # 2^32 mod 3 = 1: the single word 2^32 - 1 would favour residue 0.
    assert graph._below(3, iter([2**32 - 1, 5])) == 2
    assert graph._below(3, iter([2**32 - 2, 5])) == (2**32 - 2) % 3
    assert graph._below(4, iter([2**32 - 1])) == 3


def test_every_order_comes_up_about_equally_often() -> None:
    rounds = 4_800
    seen = Counter(harary_graph(4, 2, i.to_bytes(32, "big")).ring_order for i in range(rounds))
    assert len(seen) == 24
    # 200 expected for each, standard deviation 14: six of them either way.
    assert all(116 <= count <= 284 for count in seen.values())


def test_the_graph_follows_the_seed() -> None:
    one, two = bytes(32), bytes(31) + b"\x01"
    assert harary_graph(50, 6, one) == harary_graph(50, 6, one)
    assert harary_graph(50, 6, one) != harary_graph(50, 6, two)
    assert harary_graph(50, 6, one).neighbours(0) != harary_graph(50, 6, two).neighbours(0)


@given(n=st.integers(1, 40))
def test_the_complete_graph_has_everyone_for_neighbour_and_oneself_among_the_holders(n: int) -> None:
    made = complete_graph(n)
    assert (made.kind, made.size, made.degree) == (GraphKind.COMPLETE, n, n - 1)
    assert made.ring_order == tuple(range(n))
    for node in range(n):
        assert made.neighbours(node) == tuple(i for i in range(n) if i != node)
        assert made.holders(node) == tuple(range(n))


@pytest.mark.parametrize("made", [complete_graph(5), harary_graph(9, 4, bytes(32))])
@pytest.mark.parametrize("index", [-1, 9])
def test_a_node_that_is_not_there_is_refused(made: NeighbourGraph, index: int) -> None:
    with pytest.raises(GraphError, match=f"node {index}"):
        made.neighbours(index)
    with pytest.raises(GraphError, match=f"node {index}"):
        made.holders(index)


def test_arguments_from_which_no_graph_follows_are_refused() -> None:
    with pytest.raises(GraphError, match="needs nodes"):
        complete_graph(0)
    for degree in (0, 3, 10, -2):
        with pytest.raises(GraphError, match="degree"):
            harary_graph(10, degree, bytes(32))
    for population in (2, 1_000_001):
        with pytest.raises(GraphError, match="population"):
            harary_graph(population, 2, bytes(32))
    with pytest.raises(GraphError, match="32 bytes, not 31"):
        harary_graph(10, 2, bytes(31))


@pytest.mark.parametrize("order", [(0, 1, 1), (0, 1, 3), (0, 1, -1)])
def test_an_order_that_is_no_permutation_is_refused(order: tuple[int, ...]) -> None:
    with pytest.raises(GraphError, match="permutation"):
        NeighbourGraph(GraphKind.SPARSE, 2, order)


def test_a_complete_graph_of_another_degree_is_refused() -> None:
    with pytest.raises(GraphError, match="degree 4, not 2"):
        NeighbourGraph(GraphKind.COMPLETE, 2, tuple(range(5)))


def test_the_seed_is_the_hash_of_everything_in_roster_order() -> None:
    session, digests = b"s" * 32, [b"a" * 32, ABSENT_DIGEST, b"c" * 32]
    expected = hashlib.sha256(b"maskwork/v1/graph-seed\x00" + session + b"a" * 32 + bytes(32) + b"c" * 32).digest()
    assert graph_seed(session, digests) == expected
    assert graph_seed(session, digests[::-1]) != expected
    assert graph_seed(b"t" * 32, digests) != expected


def test_a_seed_of_misshapen_parts_is_refused() -> None:
    with pytest.raises(GraphError, match="session id"):
        graph_seed(b"s" * 31, [ABSENT_DIGEST])
    with pytest.raises(GraphError, match="digest 1 has 0 bytes"):
        graph_seed(b"s" * 32, [ABSENT_DIGEST, b""])
