"""A member that lies to a real coordinator, with four honest ones beside it: who is blamed, and what the job says.

The liar is of no more use than a dropout wherever a lie can be seen; what cannot be seen is in the last part.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tests.attacks.liar_site import HONEST, LIAR, STEPS, Arena, RingElements, arena, everybody, instead
from tests.fuzz.honest import EXAMPLES
from tests.secagg.test_plan import SMALL_ORDER

from maskwork.job import Cohort
from maskwork.job_events import JobDetails
from maskwork.participant.driver import Driver
from maskwork.secagg import client_states as states
from maskwork.secagg import keys
from maskwork.secagg.dealing import Dealer, deal, leaves
from maskwork.secagg.errors import AbortReason, DropReason
from maskwork.secagg.keys import PublicKey, SecretKey
from maskwork.secagg.messages import AdvertiseKeys, Complaint, ConsistencyCheck, DealtShare, ShareKeys, Unmask
from maskwork.wire import codec
from maskwork.wire.codec import Request
from maskwork.wire.v1 import federation_pb2

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("attacks")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def field(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Arena]:
    async with arena(tmp_path_factory.mktemp("arena")) as made:
        yield made


def mean_of(*names: str) -> float:
    return sum(STEPS[n] for n in names) / len(names)


def committed(details: JobDetails) -> tuple[int, tuple[str, ...]]:
    """The attempt and the survivors of a job's only round."""
    assert details.job.state == "completed", details.job.reason
    (round_,) = details.rounds
    return round_.attempt, round_.survivors


def blamed(details: JobDetails) -> list[tuple[str, str]]:
    return [(drop.participant, drop.reason) for drop in details.drops]


async def test_without_a_lie_everybody_is_in_the_sum(field: Arena) -> None:
    async with field.lying():
        details = await field.run(everybody("honest"))
    assert committed(details) == (1, (*HONEST, LIAR))
    assert not details.drops
    assert field.mean(details) == pytest.approx(mean_of(*HONEST, LIAR), abs=1e-4)


# --- keys -----------------------------------------------------------------------------------------------------------


async def test_a_member_that_advertises_a_degenerate_point_is_dropped(field: Arena) -> None:
    """Attack: a key of small order, properly signed, every one there is. Expected: dropped, the round goes on."""
    for u in SMALL_ORDER:

        def degenerate(state: states.State, _: Request, u: int = u) -> AdvertiseKeys:
            assert isinstance(state, states.AdvertisedKeys)
            point, session = PublicKey(u.to_bytes(32, "little")), state.session
            signed = AdvertiseKeys.signed_bytes(point, state.sent.mask_key, session=session.id, sender=session.index)
            return AdvertiseKeys(point, state.sent.mask_key, session.site.signer.sign(signed))

        async with field.lying(instead(AdvertiseKeys, degenerate)):
            details = await field.run(everybody(f"degenerate-{u % 1000}"))
        assert committed(details) == (1, HONEST)
        assert blamed(details) == [(LIAR, DropReason.DEGENERATE_KEY)]


async def test_a_member_that_advertises_keys_which_it_did_not_sign_is_dropped(field: Arena) -> None:
    """Attack: other keys under the signature of its first ones. Expected: dropped, the round goes on."""

    def unsigned(_: states.State, message: Request) -> AdvertiseKeys:
        assert isinstance(message, AdvertiseKeys)
        other = PublicKey(X25519PrivateKey.generate().public_key().public_bytes_raw())
        return replace(message, mask_key=other)

    async with field.lying(instead(AdvertiseKeys, unsigned)):
        details = await field.run(everybody("unsigned"))
    assert committed(details) == (1, HONEST)
    assert blamed(details) == [(LIAR, DropReason.BAD_SIGNATURE)]


# --- dealing --------------------------------------------------------------------------------------------------------


def signed_dealing(state: states.SharedKeys, message: ShareKeys, shares: tuple[DealtShare, ...]) -> ShareKeys:
    """A dealing that the liar stands by: root and signature are right for what is in it."""
    session = state.session
    root, _ = keys.merkle_tree(leaves(shares, owner=session.index, session=session.id))
    body = ShareKeys.signed_bytes(message.seed_commitment, root, len(shares), session=session.id, sender=session.index)
    return replace(message, root=root, shares=shares, signature=session.site.signer.sign(body))


