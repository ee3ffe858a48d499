"""Every dataclass of the core that can hold a secret, and every error about one: neither shows it.

`test_secrets` looks at what sessions are made of. Here the classes are walked themselves, so that one added tomorrow is
asked too: each has to turn up in a session, or to be in a list with the reason why it needs no looking at.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace

import pytest
from tests.secagg.cohort import session_seed
from tests.secagg.harness import Federation
from tests.secagg.test_secrets import assert_silent, run_with_a_dropout, secrets_of

import maskwork.secagg
from maskwork.secagg import client, dealing, keys, prg, server, sharing, unmasking
from maskwork.secagg.client_states import SharedKeys, UpdateMasked
from maskwork.secagg.errors import DealerEquivocated, IllegalEvent
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.masking import MaskingKeys
from maskwork.secagg.messages import Complaint, RevealedShare, Unmask
from maskwork.secagg.server_states import CollectingUnmask, MasksRemoved, Received, RemoveMasks
from maskwork.wire import codec
from maskwork.wire.errors import WireError
from maskwork.wire.v1 import federation_pb2

SECRET = b"\x9d\x11 a secret of 32 bytes, always\xfe"


def dataclasses_of_the_core() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in pkgutil.iter_modules(maskwork.secagg.__path__, "maskwork.secagg."):
        for thing in vars(importlib.import_module(module.name)).values():
            if isinstance(thing, type) and is_dataclass(thing) and thing.__module__.startswith("maskwork.secagg"):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found


def reachable(value: object, seen: set[int]) -> Iterator[object]:
    """Every dataclass instance that a value is made of, itself included."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if is_dataclass(value) and not isinstance(value, type):
        yield value
        inner: list[object] = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, tuple | list | frozenset | set):
        inner = list(value)
    else:
        return
    for item in inner:
        yield from reachable(item, seen)


def own_bytes(instance: object) -> Iterator[bytes]:
    assert is_dataclass(instance)
    for field in fields(instance):
        if isinstance(value := getattr(instance, field.name), bytes):
            yield value


def everything_of(run: Federation) -> list[object]:
    things: list[object] = [run.proposal, run.state, *run.effects]
    things += [item for before, event, step in run.history for item in (before, event, step)]
    for member in run.members:
        things += [member.site, member.state, *member.effects, *member.sent, *member.received]
        things += [item for entry in member.history for item in entry]
    return things


@pytest.fixture(scope="module")
def run() -> Federation:
    return run_with_a_dropout()


@pytest.fixture(scope="module")
def secrets(run: Federation) -> dict[str, bytes]:
    found = {f"{i}: {name}": secret for i in range(5) if i != 3 for name, secret in secrets_of(run, i).items()}
    job = next(e.job for e in run.effects if isinstance(e, RemoveMasks))
    masks = unmasking.remaining_masks(job)
    return found | {f"mask {i}": k.key for i, k in enumerate((*masks.update, *masks.statistics))}


def test_no_dataclass_of_a_session_shows_a_secret_that_it_holds(run: Federation, secrets: dict[str, bytes]) -> None:
    """Each by itself: a repr that hides a field may still call one that does not."""
    seen: set[int] = set()
    made = keys.derive_session_secrets(session_seed(0, run.seed))
    job = next(e.job for e in run.effects if isinstance(e, RemoveMasks))
    things = [*everything_of(run), made, unmasking.remaining_masks(job)]
    instances = [instance for thing in things for instance in reachable(thing, seen)]
    values = set(secrets.values())
    holders = {type(i).__qualname__ for i in instances if values & set(own_bytes(i))}
    assert {"SecretKey", "SessionSecrets", "HeldShares", "RevealedShare", "SignedKey", "MaskingKeys"} <= holders
    everything = "\n".join(repr(instance) for instance in instances)
    assert_silent(everything, secrets)
    assert_silent("\n".join(map(str, instances)), secrets)


BYTES_THAT_ARE_PUBLIC = frozenset(
    (
        "audit_head",
        "ciphertext",
        "commitment",
        "fingerprint",
        "id",
        "mask_commitment",
        "model_digest",
        "nonce",
        "plan_bytes",
        "previous_survivors",
        "raw",
        "revocation_digest",
        "root",
        "seed_commitment",
        "self_commitment",
        "session",
        "signature",
        "training_digest",
    )
)
"""Names of fields whose bytes everybody may see. `raw` is a public key's; a secret key's is looked at by name."""


def test_a_field_of_bytes_is_hidden_or_of_a_name_that_is_public() -> None:
    shown = {
        f"{name}.{field.name}"
        for name, cls in dataclasses_of_the_core().items()
        for field in fields(cls)
        if str(field.type).startswith("bytes") and field.repr and field.name not in BYTES_THAT_ARE_PUBLIC
    }
    assert shown == set()
    hidden = {
        (cls, field.name) for cls in dataclasses_of_the_core().values() for field in fields(cls) if not field.repr
    }
    for cls, name in (
        (keys.SecretKey, "raw"),
        (keys.SessionSecrets, "self_seed"),
        (keys.SessionSecrets, "rounding_key"),
        (keys.SoftwareSigner, "private_key"),
        (dealing.HeldShares, "self_share"),
        (dealing.HeldShares, "mask_share"),
        (RevealedShare, "share"),
        (Complaint, "key"),
        (MaskingKeys, "rounding_key"),
        (prg.SignedKey, "key"),
    ):
        assert (cls, name) in hidden, f"{cls.__name__}.{name}"


