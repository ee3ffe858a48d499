"""The coordinator's audit chain as it is shown with an offer: out as it went in, nothing that contradicts itself."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.secagg.cohort import make_plan, make_proposal

from maskwork.wire import codec
from maskwork.wire.codec import Hello, OpenSession, ShownHistory, WireError
from maskwork.wire.history_codec import MAX_INLINE, MAX_RECORDS, NO_HISTORY
from maskwork.wire.v1 import federation_pb2

INLINE = ShownHistory(9, bytes(64), 4, bytes(range(160)))
ELSEWHERE = ShownHistory(9, bytes(64), 4, digests_digest=hashlib.sha256(b"digests").digest())


def offer(history: ShownHistory) -> OpenSession:
    return OpenSession(make_proposal(make_plan(3)), b"{}", 17, bytes(32), 100, history)


def sent(history: ShownHistory) -> OpenSession:
    response = codec.encode_response(bytes(32), offer(history), 0)
    received = codec.decode_response(federation_pb2.ConnectResponse.FromString(response.SerializeToString()), 0)
    assert isinstance(received, OpenSession)
    return received


@pytest.mark.parametrize("history", [NO_HISTORY, INLINE, ELSEWHERE, ShownHistory(4, bytes(64), 4)], ids=str)
def test_a_history_comes_out_as_it_went_in(history: ShownHistory) -> None:
    assert sent(history) == offer(history)


def test_an_offer_without_a_history_has_the_bytes_that_it_always_had() -> None:
    assert not codec.encode_response(bytes(32), offer(NO_HISTORY), 0).open_session.HasField("history")


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (replace(INLINE, since=10), "ends before it begins"),
        (replace(INLINE, size=MAX_RECORDS + 1), "longer than any"),
        (replace(INLINE, signature=bytes(63)), "not signed"),
        (replace(INLINE, signature=b""), "not signed"),
        (replace(NO_HISTORY, signature=bytes(64)), "signature of no head"),
        (replace(INLINE, digests=bytes(128)), "more or fewer digests"),
        (replace(INLINE, digests=bytes(161)), "more or fewer digests"),
        (replace(INLINE, digests_digest=bytes(32)), "more or fewer digests"),
        (ShownHistory(1 << 16, bytes(64), 0, bytes(32 << 16)), "more or fewer digests"),
        (replace(ELSEWHERE, digests_digest=bytes(31)), "no digest"),
        (ShownHistory(4, bytes(64), 4, digests_digest=bytes(32)), "no digest"),
    ],
)
def test_a_history_that_contradicts_itself_is_refused(wrong: ShownHistory, why: str) -> None:
    with pytest.raises(WireError, match=why):
        sent(wrong)


def test_the_longest_history_inline_is_taken() -> None:
    records = MAX_INLINE // 32
    assert sent(ShownHistory(records, bytes(64), 0, bytes(MAX_INLINE))).history.size == records


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_a_damaged_history_is_a_history_or_a_wire_error(data: bytes) -> None:
    response = codec.encode_response(bytes(32), offer(NO_HISTORY), 0)
    with contextlib.suppress(WireError, Exception):
        response.open_session.history.ParseFromString(data)
    with contextlib.suppress(WireError):
        codec.decode_response(response, 0)


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_a_hello_says_which_head_is_kept(size: int) -> None:
    hello = Hello((1,), "maskwork", ("digits",), b"", size)
    assert codec.decode_request(codec.encode_request(b"", hello)) == hello
