"""Shares that the coordinator spoils on their way from the dealer to the holder.

A holder that finds a share bad says so by giving away the key of that one direction (a complaint); so whatever the
relay can spoil must never look like the dealer's fault. What a dealer spoils is in `test_lying_sites`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

import pytest
from tests.attacks.liar_coordinator import SITES, Session, against, changed

from maskwork.secagg import server_requests
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.messages import Complaint, DeliveredShares
from maskwork.wire import codec
from maskwork.wire.v1 import session_pb2

VICTIM: Final = "site-a"
Spoil: TypeAlias = Callable[[Session, DeliveredShares], DeliveredShares]
SpoilBytes: TypeAlias = Callable[[session_pb2.DeliveredShares], None]


def flipped_ciphertext(_: Session, message: DeliveredShares) -> DeliveredShares:
    first = message.shares[0]
    spoilt = replace(first, ciphertext=first.ciphertext[:-1] + bytes([first.ciphertext[-1] ^ 1]))
    return replace(message, shares=(spoilt, *message.shares[1:]))


def flipped_commitment(_: Session, message: DeliveredShares) -> DeliveredShares:
    first = replace(message.shares[0], self_commitment=bytes(32))
    return replace(message, shares=(first, *message.shares[1:]))


def meant_for_another_holder(session: Session, message: DeliveredShares) -> DeliveredShares:
    assert isinstance(session.state, core.CollectingUpdates)
    of_d = server_requests.request(session.state, session.index("site-d"))
    assert isinstance(of_d, DeliveredShares)
    dealer = session.index("site-b")
    other = next(s for s in of_d.shares if s.dealer == dealer)
    return replace(message, shares=tuple(other if s.dealer == dealer else s for s in message.shares))


def two_dealers_swapped(_: Session, message: DeliveredShares) -> DeliveredShares:
    one, two, *rest = message.shares
    swapped = (replace(two, dealer=one.dealer), replace(one, dealer=two.dealer), *rest)
    return replace(message, shares=swapped)


def one_dealer_twice(_: Session, message: DeliveredShares) -> DeliveredShares:
    one, two, *rest = message.shares
    return replace(message, shares=(one, replace(one, dealer=two.dealer), *rest))


def one_withheld(_: Session, message: DeliveredShares) -> DeliveredShares:
    return replace(message, shares=message.shares[1:])


def a_dealer_that_is_not_in_u2(_: Session, message: DeliveredShares) -> DeliveredShares:
    return replace(message, u2=message.u2 - {message.shares[-1].dealer})


def another_number_of_holders(_: Session, message: DeliveredShares) -> DeliveredShares:
    return replace(message, shares=tuple(replace(s, holders=3) for s in message.shares))


SPOILT: Final[list[tuple[Spoil, AbortReason]]] = [
    (flipped_ciphertext, AbortReason.BAD_COMMITMENT_PROOF),
    (flipped_commitment, AbortReason.BAD_COMMITMENT_PROOF),
    (meant_for_another_holder, AbortReason.BAD_COMMITMENT_PROOF),
    (two_dealers_swapped, AbortReason.BAD_PEER_SIGNATURE),
    (one_dealer_twice, AbortReason.BAD_PEER_SIGNATURE),
    (one_withheld, AbortReason.BAD_SETS),
    (a_dealer_that_is_not_in_u2, AbortReason.BAD_SETS),
    (another_number_of_holders, AbortReason.BAD_PEER_SIGNATURE),
]


@pytest.mark.parametrize(("spoil", "reason"), SPOILT, ids=lambda p: getattr(p, "__name__", ""))
async def test_a_share_that_is_spoilt_on_its_way(spoil: Spoil, reason: AbortReason, tmp_path: Path) -> None:
    """Attack: one site gets shares that are altered, swapped, doubled or withheld, so that it complains and gives keys
    away, or holds nothing that anybody could use. Expected: it sees that the dealer did not send this, and leaves; it
    complains of nobody and uploads nothing. The others have their sum without it.
    """
    async with against(tmp_path) as (liar, _):

        def to_the_victim(name: str, message: DeliveredShares) -> DeliveredShares:
            return spoil(session, message) if name == VICTIM else message

        session = liar.open(liar.plan(SITES), changed(DeliveredShares, to_the_victim))
        await liar.leaves(VICTIM, session.id, reason)
        await session.ends()
        assert isinstance(session.state, core.Completed)
        assert session.state.survivors == frozenset({1, 2, 3})
        assert not liar.answers(VICTIM, session.id, Complaint)
        assert (session.id, VICTIM) not in liar.uploads


def the_same_dealer_again(message: session_pb2.DeliveredShares) -> None:
    message.shares.append(message.shares[0])


def a_ciphertext_cut_short(message: session_pb2.DeliveredShares) -> None:
    message.shares[0].ciphertext = message.shares[0].ciphertext[:-1]


def no_ciphertext(message: session_pb2.DeliveredShares) -> None:
    message.shares[0].ciphertext = b""


def a_member_beyond_the_roster(message: session_pb2.DeliveredShares) -> None:
    message.u2 = b"\xff"


@pytest.mark.parametrize(
    "spoil", [the_same_dealer_again, a_ciphertext_cut_short, no_ciphertext, a_member_beyond_the_roster]
)
async def test_shares_that_are_no_message(spoil: SpoilBytes, tmp_path: Path) -> None:
    """Attack: the same with what no message can hold. Expected: it is not decoded, and the site leaves."""
    async with against(tmp_path) as (liar, _):

        def to_the_victim(name: str, message: DeliveredShares) -> DeliveredShares | bytes:
            if name != VICTIM:
                return message
            response = codec.encode_response(session.id, message, len(SITES))
            spoil(response.delivered_shares)
            return response.SerializeToString()

        session = liar.open(liar.plan(SITES), changed(DeliveredShares, to_the_victim))
        await liar.leaves(VICTIM, session.id, AbortReason.UNEXPECTED_MESSAGE)
        assert not liar.answers(VICTIM, session.id, Complaint)
        assert (session.id, VICTIM) not in liar.uploads