def garbled(state: states.SharedKeys, message: ShareKeys) -> ShareKeys:
    """One holder's shares are not the committed ones, under the right key."""
    session, victim = state.session, 0
    key = keys.share_key(
        state.secrets.encryption_secret,
        own=state.secrets.encryption_secret.public(),
        peer=state.peers[victim].encryption_key,
        dealer=session.index,
        holder=victim,
        own_index=session.index,
        session=session.id,
    )
    sealed = keys.seal(key, bytes(98), dealer=session.index, holder=victim, session=session.id)
    shares = tuple(replace(s, ciphertext=sealed) if s.holder == victim else s for s in message.shares)
    return signed_dealing(state, message, shares)


def swapped(state: states.SharedKeys, message: ShareKeys) -> ShareKeys:
    """Two holders get each other's ciphertext."""
    one, two, *rest = message.shares
    pair = (replace(one, ciphertext=two.ciphertext), replace(two, ciphertext=one.ciphertext))
    return signed_dealing(state, message, (*pair, *rest))


def one_holder_left_out(state: states.SharedKeys, message: ShareKeys) -> ShareKeys:
    return signed_dealing(state, message, message.shares[1:])


def another_root(_: states.SharedKeys, message: ShareKeys) -> ShareKeys:
    return replace(message, root=bytes(32))


def nobody_signed(_: states.SharedKeys, message: ShareKeys) -> ShareKeys:
    return replace(message, signature=message.signature[::-1])


Deal = Callable[[states.SharedKeys, ShareKeys], ShareKeys]


def dealing(change: Deal) -> Callable[[states.State, Request], Request]:
    def lie(state: states.State, message: Request) -> Request:
        assert isinstance(state, states.SharedKeys)
        assert isinstance(message, ShareKeys)
        return change(state, message)

    return lie


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_holder_left_out, DropReason.WRONG_RECIPIENTS),
        (another_root, DropReason.WRONG_COMMITMENTS),
        (nobody_signed, DropReason.BAD_SIGNATURE),
    ],
)
async def test_a_dealing_that_the_coordinator_can_see_is_wrong(change: Deal, reason: str, field: Arena) -> None:
    """Attack: shares withheld from a holder, or not under the signed root. Expected: dropped before anybody is dealt
    anything by it; the round goes on.
    """
    async with field.lying(instead(ShareKeys, dealing(change))):
        details = await field.run(everybody(f"dealing-{change.__name__}"))
    assert committed(details) == (1, HONEST)
    assert blamed(details) == [(LIAR, reason)]


async def test_a_dealing_with_one_holder_twice_is_no_message(field: Arena) -> None:
    """Attack: the same holder twice, so that another has none. Expected: it cannot be decoded; its stream is closed."""

    def say(_: Driver, session: bytes, message: Request) -> Sequence[Request | federation_pb2.ConnectRequest]:
        request = codec.encode_request(session, message)
        if isinstance(message, ShareKeys):
            request.share_keys.shares[1].CopyFrom(request.share_keys.shares[0])
        return (request,)

    async with field.lying(say):
        details = await field.run(everybody("twice"))
    assert committed(details)[1] == HONEST
    assert blamed(details)[0] == (LIAR, DropReason.MALFORMED)


async def test_a_dishonest_dealer_is_convicted_by_its_own_signature_and_the_round_retried(field: Arena) -> None:
    """Attack: one holder's share is not the one that was committed to; at step 4 it would be the holder's word against
    the dealer's. Expected: the holder complains before it uploads; the coordinator judges by the same check, keeps the
    signed transcript, and opens a new attempt without the dealer, which no reconnection lets in again.
    """
    async with field.lying(instead(ShareKeys, dealing(garbled))):
        details = await field.run(everybody("garbled"))
    assert committed(details) == (2, HONEST)
    assert ("site-a", DropReason.WITHDREW) not in blamed(details)
    assert evidence(field) == [(LIAR, DropReason.DISHONEST_DEALER)]


async def test_swapped_ciphertexts_cost_the_dealer_its_place(field: Arena) -> None:
    """Attack: two holders get each other's ciphertext: neither opens. Expected: nobody can tell whether dealer or
    holder lies, so both are left out until they connect anew; the round is retried with the others.
    """
    async with field.lying(instead(ShareKeys, dealing(swapped))):
        details = await field.run(everybody("swapped"))
        attempt, survivors = committed(details)
    assert attempt == 2
    assert LIAR not in survivors
    assert len(survivors) == 3
    assert evidence(field) == [(LIAR, DropReason.DISPUTED_CIPHERTEXT)]
    for running in field.honest:
        running.link.redial()


def evidence(field: Arena) -> list[tuple[str, str]]:
    return [(e["accused"], e["kind"]) for e in field.world.all[0].lines if e["event"] == "evidence kept"][-1:]


# --- the end of a session -------------------------------------------------------------------------------------------


def forged_share(_: states.State, message: Request) -> Unmask:
    assert isinstance(message, Unmask)
    return Unmask((replace(message.shares[0], share=bytes(33)), *message.shares[1:]))


