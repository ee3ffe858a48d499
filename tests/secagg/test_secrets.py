"""No secret is ever part of a repr, an error or a message that it should not be in; states drop what they need not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace

import pytest
from tests.secagg.cohort import NOW, make_plan, session_seed
from tests.secagg.harness import Federation, clean_run
from tests.secagg.test_participant_checks_of_sums import dealt_anew

from maskwork.secagg import client, dealing, keys
from maskwork.secagg.client_states import (
    Aborted,
    AdvertisedKeys,
    Completed,
    Masking,
    MaskUpdate,
    Send,
    SharedKeys,
    SignedSets,
    Unmasked,
    Uploading,
    UploadUpdate,
)
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.messages import Complaint, DeliveredShares, ShareKeys, Unmask
from maskwork.secagg.server_states import RemoveMasks
from maskwork.secagg.unmasking import remaining_masks

OWN = 0


def run_with_a_dropout() -> Federation:
    return Federation(make_plan(5), dies_before={3: UploadUpdate}).run()


def secrets_of(run: Federation, index: int) -> dict[str, bytes]:
    """Everything secret that this member ever had."""
    member = run.members[index]
    seed = session_seed(index, run.seed)
    made = keys.derive_session_secrets(seed)
    secret = {
        "session seed": seed,
        "dealing stream": keys.dealing_stream_key(seed),
        "encryption secret": made.encryption_secret.raw,
        "mask secret": made.mask_secret.raw,
        "self seed": made.self_seed,
        "rounding key": made.rounding_key,
    }
    for owner, held in member.before(SignedSets).held.items():
        for kind in ShareKind:
            revealed = held.reveal(owner, kind)
            secret |= {f"share {kind.name} of {owner}": revealed.share, f"salt {kind.name} of {owner}": revealed.salt}
    masks = next(e for e in member.effects if isinstance(e, MaskUpdate)).keys
    secret |= {f"mask {i}": k.key for i, k in enumerate((*masks.update, *masks.statistics))}
    return secret


def spellings(secret: bytes) -> Iterator[str]:
    yield secret.hex()
    yield repr(secret)[2:-1]
    yield str(int.from_bytes(secret, "big"))
    yield str(int.from_bytes(secret, "little"))


def assert_silent(text: str, secrets: dict[str, bytes]) -> None:
    for name, secret in secrets.items():
        assert not any(spelling in text for spelling in spellings(secret)), f"{name} is in {text[:60]}…"


def test_no_secret_is_in_the_repr_of_a_state_an_effect_or_a_message() -> None:
    run = run_with_a_dropout()
    secrets = {f"{i}: {name}": secret for i in (0, 4) for name, secret in secrets_of(run, i).items()}
    texts = []
    for member in run.members:
        texts += [repr(thing) for entry in member.history for thing in (entry[0], entry[1], *entry[2].effects)]
        texts += [repr(member.state), *map(repr, member.effects), *map(repr, member.sent)]
    for before, event, step in run.history:
        texts += [repr(before), repr(event), *map(repr, step.effects)]
    job = next(e.job for e in run.effects if isinstance(e, RemoveMasks))
    texts += [repr(job), repr(remaining_masks(job))]
    assert len(texts) > 100
    everything = "\n".join(texts)
    assert_silent(everything, secrets)
    assert_silent(everything, {"removed mask": remaining_masks(job).update[0].key})


def test_the_search_would_find_a_secret() -> None:
    with pytest.raises(AssertionError):
        assert_silent(repr(b"\x00secret\xff!"), {"it": b"\x00secret\xff!"})


def test_no_secret_is_in_the_repr_of_a_complaint_or_of_what_it_ends_in() -> None:
    run = clean_run(5)
    message = run.members[OWN].message(DeliveredShares)
    bad = dealt_anew(1, message.shares, self_commitment=bytes(32))
    step = client.step(
        run.members[OWN].before(SharedKeys), replace(message, shares=(bad, *message.shares[1:])), now=NOW
    )
    sent = step.effects[0]
    assert isinstance(sent, Send)
    assert isinstance(sent.message, Complaint)
    assert_silent(repr(step), {"the evidence": sent.message.key, **secrets_of(run, OWN)})


def test_no_secret_is_in_an_error_about_secrets() -> None:
    held = clean_run(5).members[OWN].before(SignedSets).held[1]
    assert_silent(repr(held), {"encoded": held.encode()})
    for wrong in (b"\x5a" * 31, b"\x5a" * 33):
        for make in (keys.SecretKey, keys.derive_session_secrets):
            with pytest.raises(ValueError, match="32 bytes") as caught:
                make(wrong)
            assert_silent(str(caught.value), {"it": wrong})


def all_bytes(value: object) -> Iterator[bytes]:
    """Every byte string reachable from a value."""
    if isinstance(value, bytes):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from all_bytes(getattr(value, field.name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from all_bytes(inner)
    elif isinstance(value, tuple | frozenset):
        for inner in value:
            yield from all_bytes(inner)


def test_a_state_drops_the_secrets_that_the_next_one_does_not_need() -> None:
    run = clean_run(5)
    member, seed = run.members[OWN], session_seed(OWN, run.seed)
    made = keys.derive_session_secrets(seed)
    session = {made.encryption_secret.raw, made.mask_secret.raw, made.self_seed, made.rounding_key}
    stream = keys.dealing_stream_key(seed)
    held = member.before(SignedSets).held
    shares = {h.reveal(v, kind).share for v, h in held.items() for kind in ShareKind}
    masks = {k.key for e in member.effects if isinstance(e, MaskUpdate) for k in (*e.keys.update, *e.keys.statistics)}

    assert {stream, *session} <= set(all_bytes(member.before(AdvertisedKeys)))
    assert seed not in set(all_bytes(member.before(AdvertisedKeys)))
    assert session <= set(all_bytes(member.before(SharedKeys)))
    assert stream not in set(all_bytes(member.before(SharedKeys)))
    for kind in (Masking, Uploading, SignedSets):
        kept = set(all_bytes(member.before(kind)))
        assert shares <= kept
        assert not kept & (session | masks | {stream})
    sent = {s.share for s in member.before(Unmasked).sent.shares}
    assert set(all_bytes(member.before(Unmasked))) & (shares | session | masks) == sent
    for over in (member.before(Completed), client.step(member.before(SharedKeys), run.proposal, now=NOW).state):
        assert isinstance(over, Completed | Aborted)
        assert not set(all_bytes(over)) & (shares | session | masks | {stream})


def test_nothing_that_leaves_before_step_4_holds_a_share_or_a_key_in_clear() -> None:
    run = clean_run(5)
    secrets = set(secrets_of(run, OWN).values())
    for message in run.members[OWN].sent:
        if not isinstance(message, Unmask):
            body = b"".join(all_bytes(message))
            assert not any(secret in body for secret in secrets if len(secret) > 8)


def test_shares_for_different_holders_and_secrets_all_differ() -> None:
    message = clean_run(10).members[OWN].answer(ShareKeys)
    ciphertexts = [s.ciphertext for s in message.shares if s.ciphertext]
    commitments = [c for s in message.shares for c in (s.self_commitment, s.mask_commitment)]
    assert len(set(ciphertexts)) == 9
    assert len(set(commitments)) == 20


def test_what_is_dealt_depends_on_nothing_but_its_arguments() -> None:
    run, other = clean_run(5), Federation(make_plan(5)).run()
    assert [m.sent for m in run.members] == [m.sent for m in other.members]
    assert dealing.open_held(None, self_commitment=b"", mask_commitment=b"", owner=0, holder=1, session=b"") is None
