"""Known failures of other frameworks, each by name: what went wrong there cannot go wrong here.

Those that concern the data path alone are told in `tests/secagg_numerics` and run here again under the same name.
What is about services (polling, restarts of jobs, channels, enrolment kits) is tested where the services are.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from tests.secagg.cohort import (
    NOW,
    Certificates,
    Verified,
    certificate_of,
    make_plan,
    make_site,
    session_seed,
    signer,
    update_of,
    weight_of,
)
from tests.secagg.harness import Federation, clean_run
from tests.secagg_numerics.test_numerics_encoding import (
    test_dequantisation_right_for_two_clients_only,
    test_weights_above_their_cap_only_warned_about,
)
from tests.secagg_numerics.test_numerics_masking import (
    test_sample_counts_in_clear_beside_a_masked_vector,
    test_server_memory_does_not_grow_with_the_cohort_nor_with_the_vector,
)
from tests.secagg_numerics.test_numerics_prg import (
    test_a_mask_is_not_one_scalar_for_a_whole_tensor,
    test_a_seed_of_28_to_32_bits_is_refused,
    test_randint_0_to_R_minus_1_the_top_value_is_drawn,
)
from tests.secagg_numerics.test_numerics_ring import test_eight_bytes_per_parameter_are_not_sent

import maskwork.secagg.client
from maskwork.secagg import client, keys, server
from maskwork.secagg.client_states import Aborted, MaskUpdate, SharedKeys, Uploading, UploadUpdate
from maskwork.secagg.errors import AbortReason, PlanError
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    ConsistencyCheck,
    DeliveredShares,
    ParticipantMessage,
    RevealedShare,
    ShareKeys,
    SurvivorSets,
    Unmask,
)
from maskwork.secagg.prg import keystream
from maskwork.secagg.server_states import CollectingUnmask
from maskwork.wire.v1 import session_pb2

__all__ = [
    "test_a_mask_is_not_one_scalar_for_a_whole_tensor",
    "test_a_seed_of_28_to_32_bits_is_refused",
    "test_dequantisation_right_for_two_clients_only",
    "test_eight_bytes_per_parameter_are_not_sent",
    "test_randint_0_to_R_minus_1_the_top_value_is_drawn",
    "test_sample_counts_in_clear_beside_a_masked_vector",
    "test_server_memory_does_not_grow_with_the_cohort_nor_with_the_vector",
    "test_weights_above_their_cap_only_warned_about",
]

SECAGG = sorted(Path(maskwork.secagg.client.__file__).parent.glob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Everything that a file imports, top-level names and attributes of numpy included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), names=aliases):
                names |= {module, *(f"{module}.{alias.name}" for alias in aliases)}
            case ast.Attribute(value=ast.Name(id="np"), attr=attribute):
                names.add(f"numpy.{attribute}")
            case _:
                pass
    return names


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SECAGG, ids=lambda path: path.name)
def test_masks_from_a_general_purpose_generator(path: Path) -> None:
    """PCG64, Mersenne Twister, np.random.seed(rank): no module of the core can reach any of them, nor a clock."""
    imported = imports_of(path)
    roots = {name.split(".")[0] for name in imported}
    assert not roots & {"random", "secrets", "os", "time", "datetime", "uuid", "logging", "asyncio", "grpc", "torch"}
    assert not any(name.startswith("numpy.random") for name in imported)


@pytest.mark.parametrize("length", [0, 4, 16, 31, 33])
def test_masks_from_a_shortened_seed(length: int) -> None:
    """A session begins with 256 bits of the caller's entropy or not at all."""
    with pytest.raises(ValueError, match="32 bytes"):
        client.begin(clean_run(5).proposal, site=make_site(0, 5), rand=bytes(length))


def test_every_bit_of_the_session_seed_matters_to_every_secret() -> None:
    made = keys.derive_session_secrets(bytes(32))
    for bit in range(256):
        other = keys.derive_session_secrets((1 << bit).to_bytes(32, "big"))
        assert other.encryption_secret != made.encryption_secret
        assert other.mask_secret != made.mask_secret
        assert other.self_seed != made.self_seed
        assert other.rounding_key != made.rounding_key


