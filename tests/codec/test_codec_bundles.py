"""Bitmaps of members, bundles of certificates, and the sizes that an offer announces."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.secagg.cohort import make_plan, make_proposal

from maskwork.secagg import messages as domain
from maskwork.wire import codec
from maskwork.wire.codec import (
    OpenSession,
    WireError,
)
from maskwork.wire.v1 import federation_pb2, session_pb2

few = settings(max_examples=60, deadline=None)

ROSTER = 11


# --- bitmaps --------------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 40), st.data())
def test_a_set_is_a_bitmap_in_roster_order(size: int, data: st.DataObject) -> None:
    members = data.draw(st.frozensets(st.integers(0, size - 1)))
    bitmap = domain.encode_members(members, size)
    assert int.from_bytes(bitmap, "little") == sum(1 << i for i in members)
    assert len(bitmap) == -(-size // 8)
    assert domain.decode_members(bitmap, size) == members


@pytest.mark.parametrize("index", [-1, ROSTER, ROSTER + 1])
def test_a_member_outside_the_roster_makes_no_bitmap(index: int) -> None:
    with pytest.raises(domain.MessageError, match="not in a roster of 11"):
        domain.encode_members(frozenset({0, index}), ROSTER)


@pytest.mark.parametrize("bitmap", [b"", b"\x01", b"\x01\x00\x00", b"\x00\x08", b"\xff\xff"])
def test_a_bitmap_of_another_length_or_with_a_bit_too_many_is_refused(bitmap: bytes) -> None:
    response = federation_pb2.ConnectResponse(
        survivor_sets=session_pb2.SurvivorSets(u1=b"\x00\x00", u2=b"\x00\x00", u3=bitmap)
    )
    with pytest.raises(WireError, match="bitmap"):
        codec.decode_response(response, ROSTER)


# --- certificates ---------------------------------------------------------------------------------------------------


def digest(bundle: bytes) -> bytes:
    return hashlib.sha256(bundle).digest()


@few
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
def test_certificates_come_out_as_they_went_in(certificates: list[bytes]) -> None:
    bundle = codec.encode_certificates(certificates)
    assert codec.decode_certificates(bundle, digest(bundle), len(certificates)) == tuple(certificates)


def test_certificates_of_another_digest_are_refused() -> None:
    bundle = codec.encode_certificates([b"one", b"two"])
    with pytest.raises(WireError, match="not those announced"):
        codec.decode_certificates(bundle, digest(bundle + b"\0"), 2)


@pytest.mark.parametrize(
    ("bundle", "why"),
    [
        (codec.encode_certificates([b"one", b"two"])[:-1], "cut short"),
        (codec.encode_certificates([b"one"]) + b"\0\0", "cut short"),
        (codec.encode_certificates([b"one", b""]), "cut short"),
        (codec.encode_certificates([b"one", bytes(codec.MAX_CERTIFICATE_BYTES + 1)]), "too long"),
        (codec.encode_certificates([b"one"]), "1 certificates for a roster of 2"),
        (codec.encode_certificates([b"one", b"two", b"three"]), "3 certificates for a roster of 2"),
        (b"\xff\xff\xff\xffone", "too long"),
    ],
)
def test_certificates_cut_short_too_long_or_miscounted_are_refused(bundle: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        codec.decode_certificates(bundle, digest(bundle), 2)


def test_an_offer_whose_certificates_could_fill_the_disk_is_refused() -> None:
    offer = OpenSession(make_proposal(make_plan(3)), b"{}", 17, bytes(32), 3 * (codec.MAX_CERTIFICATE_BYTES + 4) + 1)
    with pytest.raises(WireError, match="certificates_size"):
        codec.decode_response(codec.encode_response(bytes(32), offer, 0), 0)
    offer = replace(offer, certificates_digest=bytes(31), certificates_size=1)
    with pytest.raises(WireError, match="certificates_digest"):
        codec.decode_response(codec.encode_response(bytes(32), offer, 0), 0)