def withheld_share(_: states.State, message: Request) -> Unmask:
    assert isinstance(message, Unmask)
    return Unmask(message.shares[1:])


def shares_exchanged(_: states.State, message: Request) -> Unmask:
    assert isinstance(message, Unmask)
    one, two, *rest = message.shares
    return Unmask((replace(two, owner=one.owner), replace(one, owner=two.owner), *rest))


def the_other_secret(state: states.State, message: Request) -> Unmask:
    """Its share of a survivor's mask key, which it holds and was not asked for."""
    assert isinstance(message, Unmask)
    first = message.shares[0]
    return Unmask((replace(first, kind=keys.ShareKind.MASK_SECRET), *message.shares[1:]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (forged_share, DropReason.SHARE_MISMATCH),
        (shares_exchanged, DropReason.SHARE_MISMATCH),
        (withheld_share, DropReason.WRONG_SHARES),
        (the_other_secret, DropReason.WRONG_SHARES),
    ],
)
async def test_a_share_forged_or_withheld_at_unmasking(
    change: Callable[[states.State, Request], Request], reason: str, field: Arena
) -> None:
    """Attack: at the very end, when every update is in the sum, a holder gives a wrong share, or not all of them.
    Expected: it is seen not to be what the dealer signed for; the holder is blamed, not the dealer, and the round is
    saved with the shares of the others, the liar's update in it.
    """
    async with field.lying(instead(Unmask, change)):
        details = await field.run(everybody(f"unmask-{change.__name__}"))
    assert committed(details) == (1, (*HONEST, LIAR))
    assert blamed(details) == [(LIAR, reason)]
    assert field.mean(details) == pytest.approx(mean_of(*HONEST, LIAR), abs=1e-4)


async def test_a_member_that_says_nothing_at_unmasking_does_not_cost_the_round(field: Arena) -> None:
    """Attack: all shares withheld, by silence. Expected: the others' suffice; the round is saved at the deadline."""
    async with field.lying(instead(Unmask, lambda _s, _m: None)):
        spec = everybody("silent")
        details = await field.run(
            spec.model_copy(update={"deadlines": spec.deadlines.model_copy(update={"unmask_s": 1.0})})
        )
    assert committed(details) == (1, (*HONEST, LIAR))
    assert blamed(details) == [(LIAR, DropReason.DEADLINE)]


async def test_a_dealer_whose_shares_open_to_something_else_is_convicted_and_the_same_model_rule_holds(
    field: Arena,
) -> None:
    """Attack: every share matches its commitment, and together they give another secret than the dealer announced, so
    that the masks cannot be taken off. Expected: the transcript convicts the dealer and no sum is released. By then the
    honest have answered for a set with the dealer in it, and on the same model they answer for no other: the retry
    without the dealer is declined, the job waits and says why, and goes on from another model. A liar can cost a job
    its model; it cannot turn the retry into a difference.
    """

    def another_secret(state: states.SharedKeys, message: ShareKeys) -> ShareKeys:
        session = state.session
        dealt, _ = deal(
            Dealer(
                session.index,
                session.id,
                session.plan.graph.threshold,
                state.secrets.encryption_secret.public(),
                state.secrets.mask_secret.public(),
            ),
            replace(state.secrets, self_seed=bytes(32), mask_secret=SecretKey(b"\5" * 32)),
            holders=[s.holder for s in message.shares],
            encryption_keys={i: peer.encryption_key for i, peer in state.peers.items()},
            stream_key=bytes(16),
            signer=session.site.signer,
        )
        return signed_dealing(state, replace(dealt, seed_commitment=message.seed_commitment), dealt.shares)

    def say(driver: Driver, session: bytes, message: Request) -> Sequence[Request]:
        if isinstance(message, Unmask):
            return ()  # its own shares do not match what it dealt, and it knows
        return instead(ShareKeys, dealing(another_secret))(driver, session, message)  # type: ignore[return-value]

    async with field.lying(say):
        spec = everybody("equivocating")
        deadlines = spec.deadlines.model_copy(update={"unmask_s": 1.0})
        why, details = await field.run_until_it_waits(spec.model_copy(update={"deadlines": deadlines}))
    assert evidence(field) == [(LIAR, DropReason.EQUIVOCATED_DEALER)]
    assert f"{LIAR}: {AbortReason.DEALER_EQUIVOCATED}" in why
    declined = {d.participant: d.detail for d in details.drops if d.reason == DropReason.DECLINED}
    assert declined.keys() == set(HONEST)
    for detail in declined.values():
        assert "on this model a sum over 5 sites was released" in detail
    assert not details.rounds
    again = await field.run(everybody("from-another-model", cohort=Cohort(participants=HONEST, min_participants=4)))
    assert committed(again) == (1, HONEST)