def mask_keys(run: Federation) -> list[bytes]:
    effects = [e for m in run.members for e in m.effects if isinstance(e, MaskUpdate)]
    return [k.key for e in effects for k in (*e.keys.update, *e.keys.statistics)]


def test_masks_that_are_the_same_every_round() -> None:
    """The same site, roster and even the same seed: another round has other masks, for every pair and segment."""
    this, following = clean_run(5), Federation(make_plan(5, round_number=4)).run()
    assert not set(mask_keys(this)) & set(mask_keys(following))


def test_one_mask_for_every_tensor_and_every_peer() -> None:
    """Each pair mask occurs exactly twice (once at either end), each self mask once; no key serves both segments."""
    counts = Counter(mask_keys(clean_run(5)))
    assert Counter(counts.values()) == {2: 2 * 10, 1: 2 * 5}
    streams = {keystream(key, 0, 64) for key in counts}
    assert len(streams) == len(counts)


def test_keys_derived_from_a_rank() -> None:
    """Nothing secret follows from the roster, the index and the session alone."""
    plan = make_plan(5)
    one, two = Federation(plan, seed=0).run(), Federation(plan, seed=1).run()
    assert one.id == two.id
    assert not set(mask_keys(one)) & set(mask_keys(two))


# --- shares ---------------------------------------------------------------------------------------------------------


def test_both_shares_of_one_peer_released_on_request() -> None:
    """Nobody sends lists of the living and the dead: there is one set, and the other is its complement."""
    assert [f.name for f in fields(SurvivorSets)] == ["u1", "u2", "u3"]
    assert [f.name for f in fields(RevealedShare)] == ["owner", "kind", "salt", "share"]
    oneof = session_pb2.RevealedShare.DESCRIPTOR.oneofs_by_name["share"]
    assert [f.name for f in oneof.fields] == ["self_seed", "mask_secret"]
    owners = [s.owner for s in clean_run(5).members[0].answer(Unmask).shares]
    assert len(owners) == len(set(owners))


def test_both_shares_of_one_peer_written_into_one_message() -> None:
    share = clean_run(5).members[0].answer(Unmask).shares[0]
    with pytest.raises(ValueError, match="ascending and distinct"):
        Unmask((share, share))


# --- dropouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [AdvertiseKeys, ShareKeys, UploadUpdate])
def test_a_dropout_before_the_masked_upload_loses_the_round(step: type) -> None:
    """The roster is reduced to those who shared keys, then to those who uploaded: the sum over the rest is exact."""
    run = Federation(make_plan(5), dies_before={2: step}).run()
    assert run.survivors == {0, 1, 3, 4}
    run.assert_exact()


def test_a_resume_function_with_no_caller() -> None:
    """A session that was asked for unmasking is gone on with, from what was persisted, to the same sum."""
    run = Federation(make_plan(3)).run_to(CollectingUnmask)
    resumed = server.resume(run.opening(CollectingUnmask))
    run.state = resumed.state
    for index in range(3):
        run.disconnect(index)
        run.reconnect(index)
    run.run().assert_exact()


# --- what travels in clear ------------------------------------------------------------------------------------------


def test_sample_counts_and_metrics_in_any_message() -> None:
    """No message has a field for a number about the data: keys, shares, signatures and enumerated reasons only."""
    names = {f.name for kind in get_args(ParticipantMessage) for f in fields(kind)}
    assert names == {
        *("encryption_key", "mask_key", "signature", "seed_commitment", "root", "shares", "dealer", "key"),
        *("code", "detail", "reason"),
    }


def test_the_same_statistics_never_travel_as_the_same_bytes() -> None:
    one, two = clean_run(5), Federation(make_plan(5), seed=1).run()
    uploads = [m.upload for run in (one, two) for m in run.members]
    assert len({upload[0] for upload in uploads if upload}) == 10
    assert len({upload[1] for upload in uploads if upload}) == 10


