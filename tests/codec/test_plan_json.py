"""Plans as JSON: both directions, one canonical form, and nothing taken that is not a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from tests.codec.test_codec_round_trips import plans
from tests.secagg.cohort import make_plan

from maskwork.plan_json import MAX_JSON_BYTES, PlanJsonError, canonical_json, plan_of_json, readable_json
from maskwork.secagg.plan import RoundPlan
from maskwork.wire.plan_codec import encode_plan

Change = Callable[[dict[str, Any]], None]


@settings(deadline=None)
@given(plan=plans())
def test_a_plan_read_back_has_the_very_bytes_that_were_signed(plan: RoundPlan) -> None:
    for text in (canonical_json(plan), readable_json(plan).encode()):
        again = plan_of_json(text)
        assert again == plan
        assert encode_plan(again) == encode_plan(plan)
        assert canonical_json(again) == canonical_json(plan)


def test_a_sparse_plan_goes_through_too() -> None:
    plan = make_plan(200)
    assert plan_of_json(canonical_json(plan)) == plan


def test_bytes_are_hexadecimal_and_kinds_are_words() -> None:
    found = json.loads(canonical_json(make_plan(4)))
    assert found["nonce"] == bytes(range(16)).hex()
    assert (found["graph"]["kind"], found["encoding"]["rotation"]) == ("complete", "none")
    assert canonical_json(make_plan(4)).startswith(b'{"attempt":1,"audit_head":"00')


def spoilt(change: Change) -> bytes:
    found: dict[str, Any] = json.loads(canonical_json(make_plan(4)))
    change(found)
    return json.dumps(found).encode()


def put(*path: str | int, value: object) -> Change:
    def change(found: dict[str, Any]) -> None:
        *above, last = path
        at: Any = found
        for key in above:
            at = at[key]
        at[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("colour", value=1), "the plan: no such field: colour"),
        (put("graph", "colour", value=1), "graph: no such field: colour"),
        (put("roster", 1, "colour", value=1), r"roster\[1\]: no such field: colour"),
        (lambda found: found.pop("nonce"), "the plan: nonce is missing"),
        (lambda found: found["graph"].pop("kind"), "graph: kind is missing"),
        (put("graph", "kind", value="star"), "graph.kind: not one of complete, sparse"),
        (put("graph", "kind", value=1), "graph.kind: not one of"),
        (put("nonce", value="00" * 15 + "0G"), "nonce: not bytes"),
        (put("nonce", value="0A" * 16), "nonce: not bytes in lower-case"),
        (put("nonce", value="00 " * 16), "nonce: not bytes"),
        (put("nonce", value="000"), "nonce: not bytes"),
        (put("nonce", value=0), "nonce: not bytes"),
        (put("nonce", value="00"), "nonce is not 16 bytes"),
        (put("attempt", value=True), "attempt: not a whole number"),
        (put("attempt", value=1.0), "attempt: not a whole number"),
        (put("attempt", value="1"), "attempt: not a whole number"),
        (put("job", value=1), "job: not a text"),
        (put("encoding", "clip_norm", value=True), "encoding.clip_norm: not a number"),
        (put("encoding", "clip_norm", value="1"), "encoding.clip_norm: not a number"),
        (put("encoding", "clip_norm", value=10**400), "encoding.clip_norm: not a finite number"),
        (put("encoding", "clip_norm", value=float("nan")), "NaN is no number"),
        (put("encoding", "value_bits", value=99), "value_bits"),
        (put("roster", value={}), "roster: not a list"),
        (put("roster", 0, value=3), r"roster\[0\]: not an object"),
        (put("graph", "threshold", value=1), "2t"),
        (put("round_number", value=99), "round_number is not within"),
    ],
)
def test_what_is_not_a_plan_is_refused_with_the_place(change: Change, says: str) -> None:
    with pytest.raises(PlanJsonError, match=says):
        plan_of_json(spoilt(change))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[]", "the plan: not an object"),
        (b"null", "the plan: not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"job":"a","job":"b"}', "'job' comes twice"),
        (b" " * (MAX_JSON_BYTES + 1), "at most"),
    ],
)
def test_what_is_no_json_of_a_plan_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(PlanJsonError, match=says):
        plan_of_json(text)