# --- errors ---------------------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """All that a log, a crash report or a person could get of an error, with what it was raised from."""
    chain, words = [error], []
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(following)
    for link in chain:
        words += [str(link), repr(link), repr(link.args), repr(vars(link))]
    return "\n".join([*words, *traceback.format_exception(error)])


SHARE = b"\x00" + SECRET
BEYOND = b"\x01" + SECRET

MISTAKES: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    "a share too long": (sharing.SharingError, lambda: sharing.combine({1: SHARE + b"!", 2: SHARE})),
    "a share beyond the prime": (sharing.SharingError, lambda: sharing.combine({1: BEYOND, 2: SHARE})),
    "a secret too short": (
        sharing.SharingError,
        lambda: sharing.split(SECRET[:31], holders=[1, 2, 3], threshold=2, rand=bytes(64)),
    ),
    "randomness too short": (
        sharing.SharingError,
        lambda: sharing.split(SECRET, holders=[1, 2, 3], threshold=2, rand=SECRET),
    ),
    "a key too long": (ValueError, lambda: keys.SecretKey(SECRET + b"!")),
    "a seed too long": (ValueError, lambda: keys.derive_session_secrets(SECRET + b"!")),
    "a mask key too long": (ValueError, lambda: prg.SignedKey(SECRET, negative=False)),
    "a rounding key too long": (ValueError, lambda: MaskingKeys((), (), SECRET)),
    "an AEAD key too long": (ValueError, lambda: keys.seal(SECRET + b"!", b"", dealer=0, holder=1, session=bytes(32))),
    "a public key of small order": (
        keys.DegenerateKey,
        lambda: keys.agree(keys.SecretKey(SECRET), keys.PublicKey(bytes(32))),
    ),
    "a revealed share too short": (ValueError, lambda: RevealedShare(0, ShareKind.SELF_SEED, SECRET[:16], SECRET)),
    "a complaint's key too long": (ValueError, lambda: Complaint(0, SECRET + b"!")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_error_about_a_secret_says_nothing_of_it(name: str) -> None:
    expected, make = MISTAKES[name]
    with pytest.raises(expected) as caught:
        make()
    assert_silent(told(caught.value), {"the secret": SECRET, "its beginning": SECRET[:16], "its end": SECRET[-16:]})


def test_a_message_with_a_share_that_cannot_be_decoded_is_refused_without_it(run: Federation) -> None:
    unmask = run.members[0].answer(Unmask)
    request = codec.encode_request(run.id, unmask)
    shares = {f"share {i}": s.share for i, s in enumerate(unmask.shares)} | {
        f"salt {i}": s.salt for i, s in enumerate(unmask.shares)
    }
    raw, refused = request.SerializeToString(), 0
    for cut in range(1, len(raw)):
        try:
            codec.decode_request(codec.parse(federation_pb2.ConnectRequest, raw[:cut]))
        except WireError as error:
            refused += 1
            assert_silent(told(error), shares)
    assert refused > 100


def test_a_forged_share_is_its_holders_fault_and_neither_is_told(run: Federation) -> None:
    before, event = next(
        (b, e)
        for b, e, _ in run.history
        if isinstance(b, CollectingUnmask) and isinstance(e, Received) and isinstance(e.message, Unmask)
    )
    assert isinstance(event, Received)
    assert isinstance(event.message, Unmask)
    honest = event.message.shares[0]
    forged = replace(honest, share=b"\x00" + SECRET)
    step = server.step(
        before, Received(event.sender, replace(event.message, shares=(forged, *event.message.shares[1:])))
    )
    assert any("share" in repr(effect).lower() for effect in step.effects)
    text = repr(step.effects) + "".join(str(getattr(effect, "detail", "")) for effect in step.effects)
    assert_silent(text, {"forged": SECRET, "honest": honest.share, "salt": honest.salt})


def test_a_dealer_that_is_convicted_is_named_and_its_secret_is_not(run: Federation, secrets: dict[str, bytes]) -> None:
    job = next(e.job for e in run.effects if isinstance(e, RemoveMasks))
    for tampered in (
        replace(job, self_seeds=(replace(job.self_seeds[0], commitment=bytes(32)), *job.self_seeds[1:])),
        replace(job, mask_secrets=(replace(job.mask_secrets[0], mask_key=job.mask_secrets[0].neighbours[0][1]),)),
    ):
        with pytest.raises(DealerEquivocated) as caught:
            unmasking.remaining_masks(tampered)
        assert_silent(told(caught.value), secrets)


def test_an_event_that_a_state_does_not_admit_is_told_by_names_alone(
    run: Federation, secrets: dict[str, bytes]
) -> None:
    state = run.members[0].before(SharedKeys)
    with pytest.raises(IllegalEvent) as caught:
        client.step(state, UpdateMasked(), now=0.0)
    assert_silent(told(caught.value), secrets)
    coordinator = next(b for b, _, _ in run.history if isinstance(b, CollectingUnmask))
    with pytest.raises(IllegalEvent) as other:
        server.step(coordinator, MasksRemoved())
    assert_silent(told(other.value), secrets)
