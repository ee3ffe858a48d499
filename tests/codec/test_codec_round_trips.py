"""decode ∘ encode is the identity for every message, and for the plan, whose bytes have one form only."""

from __future__ import annotations

import contextlib
import math
import struct
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf.internal import encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.secagg.cohort import make_plan, make_proposal

from maskwork.secagg import messages as domain
from maskwork.secagg.encoding import Encoding, Rotation, preset
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.keys import CIPHERTEXT_BYTES, PublicKey, ShareKind
from maskwork.secagg.plan import GraphPlan, RosterEntry, RoundPlan, StageDeadlines, StatisticSpec, session_id
from maskwork.wire import codec
from maskwork.wire.codec import (
    Hello,
    OpenSession,
    Transcript,
    UploadGrant,
    UploadReady,
    Welcome,
    WireError,
)
from maskwork.wire.v1 import federation_pb2, plan_pb2, session_pb2

few = settings(max_examples=60, deadline=None)

ROSTER = 11  # not a multiple of eight: the last byte of a bitmap has bits that mean nobody

indices = st.integers(0, 2**32 - 1)
digests = st.binary(min_size=32, max_size=32)
signatures = st.binary(min_size=64, max_size=64)
names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,20}[a-z0-9])?", fullmatch=True)
sets = st.frozensets(st.integers(0, ROSTER - 1))
public_keys = st.binary(min_size=31, max_size=31).map(lambda low: PublicKey(low + b"\x07"))
text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80)


