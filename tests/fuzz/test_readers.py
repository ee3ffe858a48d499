"""The campaign's readers in the ordinary suite: a few inputs each, and whatever Hypothesis finds worth trying."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz import recordings
from tests.fuzz.in_process import campaign, one
from tests.fuzz.mutations import INTEGERS, TEXTS, mutate_message
from tests.fuzz.tally import Tally
from tests.fuzz.targets import Target, targets

from maskwork.secagg import messages as domain
from maskwork.tensors import ModelFileError, check_finite, read_finite_vector
from maskwork.wire import codec
from maskwork.wire.codec import MAX_TASK_NAME, MAX_TASKS, MAX_VERSIONS, WireError
from maskwork.wire.v1 import federation_pb2, session_pb2

BY_BYTES = (
    "ConnectRequest",
    "ConnectResponse",
    "plan",
    "transcript",
    "certificate bundle",
    "WatchJobResponse",
    "training config",
    "job spec JSON",
    "certificate, DER",
    "CA file",
    "job file",
    "policy",
    "coordinator config",
    "participant config",
    "safetensors",
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def every(tmp_path: Path) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path)}


@FEW
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("name", [t.name for t in targets(Path("unused"))])
def test_a_spoilt_input_gets_the_readers_own_error(every: dict[str, Target], name: str, seed: int) -> None:
    tally = Tally()
    one(tally, every[name], f"{seed}")
    assert not tally.crashes, tally.crashes[0]["traceback"]


@FEW
@given(data=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
@pytest.mark.parametrize("name", BY_BYTES)
def test_any_bytes_get_the_readers_own_error(every: dict[str, Target], name: str, data: bytes) -> None:
    target = every[name]
    try:
        target.check(data)
    except target.typed:
        return


@FEW
@given(
    holders=st.lists(st.sampled_from([n for n in INTEGERS if n < 2**32]), max_size=5),
    ciphertext=st.binary(max_size=200),
    text=st.sampled_from(TEXTS),
)
def test_any_fields_make_a_message_or_a_wire_error(holders: list[int], ciphertext: bytes, text: str) -> None:
    shares = [session_pb2.DealtShare(holder=h, ciphertext=ciphertext, self_commitment=ciphertext) for h in holders]
    for request in (
        federation_pb2.ConnectRequest(share_keys=session_pb2.ShareKeys(root=ciphertext, shares=shares)),
        federation_pb2.ConnectRequest(decline=session_pb2.Decline(code=text, detail=text)),
        federation_pb2.ConnectRequest(withdraw=session_pb2.Withdraw(reason=text)),
        federation_pb2.ConnectRequest(complaint=session_pb2.Complaint(dealer=len(holders), key=ciphertext)),
    ):
        try:
            decoded = codec.decode_request(request)
        except WireError:
            continue
        assert isinstance(decoded, domain.Decline | domain.Withdraw | domain.Complaint)


def test_the_campaign_sees_a_reader_that_fails_otherwise(tmp_path: Path) -> None:
    def fails(_: bytes) -> None:
        raise KeyError("x")

    tally = Tally()
    one(tally, Target("broken", lambda rng: rng.randbytes(3), fails, (ValueError,)), "1:broken:0")
    assert not tally.clean
    assert (tally.crashes[0]["error"], tally.crashes[0]["seed"]) == ("KeyError", "1:broken:0")
    campaign(clean := Tally(), seconds=0.1, seed=1)
    assert clean.clean
    assert all(clean.inputs[target.name] for target in targets(tmp_path))


def test_mutations_follow_from_their_seed() -> None:
    for message in recordings.requests():
        first, again = (mutate_message(random.Random("7"), message) for _ in range(2))
        assert first == again


@pytest.mark.parametrize(
    "hello",
    [
        federation_pb2.Hello(versions=[1] * (MAX_VERSIONS + 1)),
        federation_pb2.Hello(versions=[1], tasks=["x"] * (MAX_TASKS + 1)),
        federation_pb2.Hello(versions=[1], tasks=["x" * (MAX_TASK_NAME + 1)]),
    ],
)
def test_a_hello_says_no_more_than_a_site_can_have_to_say(hello: federation_pb2.Hello) -> None:
    with pytest.raises(WireError):
        codec.decode_request(federation_pb2.ConnectRequest(hello=hello))


@pytest.mark.parametrize("length", [1, 31, 33, 100_000])
def test_a_hello_names_a_session_by_its_id_or_none(length: int) -> None:
    hello = federation_pb2.Hello(versions=[1])
    codec.decode_request(federation_pb2.ConnectRequest(session_id=bytes(32), hello=hello))
    with pytest.raises(WireError, match="no session id"):
        codec.decode_request(federation_pb2.ConnectRequest(session_id=bytes(length), hello=hello))


@FEW
@given(seed=st.integers(0, 2**32))
def test_checking_a_model_without_its_vector_comes_to_the_same(
    every: dict[str, Target], tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "model"
    path.write_bytes(every["safetensors"].draw(random.Random(seed)))
    try:
        expected = str(read_finite_vector(path)[0])
    except ModelFileError as error:
        expected = str(error)
    try:
        found = str(check_finite(path))
    except ModelFileError as error:
        found = str(error)
    assert found == expected
