"""What is no plan at all: thresholds under which both secrets could be opened, cohorts that give their terms away,
contradictions, repeated members, numbers out of range. And what a session's keys may not be.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from tests.secagg.cohort import make_plan, make_proposal

from maskwork.secagg import keys
from maskwork.secagg.encoding import Encoding, Rotation
from maskwork.secagg.errors import PlanError
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.keys import DegenerateKey, PublicKey, SecretKey
from maskwork.secagg.plan import (
    GraphPlan,
    PrivacyMechanism,
    PrivacyParameters,
    RosterEntry,
    StageDeadlines,
    StatisticSpec,
    session_id,
    survivors_digest,
)

PLAN = make_plan(5)


@pytest.mark.parametrize(
    ("n", "threshold", "colluders", "because"),
    [
        (3, 1, 0, "not greater than m [+] c"),
        (5, 1, 0, "not greater than m [+] c"),
        (4, 2, 0, "not greater than m [+] c"),
        (5, 4, 3, "not greater than m [+] c"),
        (5, 0, 0, "smaller than 1"),
        (5, -1, 0, "smaller than 1"),
        (5, 6, 0, "exceeds the m = 5"),
        (5, 4, -1, "colluders is negative"),
        (2, 2, 0, "roster of 2"),
        (1, 1, 0, "roster of 1"),
        (0, 1, 0, "roster of 0"),
        (3, 3, 2, "fewer members than survivors required"),
    ],
)
def test_unsafe_thresholds_are_refused(n: int, threshold: int, colluders: int, because: str) -> None:
    with pytest.raises(PlanError, match=because):
        make_plan(n, threshold=threshold, colluders=colluders)


@pytest.mark.parametrize(("n", "threshold", "colluders"), [(3, 2, 0), (4, 3, 1), (5, 4, 2), (5, 5, 3), (7, 5, 2)])
def test_two_t_above_m_plus_c_is_accepted(n: int, threshold: int, colluders: int) -> None:
    assert make_plan(n, threshold=threshold, colluders=colluders).graph.threshold == threshold


@pytest.mark.parametrize("n", range(3, 20))
def test_the_default_threshold_leaves_the_colluders_that_the_design_states(n: int) -> None:
    threshold = 2 * n // 3 + 1
    colluders = 2 * threshold - n - 1
    plan = make_plan(n, threshold=threshold, colluders=min(colluders, n - 2))
    assert {4: 1, 5: 2, 7: 2, 10: 3}.get(n, plan.graph.colluders) == plan.graph.colluders
    assert plan.survivor_floor == max(3, plan.graph.colluders + 2)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"suite": 2}, "suite 2"),
    ({"federation": ""}, "federation"),
    ({"job": "Job"}, "job"),
    ({"task": "a/b"}, "task"),
    ({"task": "x" * 129}, "task"),
    ({"round_number": 0}, "round_number"),
    ({"round_number": 21}, "round_number"),
    ({"attempt": 0}, "attempt"),
    ({"nonce": bytes(15)}, "nonce"),
    ({"model_digest": bytes(31)}, "model_digest"),
    ({"training_digest": b""}, "training_digest"),
    ({"audit_head": bytes(33)}, "audit_head"),
    ({"previous_survivors": b""}, "previous_survivors"),
    ({"revocation_digest": b""}, "revocation_digest"),
    ({"revocation_number": -1}, "revocation_number"),
    ({"parameters": 0}, "parameters"),
    ({"parameters": (1 << 34) + 1}, "parameters"),
    ({"deadlines": StageDeadlines(1, 1, 0, 1, 1)}, "masked_update_ms"),
    ({"roster": (*PLAN.roster[:4], PLAN.roster[0])}, "repeats a participant"),
    ({"roster": (*PLAN.roster[:4], RosterEntry("other", PLAN.roster[0].fingerprint))}, "repeats a certificate"),
    ({"roster": (*PLAN.roster[:4], RosterEntry("Other", bytes(32)))}, "not a valid name"),
    ({"roster": (*PLAN.roster[:4], RosterEntry("other", bytes(20)))}, "fingerprint of other"),
    ({"graph": GraphPlan(GraphKind.COMPLETE, 3, 4, 0)}, "degree 3 is not n - 1"),
    ({"graph": GraphPlan(GraphKind.COMPLETE, 4, 4, 0, 50, 50)}, "takes no corrupt"),
    ({"graph": GraphPlan(GraphKind.SPARSE, 4, 4, 0, 50, 50)}, "more than 128"),
    ({"min_survivors": 6}, "min_survivors"),
    ({"min_survivors": 0}, "min_survivors"),
    ({"statistics": ()}, "0 statistics"),
    ({"statistics": (StatisticSpec("loss", 1.0),)}, "not the example count"),
    ({"statistics": (*PLAN.statistics, PLAN.statistics[1])}, "repeat a name"),
    ({"statistics": (*PLAN.statistics, StatisticSpec("Loss", 1.0))}, "name is not valid"),
    ({"statistics": (*PLAN.statistics, StatisticSpec("acc", math.inf))}, "bound of acc"),
    ({"statistics": (*PLAN.statistics, StatisticSpec("acc", math.nan))}, "bound of acc"),
    ({"statistics": (*PLAN.statistics, StatisticSpec("acc", 0.0))}, "bound of acc"),
    ({"statistics": (*PLAN.statistics, StatisticSpec("acc", 2.0**42))}, "overflows"),
    ({"statistics": (StatisticSpec("examples", 99.0),)}, "not the weight cap"),
    ({"encoding": Encoding(1.0, 100, 18, 20, Rotation.NONE)}, "overflow a 20-bit ring"),
    ({"privacy": PrivacyParameters(noise_multiplier=1.0)}, "no mechanism is"),
    ({"privacy": PrivacyParameters(delta=1e-6)}, "no mechanism is"),
    ({"privacy": PrivacyParameters(min_honest_survivors=1)}, "no mechanism is"),
    ({"privacy": PrivacyParameters(PrivacyMechanism.NONE, math.nan)}, "not finite"),
]


@pytest.mark.parametrize(("change", "because"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_plan_that_contradicts_itself_is_none(change: dict[str, Any], because: str) -> None:
    with pytest.raises(PlanError, match=because):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"degree": 12}, "not what the search gives"),
        ({"threshold": 8}, "not what the search gives"),
        ({"degree": 9}, "even"),
        ({"threshold": 5}, "not greater"),
        ({"corrupt_permille": 0}, "fractions out of range"),
        ({"dropout_permille": 500}, "fractions out of range"),
    ],
)
def test_a_sparse_plan_carries_the_parameters_of_the_search(change: dict[str, Any], because: str) -> None:
    plan = make_plan(150)
    with pytest.raises(PlanError, match=because):
        replace(plan, graph=replace(plan.graph, **change))


def test_a_member_is_found_by_name_and_certificate_together() -> None:
    one, two = PLAN.roster[1], PLAN.roster[2]
    assert PLAN.index_of(one.participant, one.fingerprint) == 1
    assert PLAN.index_of(one.participant, two.fingerprint) is None
    assert PLAN.index_of("nobody", one.fingerprint) is None


def test_the_session_is_the_hash_of_the_bytes_received() -> None:
    plan_bytes = make_proposal(PLAN).plan_bytes
    assert session_id(plan_bytes) != session_id(plan_bytes + b"\0")
    assert len(session_id(plan_bytes)) == 32


def test_the_digest_of_survivors_does_not_depend_on_their_order_and_has_no_ambiguity() -> None:
    assert survivors_digest(("a", "b")) == survivors_digest(("b", "a"))
    assert survivors_digest(("a", "bc")) != survivors_digest(("ab", "c"))
    assert survivors_digest(()) == bytes(32)


# --- keys of small order --------------------------------------------------------------------------------------------

FIELD = (1 << 255) - 19
SMALL_ORDER = [
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    FIELD - 1,
]
"""All u-coordinates of small order on the curve and its twist (RFC 7748, section 6.1 and the curve's own pages)."""


@pytest.mark.parametrize("u", SMALL_ORDER)
def test_points_of_small_order_are_recognised(u: int) -> None:
    key = PublicKey(u.to_bytes(32, "little"))
    assert keys.is_degenerate(key)
    with pytest.raises(DegenerateKey):
        keys.agree(SecretKey(b"\7" * 32), key)


@pytest.mark.parametrize("u", [*(FIELD + u for u in SMALL_ORDER[:2]), FIELD, (1 << 255) + 9, (1 << 256) - 1])
def test_a_point_has_one_encoding(u: int) -> None:
    """Else a copied key could pass for a different one: RFC 7748 ignores the top bit and reduces modulo the field."""
    with pytest.raises(ValueError, match="canonical"):
        PublicKey(u.to_bytes(32, "little"))


def test_an_honest_key_is_not_degenerate() -> None:
    assert not keys.is_degenerate(SecretKey(b"\7" * 32).public())


def square_roots(value: int) -> set[int]:
    """In GF(2^255 - 19), whose order is 5 modulo 8."""
    root = pow(value, (FIELD + 3) // 8, FIELD)
    candidates = {root, root * pow(2, (FIELD - 1) // 4, FIELD) % FIELD}
    return {x for r in candidates for x in (r, FIELD - r) if x * x % FIELD == value % FIELD}


def test_there_are_no_other_points_of_small_order() -> None:
    """All of them, found again from the curve's equation alone.

    In the u-coordinate, doubling is u -> (u² - 1)² / 4u(u² + Au + 1), on curve and twist alike, A = 486662. Order 2:
    the denominator is 0. Order 4: the double is 0. Order 8: the double is e = ±1, which is to say
    (u² - 2eu + 1)² = 4(A + 2e)e·u², so with s² = (A + 2e)e: u² - 2(e + s)u + 1 = 0.
    """
    a = 486662
    assert not square_roots(a * a - 4)  # so the denominator has no root but 0
    order_8 = set()
    for e in (1, -1):
        for s in square_roots((a + 2 * e) * e):
            for root in square_roots((e + s) ** 2 - 1):
                order_8.add((e + s + root) % FIELD)
    assert {0, 1, FIELD - 1} | order_8 == set(SMALL_ORDER)
    assert len(SMALL_ORDER) == 5
