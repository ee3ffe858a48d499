"""The published cases of tests/vectors/v1/graph.json: byte for byte what the generator writes, and each one holds."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tests.vectors.generate_graph_sharing import FOLDER, documents

from maskwork.secagg import graph

Case = dict[str, Any]
ERRORS = {"GraphError": graph.GraphError, "ThresholdError": graph.ThresholdError}


def cases(section: str) -> list[Case]:
    text = Path(FOLDER / "graph.json").read_text(encoding="utf-8")
    found: list[Case] = json.loads(text)[section]
    return found


def good_and_bad(section: str) -> tuple[list[Case], list[Case]]:
    everything = cases(section)
    good, bad = [c for c in everything if "error" not in c], [c for c in everything if "error" in c]
    assert good
    assert bad
    return good, bad


def search(case: Case) -> graph.GraphParameters:
    return graph.find_parameters(
        case["population"],
        corrupt=Fraction(case["corrupt"]),
        dropout=Fraction(case["dropout"]),
        model=graph.ThreatModel(case["model"]),
        sigma=case["sigma"],
        eta=case["eta"],
    )


def ring(case: Case) -> graph.NeighbourGraph:
    return graph.harary_graph(case["population"], case["degree"], bytes.fromhex(case["seed"]))


def seed(case: Case) -> bytes:
    digests = [bytes.fromhex(d) for d in case["advertisement_digests"]]
    return graph.graph_seed(bytes.fromhex(case["session_id"]), digests)


def check(case: Case) -> None:
    arguments = {name: case[name] for name in ("threshold", "holders", "colluders", "cohort")}
    graph.check_threshold(**arguments)


def test_the_file_is_what_the_generator_writes() -> None:
    assert (FOLDER / "graph.json").read_bytes() == documents()["graph.json"].encode()


def test_parameters() -> None:
    good, bad = good_and_bad("parameters")
    for case in good:
        assert search(case) == graph.GraphParameters(case["degree"], case["threshold"])
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            search(case)


def test_thresholds() -> None:
    good, bad = good_and_bad("thresholds")
    for case in good:
        check(case)
        if "complete_threshold" in case:
            assert graph.complete_threshold(case["cohort"]) == case["complete_threshold"]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            check(case)


def test_seeds() -> None:
    good, bad = good_and_bad("seeds")
    assert [seed(case).hex() for case in good] == [case["seed"] for case in good]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            seed(case)


def test_graphs() -> None:
    good, bad = good_and_bad("graphs")
    for case in good:
        if case.get("complete"):
            assert list(graph.complete_graph(case["population"]).holders(1)) == case["holders_of_1"]
            continue
        made = ring(case)
        if "ring_order" in case:
            assert list(made.ring_order) == case["ring_order"]
            ends = [list(made.neighbours(i)) for i in (0, made.size - 1)]
            assert ends == case["neighbours_of_first_and_last"]
        else:
            order = b"".join(node.to_bytes(4, "big") for node in made.ring_order)
            assert hashlib.sha256(order).hexdigest() == case["sha256_of_ring_order_as_4_byte_big_endian"]
    for case in bad:
        with pytest.raises(ERRORS[case["error"]]):
            ring(case)


def test_the_large_graph_throws_a_word_away() -> None:
    large = next(case for case in cases("graphs") if case["population"] == 20_000)
    words = graph._words(bytes.fromhex(large["seed"]))
    thrown_away = [limit for limit in range(20_000, 1, -1) if next(words) >= 2**32 - 2**32 % limit]
    assert thrown_away


def test_bounds() -> None:
    for case in cases("bounds"):
        for function in (graph.window_bound, graph.window_pair_bound):
            found = function(
                case["population"], corrupt=Fraction(case["corrupt"]), window=case["window"], sigma=case["sigma"]
            )
            assert found == case[function.__name__]


def test_cuts() -> None:
    everything = cases("cuts")
    for case in everything:
        assert graph.cuts_ring(ring(case), case["survivors"], case["bound"]) is case["cuts_ring"]
        assert graph.parts_ring(ring(case), case["survivors"], case["bound"]) is case["parts_ring"]
    assert {(case["cuts_ring"], case["parts_ring"]) for case in everything} == {
        (a, a and b) for a in (0, 1) for b in (0, 1)
    }