def ascending(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Distinct indices in order, each with a value."""
    return st.dictionaries(indices, values, max_size=5).map(lambda d: tuple(sorted(d.items())))


advertise_keys = st.builds(domain.AdvertiseKeys, public_keys, public_keys, signatures)
dealt = st.tuples(
    st.one_of(st.just(b""), st.binary(min_size=CIPHERTEXT_BYTES, max_size=CIPHERTEXT_BYTES)), digests, digests
)
share_keys = st.builds(
    lambda seed, root, shares, signature: domain.ShareKeys(
        seed, root, tuple(domain.DealtShare(i, *rest) for i, rest in shares), signature
    ),
    digests,
    digests,
    ascending(dealt),
    signatures,
)
revealed = st.tuples(
    st.sampled_from(ShareKind), st.binary(min_size=16, max_size=16), st.binary(min_size=33, max_size=33)
)
unmask = st.builds(
    lambda shares: domain.Unmask(tuple(domain.RevealedShare(i, *rest) for i, rest in shares)), ascending(revealed)
)
requests = st.one_of(
    st.builds(UploadReady),
    st.builds(domain.Decline, st.sampled_from(DeclineCode), text),
    advertise_keys,
    share_keys,
    st.builds(domain.Complaint, indices, st.binary(min_size=32, max_size=32)),
    st.builds(domain.ConsistencyCheck, signatures),
    unmask,
    st.builds(domain.Withdraw, st.sampled_from(AbortReason), text),
)

advertisements = st.builds(
    lambda u1, advertised, with_digests, digest: domain.Advertisements(
        u1, advertised, (digest,) * len(u1) if with_digests else ()
    ),
    sets,
    ascending(advertise_keys),
    st.booleans(),
    digests,
)
delivered = st.tuples(
    digests,
    digests,
    st.integers(1, 2**32 - 1),
    signatures,
    digests,
    digests,
    st.binary(min_size=CIPHERTEXT_BYTES, max_size=CIPHERTEXT_BYTES),
    st.lists(digests, max_size=4).map(tuple),
)
responses = st.one_of(
    st.builds(Welcome, st.integers(0, 2**32 - 1), st.binary(max_size=50)),
    st.builds(UploadGrant, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    advertisements,
    st.builds(
        lambda u2, shares: domain.DeliveredShares(u2, tuple(domain.DeliveredShare(i, *rest) for i, rest in shares)),
        sets,
        ascending(delivered),
    ),
    st.builds(domain.SurvivorSets, sets, sets, sets),
    st.builds(domain.SurvivorSignatures, ascending(signatures)),
    st.builds(domain.SessionClosed, st.booleans(), text),
)


@st.composite
def plans(draw: st.DrawFn) -> RoundPlan:
    members = draw(st.integers(3, 12))
    roster = draw(
        st.lists(
            st.tuples(names, digests), min_size=members, max_size=members, unique_by=(lambda e: e[0], lambda e: e[1])
        )
    )
    chosen = preset(draw(st.sampled_from(["exact", "compact"])), cohort=members, clip_norm=draw(positive), weight_cap=7)
    others = draw(st.lists(st.tuples(statistic_names, bounds), max_size=3, unique_by=lambda s: s[0]))
    threshold = 2 * members // 3 + 1
    most_colluders = min(2 * threshold - members - 1, members - 2)
    rounds_total = draw(st.integers(1, 1_000_000))
    return RoundPlan(
        federation=draw(names),
        job=draw(names),
        task=draw(names),
        round_number=draw(st.integers(1, rounds_total)),
        rounds_total=rounds_total,
        attempt=draw(st.integers(1, 1_000_000_000)),
        nonce=draw(st.binary(min_size=16, max_size=16)),
        model_digest=draw(digests),
        parameters=draw(st.integers(1, 1 << 34)),
        training_digest=draw(digests),
        roster=tuple(RosterEntry(*e) for e in roster),
        graph=GraphPlan(GraphKind.COMPLETE, members - 1, threshold, draw(st.integers(0, most_colluders))),
        min_survivors=draw(st.integers(1, members)),
        encoding=chosen,
        statistics=(StatisticSpec("examples", 7.0), *(StatisticSpec(*s) for s in others)),
        privacy=make_plan(3).privacy,
        revocation_digest=draw(digests),
        revocation_number=draw(st.integers(0, 2**63 - 1)),
        audit_head=draw(digests),
        previous_survivors=draw(digests),
        deadlines=StageDeadlines(*draw(st.tuples(*[st.integers(1, 30 * 86_400_000)] * 5))),
    )


positive = st.floats(1e-6, 1e9)
bounds = st.floats(1e-3, 1e6)
statistic_names = st.from_regex(r"[a-z][a-z0-9_.]{0,10}", fullmatch=True).filter(lambda n: n != "examples")


# --- round trips ----------------------------------------------------------------------------------------------------


@few
@given(digests, requests)
def test_what_a_participant_says_comes_out_as_it_went_in(session: bytes, message: codec.Request) -> None:
    request = codec.encode_request(session, message)
    received = federation_pb2.ConnectRequest.FromString(request.SerializeToString())
    assert received.session_id == session
    assert codec.decode_request(received) == message


@few
@given(st.lists(st.integers(0, 9), max_size=4), text, st.lists(names, max_size=4), digests)
def test_a_hello_carries_the_session_outside(versions: list[int], software: str, tasks: list[str], id: bytes) -> None:
    hello = Hello(tuple(versions), software, tuple(tasks), id)
    assert codec.decode_request(codec.encode_request(id, hello)) == hello


@few
@given(digests, responses)
def test_what_the_coordinator_says_comes_out_as_it_went_in(session: bytes, message: codec.Response) -> None:
    response = codec.encode_response(session, message, ROSTER)
    received = federation_pb2.ConnectResponse.FromString(response.SerializeToString())
    assert received.session_id == session
    assert codec.decode_response(received, ROSTER) == message


@few
@given(plans())
def test_a_plan_comes_out_as_it_went_in(plan: RoundPlan) -> None:
    assert codec.decode_plan(codec.encode_plan(plan)) == plan


def test_a_sparse_and_rotated_plan_comes_out_as_it_went_in() -> None:
    plan = make_plan(200, encoding=Encoding(1.0, 100, 12, 20, Rotation.HADAMARD))
    assert codec.decode_plan(codec.encode_plan(plan)) == plan


def test_an_offer_comes_out_as_it_went_in() -> None:
    offer = OpenSession(make_proposal(make_plan(3)), b"{}", 17, bytes(32), 3 * (codec.MAX_CERTIFICATE_BYTES + 4))
    assert codec.decode_response(codec.encode_response(bytes(32), offer, 0), 0) == offer


@few
@given(st.data())
def test_a_transcript_comes_out_as_it_went_in(data: st.DataObject) -> None:
    def some(values: st.SearchStrategy[Any]) -> dict[int, Any]:
        return dict(data.draw(ascending(values)))

    accusation = data.draw(st.none() | st.tuples(indices, st.builds(domain.Complaint, indices, digests)))
    transcript = Transcript(
        codec.encode_plan(make_plan(ROSTER)),
        data.draw(signatures),
        tuple(data.draw(st.lists(st.binary(max_size=30), max_size=3))),
        some(advertise_keys),
        some(share_keys),
        data.draw(sets),
        some(st.builds(domain.ConsistencyCheck, signatures)),
        some(unmask),
        accusation,
    )
    assert codec.decode_transcript(codec.encode_transcript(transcript)) == transcript


def test_an_accusation_is_added_to_a_transcript() -> None:
    base = Transcript(codec.encode_plan(make_plan(3)), bytes(64), (), {}, {})
    complaint = domain.Complaint(2, bytes(32))
    with_it = codec.with_accusation(base, 1, complaint)
    assert with_it == replace(base, accusation=(1, complaint))
    assert codec.decode_transcript(codec.encode_transcript(with_it)).accusation == (1, complaint)


# --- the one form of a plan -----------------------------------------------------------------------------------------

PLAN = codec.encode_plan(make_plan(3))


def refused(plan_bytes: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        codec.decode_plan(plan_bytes)


def test_an_unknown_field_is_refused_wherever_it_stands() -> None:
    unknown = b"\xc2\x3e\x01x"  # field 1000, length-delimited
    plan_pb2.RoundPlan.FromString(PLAN + unknown)  # protobuf itself does not mind
    refused(PLAN + unknown, "canonical form")
    message = plan_pb2.RoundPlan.FromString(PLAN)
    message.graph.MergeFromString(unknown)
    refused(message.SerializeToString(deterministic=True), "canonical form")


def test_fields_in_another_order_are_refused() -> None:
    head = plan_pb2.RoundPlan(suite=1).SerializeToString()
    assert PLAN.startswith(head)
    moved = PLAN[len(head) :] + head
    assert plan_pb2.RoundPlan.FromString(moved) == plan_pb2.RoundPlan.FromString(PLAN)
    refused(moved, "canonical form")


def test_an_explicit_default_is_refused() -> None:
    refused(PLAN + encoder.TagBytes(19, 0) + b"\x00", "canonical form")  # revocation_number = 0, written out


def test_a_field_that_is_given_twice_is_refused() -> None:
    refused(plan_pb2.RoundPlan(suite=1).SerializeToString() + PLAN, "canonical form")


def test_a_number_that_is_longer_than_it_need_be_is_refused() -> None:
    assert PLAN[:2] == b"\x08\x01"
    refused(b"\x08\x81\x00" + PLAN[2:], "canonical form")


def test_bytes_that_follow_are_refused() -> None:
    refused(PLAN + b"\x00", "not a valid plan")
    refused(PLAN + PLAN, "not a valid plan|canonical form")
    refused(PLAN[:-1], "not a valid plan")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["clip_norm", "bound", "noise", "delta"])
def test_numbers_that_are_not_finite_are_refused(where: str, number: float) -> None:
    message = plan_pb2.RoundPlan.FromString(PLAN)
    match where:
        case "clip_norm":
            message.encoding.clip_norm = number
        case "bound":
            message.statistics[1].bound = number
        case "noise":
            message.privacy.noise_multiplier = number
        case _:
            message.privacy.delta = number
    refused(message.SerializeToString(deterministic=True), "not a valid plan")


def test_negative_zero_is_not_taken_for_zero() -> None:
    message = plan_pb2.RoundPlan.FromString(PLAN)
    message.privacy.delta = -0.0
    written = message.SerializeToString(deterministic=True)
    assert struct.pack("<d", -0.0) in written
    # It reads back as it was written, so it is canonical; two plans that differ in it are two sessions.
    assert codec.encode_plan(codec.decode_plan(written)) == written
    assert session_id(written) != session_id(PLAN)


@pytest.mark.parametrize("field", ["participant", "fingerprint"])
def test_a_repeated_member_is_refused(field: str) -> None:
    message = plan_pb2.RoundPlan.FromString(PLAN)
    setattr(message.roster[2], field, getattr(message.roster[0], field))
    refused(message.SerializeToString(deterministic=True), "the roster repeats")


@pytest.mark.parametrize(("part", "field"), [("graph", "kind"), ("encoding", "rotation"), ("privacy", "mechanism")])
@pytest.mark.parametrize("value", [0, 7])
def test_an_enumeration_value_that_is_not_known_is_refused(part: str, field: str, value: int) -> None:
    message = plan_pb2.RoundPlan.FromString(PLAN)
    setattr(getattr(message, part), field, value)
    refused(message.SerializeToString(deterministic=True), "not known")


@few
@given(st.data())
def test_a_plan_with_any_byte_changed_is_another_plan_or_none(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(PLAN) - 1))
    damaged = bytearray(PLAN)
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        plan = codec.decode_plan(bytes(damaged))
    except WireError:
        return
    assert codec.encode_plan(plan) == bytes(damaged)


# --- bytes that are no message --------------------------------------------------------------------------------------


def mutated(data: st.DataObject, original: bytes) -> bytes:
    """A few bytes of it changed, cut out or doubled."""
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        if not damaged:
            break
        at = data.draw(st.integers(0, len(damaged) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "double"])):
            case "flip":
                damaged[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 40))]
            case _:
                damaged[at:at] = damaged[at : at + data.draw(st.integers(1, 40))]
    return bytes(damaged)


@few
@given(st.data(), requests)
def test_a_damaged_request_is_a_message_or_a_wire_error(data: st.DataObject, message: codec.Request) -> None:
    original = codec.encode_request(bytes(32), message).SerializeToString()
    with contextlib.suppress(WireError):
        codec.decode_request(codec.parse(federation_pb2.ConnectRequest, mutated(data, original)))


@few
@given(st.data(), responses)
def test_a_damaged_response_is_a_message_or_a_wire_error(data: st.DataObject, message: codec.Response) -> None:
    original = codec.encode_response(bytes(32), message, ROSTER).SerializeToString()
    with contextlib.suppress(WireError):
        codec.decode_response(codec.parse(federation_pb2.ConnectResponse, mutated(data, original)), ROSTER)


@few
@given(st.data())
def test_a_damaged_offer_is_an_offer_or_a_wire_error(data: st.DataObject) -> None:
    offer = OpenSession(make_proposal(make_plan(3)), b"{}", 17, bytes(32), 100)
    original = codec.encode_response(bytes(32), offer, 0).SerializeToString()
    with contextlib.suppress(WireError):
        codec.decode_response(codec.parse(federation_pb2.ConnectResponse, mutated(data, original)), 0)


@few
@given(st.binary(max_size=300))
def test_any_bytes_are_a_transcript_or_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.decode_transcript(data)


@few
@given(st.data())
def test_a_damaged_transcript_is_a_transcript_or_a_wire_error(data: st.DataObject) -> None:
    transcript = Transcript(PLAN, bytes(64), (b"a", b"b"), {0: data.draw(advertise_keys)}, {1: data.draw(share_keys)})
    with contextlib.suppress(WireError):
        codec.decode_transcript(mutated(data, codec.encode_transcript(transcript)))


def test_messages_of_no_kind_are_refused() -> None:
    with pytest.raises(WireError, match="no known kind"):
        codec.decode_request(federation_pb2.ConnectRequest())
    with pytest.raises(WireError, match="no known kind"):
        codec.decode_response(federation_pb2.ConnectResponse(), 3)


def test_a_revealed_share_of_neither_kind_is_refused() -> None:
    request = federation_pb2.ConnectRequest(
        unmask=session_pb2.Unmask(shares=[session_pb2.RevealedShare(owner=1, salt=bytes(16))])
    )
    with pytest.raises(WireError, match="neither kind"):
        codec.decode_request(request)


def test_a_revealed_share_of_both_kinds_cannot_be_written() -> None:
    share = session_pb2.RevealedShare(owner=1, salt=bytes(16), self_seed=bytes(33))
    both = share.SerializeToString() + session_pb2.RevealedShare(mask_secret=bytes(range(33))).SerializeToString()
    read = session_pb2.RevealedShare.FromString(both)
    assert read.WhichOneof("share") == "mask_secret"
    assert not read.HasField("self_seed")


@pytest.mark.parametrize("kind", ["decline", "withdraw"])
def test_a_code_that_is_not_enumerated_is_refused(kind: str) -> None:
    request = federation_pb2.ConnectRequest()
    if kind == "decline":
        request.decline.code = "because"
    else:
        request.withdraw.reason = "because"
    with pytest.raises(WireError, match=kind):
        codec.decode_request(request)


def test_what_a_peer_says_in_words_reaches_no_terminal_as_commands() -> None:
    rude = "no\x1b[2J\r\n\u202ethanks" + "x" * 600
    declining, withdrawing = federation_pb2.ConnectRequest(), federation_pb2.ConnectRequest()
    declining.decline.code, declining.decline.detail = "policy", rude
    withdrawing.withdraw.reason, withdrawing.withdraw.detail = "policy", rude
    for request in (declining, withdrawing):
        message = codec.decode_request(request)
        assert isinstance(message, domain.Decline | domain.Withdraw)
        assert message.detail.startswith("no?[2J???thanks")
        assert len(message.detail) == domain.MAX_DETAIL
    response = federation_pb2.ConnectResponse()
    response.session_closed.phrase = "over\x1b[31m"
    closed = codec.decode_response(response, 0)
    assert isinstance(closed, domain.SessionClosed)
    assert closed.phrase == "over?[31m"