@pytest.mark.parametrize("n", [3, 5, 10])
def test_dequantisation_right_for_two_clients_only_in_whole_sessions(n: int) -> None:
    run = clean_run(n)
    weights = np.array([weight_of(i) for i in range(n)], np.float64)
    updates = [update_of(i, run.plan.parameters).astype(np.float64) for i in range(n)]
    clipped = np.stack([u * min(1.0, 1.0 / float(np.linalg.norm(u))) for u in updates])
    wanted = weights @ clipped / weights.sum()
    assert run.mean is not None
    bound = n * run.plan.encoding.weight_cap / (run.plan.encoding.scale * weights.sum())
    assert float(np.abs(run.mean - wanted).max()) <= bound


# --- trust ----------------------------------------------------------------------------------------------------------


def test_a_threshold_chosen_by_the_server_and_never_checked() -> None:
    """There is no plan in which t is too low, and a participant counts holders and signatures against it itself."""
    for threshold in (1, 2):
        with pytest.raises(PlanError, match="both shares of one participant could be collected"):
            make_plan(5, threshold=threshold)
    message = clean_run(5).members[0].message(DeliveredShares)
    few = DeliveredShares(frozenset({0, 1}), message.shares[:1])
    assert reason_of(clean_run(5).members[0].before(SharedKeys), few) is AbortReason.TOO_FEW_PARTICIPANTS


def reason_of(state: SharedKeys | Uploading, message: DeliveredShares | SurvivorSets) -> AbortReason:
    ended = client.step(state, message, now=NOW).state
    assert isinstance(ended, Aborted)
    return ended.reason


def test_unsigned_keys_that_the_relay_can_replace() -> None:
    """The coordinator puts its own keys in the place of everyone's, to read all shares: nobody deals to it."""
    theirs = keys.derive_session_secrets(bytes(32))

    def replaced(recipient: int, message: object) -> Sequence[object]:
        if not isinstance(message, Advertisements):
            return (message,)
        forged = []
        for index, advertisement in message.advertised:
            body = AdvertiseKeys.signed_bytes(
                theirs.encryption_secret.public(), theirs.mask_secret.public(), session=b"", sender=index
            )
            made = AdvertiseKeys(theirs.encryption_secret.public(), theirs.mask_secret.public(), signer(99).sign(body))
            forged.append((index, made if index != recipient else advertisement))
        return (Advertisements(message.u1, tuple(forged), ()),)

    run = Federation(make_plan(5), downlink=replaced).run()  # type: ignore[arg-type]  # messages of the same kinds
    for member in run.members:
        assert isinstance(member.state, Aborted)
        assert member.state.reason is AbortReason.BAD_PEER_SIGNATURE
        assert member.answers(ShareKeys) == []


class Nobody:
    """A trust manager that trusts nobody."""

    def verify_participant(self, certificate_der: bytes, now: float) -> Verified:
        raise ValueError(f"{certificate_der!r} at {now}")


def test_a_trust_manager_with_an_empty_check() -> None:
    """The verifier is asked about every neighbour, and its refusal ends the session."""
    asked: list[bytes] = []

    class Asked(Nobody):
        def verify_participant(self, certificate_der: bytes, now: float) -> Verified:
            asked.append(certificate_der)
            return Certificates(5).verify_participant(certificate_der, now)

    Federation(make_plan(5), sites={0: make_site(0, 5, verifier=Asked())}).run().assert_exact()
    assert asked == [certificate_of(i) for i in range(1, 5)]
    run = Federation(make_plan(5), sites={0: make_site(0, 5, verifier=Nobody())}).run()
    state = run.members[0].state
    assert isinstance(state, Aborted)
    assert state.reason is AbortReason.BAD_CERTIFICATE
    assert run.members[0].answers(ConsistencyCheck) == []


def test_pickle_on_the_wire() -> None:
    for path in (*SECAGG, *(Path(maskwork.secagg.client.__file__).parent.parent / "wire").glob("*.py")):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def test_the_seed_of_a_run_is_not_in_what_the_coordinator_keeps() -> None:
    run = clean_run(5)
    kept = repr(run.history)
    assert not any(session_seed(i, 0).hex() in kept or repr(session_seed(i, 0)) in kept for i in range(5))
