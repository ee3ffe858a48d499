"""A cohort that is always the same: names, keys, certificates, plans, sites, and what each member trained.

Everything follows from an index and a seed; certificates are stand-ins behind the `CertificateVerifier` port.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from maskwork.secagg import client_states, keys
from maskwork.secagg.encoding import (
    Encoding,
    Rotation,
    encode_update,
)
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.keys import SoftwareSigner
from maskwork.secagg.messages import Members, Proposal
from maskwork.secagg.plan import (
    GraphPlan,
    PrivacyParameters,
    RosterEntry,
    RoundPlan,
    StageDeadlines,
    StatisticSpec,
    session_id,
    sparse_parameters,
)
from maskwork.secagg.ring import UInt32Array, reduce_in_place
from maskwork.secagg.rotation import Float32Array
from maskwork.wire.codec import encode_plan

NOW = 1_800_000_000.0
PARAMETERS = 40
MODEL_DIGEST = hashlib.sha256(b"the global model").digest()
STATISTICS = (StatisticSpec("examples", 100.0), StatisticSpec("loss", 1_000.0))
COORDINATOR_SCALAR = 999_999


@cache
def private_key(scalar: int) -> ec.EllipticCurvePrivateKey:
    """The P-256 key of a fixed scalar."""
    return ec.derive_private_key(scalar, ec.SECP256R1())


def signer(index: int) -> SoftwareSigner:
    """What member `index` signs with."""
    return SoftwareSigner(private_key(1_000 + index))


def coordinator_signer() -> SoftwareSigner:
    return SoftwareSigner(private_key(COORDINATOR_SCALAR))


def name_of(index: int) -> str:
    return f"site-{index:03}"


def certificate_of(index: int) -> bytes:
    return f"certificate of {name_of(index)}".encode()


def fingerprint_of(index: int) -> bytes:
    return hashlib.sha256(certificate_of(index)).digest()


@dataclass(frozen=True)
class Verified:
    """A `VerifiedPeer`."""

    name: str
    fingerprint: bytes
    public_key: ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Certificates:
    """A `CertificateVerifier`: knows the certificates of the first `size` members, some of them revoked.

    A certificate is valid until `valid_until`, seconds since the epoch.
    """

    size: int
    revoked: frozenset[int] = frozenset()
    valid_until: float = NOW + 1

    def verify_participant(self, certificate_der: bytes, now: float) -> Verified:
        index = int(certificate_der[-3:]) if certificate_der[-3:].isdigit() else self.size
        if index >= self.size or certificate_of(index) != certificate_der:
            raise ValueError("it was not issued by this federation")
        if index in self.revoked:
            raise ValueError("it is revoked")
        if now > self.valid_until:
            raise ValueError("it has expired")
        return Verified(name_of(index), fingerprint_of(index), private_key(1_000 + index).public_key())


def make_plan(n: int, **changes: Any) -> RoundPlan:
    """A plan for n members; `threshold` and `colluders` are changes too. More than 128 members: the sparse graph."""
    if n > 128:
        found = sparse_parameters(n, 20, 20)
        graph = GraphPlan(GraphKind.SPARSE, found.degree, found.threshold, 0, 20, 20)
    else:
        threshold = changes.pop("threshold", 2 * n // 3 + 1)
        graph = GraphPlan(GraphKind.COMPLETE, n - 1, threshold, changes.pop("colluders", 0))
    plan: dict[str, Any] = {
        "federation": "test",
        "job": "job-1",
        "task": "digits",
        "round_number": 3,
        "rounds_total": 20,
        "attempt": 1,
        "nonce": bytes(range(16)),
        "model_digest": MODEL_DIGEST,
        "parameters": PARAMETERS,
        "training_digest": bytes(32),
        "roster": tuple(RosterEntry(name_of(i), fingerprint_of(i)) for i in range(n)),
        "graph": graph,
        "min_survivors": 3,
        "encoding": Encoding(1.0, 100, 12, 20, Rotation.NONE),
        "statistics": STATISTICS,
        "privacy": PrivacyParameters(),
        "revocation_digest": bytes(32),
        "revocation_number": 0,
        "audit_head": bytes(32),
        "previous_survivors": bytes(32),
        "deadlines": StageDeadlines(1_000, 2_000, 3_000, 4_000, 5_000),
    }
    return RoundPlan(**{**plan, **changes})


def make_proposal(plan: RoundPlan) -> Proposal:
    """A plan in the coordinator's envelope."""
    plan_bytes = encode_plan(plan)
    signed = keys.signed_message("plan", session=session_id(plan_bytes), sender=keys.COORDINATOR_INDEX, fields=b"")
    return Proposal(plan_bytes, coordinator_signer().sign(signed), plan)


def make_site(index: int, n: int, **changes: Any) -> client_states.Site:
    """An honest member's site."""
    site = client_states.Site(
        name=name_of(index),
        fingerprint=fingerprint_of(index),
        signer=signer(index),
        verifier=Certificates(n),
        certificates={i: certificate_of(i) for i in range(n)},
        coordinator_key=private_key(COORDINATOR_SCALAR).public_key(),
        model_digest=MODEL_DIGEST,
        rules=client_states.SiteRules(),
    )
    return replace(site, **changes)


def session_seed(index: int, seed: int) -> bytes:
    """The 32 bytes that member `index` draws for its session in the run with this seed."""
    return hashlib.sha256(f"session seed {seed} of {index}".encode()).digest()


def update_of(index: int, length: int) -> Float32Array:
    """What member `index` trained: of norm about 1, so that some are clipped; from bytes that anyone can make again."""
    drawn = np.frombuffer(hashlib.shake_256(f"update of {index}".encode()).digest(4 * length), "<i4")
    made: Float32Array = (drawn * (2.0**-31 * (3 / length) ** 0.5)).astype(np.float32)
    return made


def weight_of(index: int) -> int:
    return 10 + index % 80


def statistics_of(index: int) -> list[float]:
    return [float(weight_of(index)), 0.25 * index + 0.125]


def survivors_sum(session: bytes, plan: RoundPlan, survivors: Members, seed: int) -> UInt32Array:
    """The slow obvious twin: everyone's encoded update, added up with no mask ever made."""
    total = np.zeros(plan.parameters, np.uint32)
    for index in survivors:
        out = np.zeros(plan.parameters, np.int32)
        encode_update(
            update_of(index, plan.parameters),
            weight_of(index),
            encoding=plan.encoding,
            rotation_seed=keys.rotation_seed(session),
            rounding_key=keys.derive_session_secrets(session_seed(index, seed)).rounding_key,
            out_i32=out,
        )
        total += out.view(np.uint32)
    reduce_in_place(total, plan.encoding.ring_bits)
    return total


def survivors_statistics(survivors: Members) -> list[float]:
    """The sum of the statistics; exact, because every summand is a multiple of 2^-20."""
    return [sum(column) for column in zip(*(statistics_of(i) for i in survivors), strict=True)]