# --- replays and turns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdvertiseKeys, ShareKeys, ConsistencyCheck, Unmask], ids=lambda kind: kind.__name__)
async def test_a_member_that_says_again_what_it_said_in_the_last_round(kind: type, field: Arena) -> None:
    """Attack: the liar's own message of round 1, genuine, in round 2. Expected: it carries another session's id under
    its signature, root or commitment; dropped, and the round goes on.
    """
    earlier: list[Request] = []

    def say(_: Driver, session: bytes, message: Request) -> Sequence[Request]:
        if isinstance(message, kind):
            earlier.append(message)
            return (earlier[0],)
        return (message,)

    async with field.lying(say):
        details = await field.run(everybody(f"again-{kind.__name__.lower()}", rounds=2))
    assert details.job.state == "completed"
    assert [d.round_number for d in details.drops] == [2]
    reasons = {
        AdvertiseKeys: DropReason.BAD_SIGNATURE,
        ShareKeys: DropReason.WRONG_COMMITMENTS,
        ConsistencyCheck: DropReason.BAD_SIGNATURE,
        Unmask: DropReason.SHARE_MISMATCH,
    }
    assert blamed(details) == [(LIAR, reasons[kind])]


async def test_a_false_accuser_is_left_out_and_the_accused_is_not(field: Arena) -> None:
    """Attack: a complaint about a dealing that is in order, with the true key. Expected: the accuser is convicted."""
    given: list[bytes] = []

    def say(driver: Driver, session: bytes, message: Request) -> Sequence[Request]:
        work = driver._work
        assert work is not None
        if isinstance(message, ShareKeys):
            state = work.state
            assert isinstance(state, states.SharedKeys)
            key = keys.share_key(
                state.secrets.encryption_secret,
                own=state.secrets.encryption_secret.public(),
                peer=state.peers[0].encryption_key,
                dealer=0,
                holder=state.session.index,
                own_index=state.session.index,
                session=session,
            )
            given.append(key)
        if isinstance(message, codec.UploadReady):
            return (Complaint(0, given[-1]),)
        return (message,)

    async with field.lying(say):
        details = await field.run(everybody("accuser"))
    assert committed(details) == (2, HONEST)
    assert evidence(field) == [(LIAR, DropReason.FALSE_ACCUSATION)]


# --- what is in the update ------------------------------------------------------------------------------------------


async def test_an_update_beyond_the_clip_norm_is_not_caught(field: Arena) -> None:
    """Attack: a modified participant masks a ring element of its choice, far beyond what clipping admits. **It is not
    caught, and cannot be**: a masked vector of the right length is all that anybody sees. The sum moves by as much as
    the liar wants, as far as the ring is wide; nobody can tell who did it. What bounds it at the honest end: nothing.
    """
    honest = mean_of(*HONEST, LIAR)
    async with field.lying(worker=RingElements(1 << 20)):
        details = await field.run(everybody("boosted"))
    assert committed(details) == (1, (*HONEST, LIAR))
    assert not details.drops
    assert abs(field.mean(details) - honest) > 0.01


async def test_a_count_that_makes_the_sum_impossible_is_caught_and_nobody_knows_whose_it_was(field: Arena) -> None:
    """Attack: a modified participant claims a million examples under a weight cap of ten. Expected: the sum of the
    counts is beyond what the survivors could have; no model is made of it. Whose count it was is masked: nobody is
    blamed, and the job fails.
    """
    async with field.lying(worker=RingElements(0, examples=1e6)):
        details = await field.run(everybody("million", max_attempts=1))
    assert details.job.state == "failed"
    assert AbortReason.AGGREGATION_FAILED in details.job.reason
    assert "example counts" in str([e for e in field.world.all[0].lines if e["event"] == "attempt aborted"][-1])
    assert not details.rounds
    assert not details.drops


async def test_a_count_that_the_sum_can_bear_is_not_caught(field: Arena) -> None:
    """Attack: a modified participant claims minus thirty examples, so that the mean is taken over ten instead of fifty.
    **It is not caught**: the sum of the counts is one that honest sites could have. The mean is too large by the
    factor; the bound is the number of survivors, below which the sum is refused.
    """
    async with field.lying(worker=RingElements(0, examples=-3.0 * EXAMPLES)):
        details = await field.run(everybody("minus-thirty"))
    assert committed(details) == (1, (*HONEST, LIAR))
    assert field.mean(details) == pytest.approx(4 * mean_of(*HONEST), abs=1e-3)
