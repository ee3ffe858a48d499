"""Plans as bytes. A plan's bytes are hashed into the session id, so there is exactly one encoding of each plan.

A plan is decoded, encoded again and compared with the bytes received: unknown fields, other field orders and explicit
defaults are all refused (DESIGN section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError

from maskwork.secagg.encoding import Encoding, EncodingParameterError, Rotation
from maskwork.secagg.errors import PlanError
from maskwork.secagg.graph import GraphKind
from maskwork.secagg.plan import (
    GraphPlan,
    PrivacyMechanism,
    PrivacyParameters,
    RosterEntry,
    RoundPlan,
    StageDeadlines,
    StatisticSpec,
)
from maskwork.wire.errors import WireError
from maskwork.wire.v1 import plan_pb2

K = TypeVar("K")
V = TypeVar("V")

_GRAPH_KINDS = {GraphKind.COMPLETE: plan_pb2.GRAPH_KIND_COMPLETE, GraphKind.SPARSE: plan_pb2.GRAPH_KIND_SPARSE}
_ROTATIONS = {Rotation.NONE: plan_pb2.ROTATION_NONE, Rotation.HADAMARD: plan_pb2.ROTATION_HADAMARD}
_MECHANISMS = {PrivacyMechanism.NONE: plan_pb2.PRIVACY_MECHANISM_NONE}


def encode_plan(plan: RoundPlan) -> bytes:
    """The canonical bytes of a plan: protobuf, fields in order, defaults left out."""
    message = plan_pb2.RoundPlan(
        suite=plan.suite,
        federation=plan.federation,
        job=plan.job,
        task=plan.task,
        round_number=plan.round_number,
        rounds_total=plan.rounds_total,
        attempt=plan.attempt,
        nonce=plan.nonce,
        model_digest=plan.model_digest,
        parameters=plan.parameters,
        training_digest=plan.training_digest,
        roster=[plan_pb2.RosterEntry(participant=e.participant, fingerprint=e.fingerprint) for e in plan.roster],
        graph=plan_pb2.Graph(
            kind=_GRAPH_KINDS[plan.graph.kind],
            degree=plan.graph.degree,
            threshold=plan.graph.threshold,
            colluders=plan.graph.colluders,
            corrupt_permille=plan.graph.corrupt_permille,
            dropout_permille=plan.graph.dropout_permille,
        ),
        min_survivors=plan.min_survivors,
        encoding=plan_pb2.Encoding(
            clip_norm=plan.encoding.clip_norm,
            weight_cap=plan.encoding.weight_cap,
            value_bits=plan.encoding.value_bits,
            ring_bits=plan.encoding.ring_bits,
            rotation=_ROTATIONS[plan.encoding.rotation],
        ),
        statistics=[plan_pb2.Statistic(name=s.name, bound=s.bound) for s in plan.statistics],
        privacy=plan_pb2.Privacy(
            mechanism=_MECHANISMS[plan.privacy.mechanism],
            noise_multiplier=plan.privacy.noise_multiplier,
            delta=plan.privacy.delta,
            min_honest_survivors=plan.privacy.min_honest_survivors,
        ),
        revocation_digest=plan.revocation_digest,
        revocation_number=plan.revocation_number,
        audit_head=plan.audit_head,
        previous_survivors=plan.previous_survivors,
        deadlines=plan_pb2.Deadlines(
            advertise_keys_ms=plan.deadlines.advertise_keys_ms,
            share_keys_ms=plan.deadlines.share_keys_ms,
            masked_update_ms=plan.deadlines.masked_update_ms,
            consistency_check_ms=plan.deadlines.consistency_check_ms,
            unmask_ms=plan.deadlines.unmask_ms,
        ),
    )
    return message.SerializeToString(deterministic=True)


def decode_plan(plan_bytes: bytes) -> RoundPlan:
    """The plan in some bytes.

    Raises:
        WireError: not a plan, out of range, contradictory, or not in canonical form.
    """
    try:
        plan = _plan(plan_pb2.RoundPlan.FromString(plan_bytes))
    except (DecodeError, PlanError, EncodingParameterError, KeyError) as error:
        raise WireError(f"not a valid plan: {error}") from error
    if encode_plan(plan) != plan_bytes:
        raise WireError("the plan is not in canonical form, or has fields that this version does not know")
    return plan


def _plan(message: plan_pb2.RoundPlan) -> RoundPlan:
    g, e, p, d = message.graph, message.encoding, message.privacy, message.deadlines
    return RoundPlan(
        suite=message.suite,
        federation=message.federation,
        job=message.job,
        task=message.task,
        round_number=message.round_number,
        rounds_total=message.rounds_total,
        attempt=message.attempt,
        nonce=message.nonce,
        model_digest=message.model_digest,
        parameters=message.parameters,
        training_digest=message.training_digest,
        roster=tuple(RosterEntry(r.participant, r.fingerprint) for r in message.roster),
        graph=GraphPlan(
            kind=_inverse(_GRAPH_KINDS, g.kind),
            degree=g.degree,
            threshold=g.threshold,
            colluders=g.colluders,
            corrupt_permille=g.corrupt_permille,
            dropout_permille=g.dropout_permille,
        ),
        min_survivors=message.min_survivors,
        encoding=Encoding(
            clip_norm=e.clip_norm,
            weight_cap=e.weight_cap,
            value_bits=e.value_bits,
            ring_bits=e.ring_bits,
            rotation=_inverse(_ROTATIONS, e.rotation),
        ),
        statistics=tuple(StatisticSpec(s.name, s.bound) for s in message.statistics),
        privacy=PrivacyParameters(
            mechanism=_inverse(_MECHANISMS, p.mechanism),
            noise_multiplier=p.noise_multiplier,
            delta=p.delta,
            min_honest_survivors=p.min_honest_survivors,
        ),
        revocation_digest=message.revocation_digest,
        revocation_number=message.revocation_number,
        audit_head=message.audit_head,
        previous_survivors=message.previous_survivors,
        deadlines=StageDeadlines(
            advertise_keys_ms=d.advertise_keys_ms,
            share_keys_ms=d.share_keys_ms,
            masked_update_ms=d.masked_update_ms,
            consistency_check_ms=d.consistency_check_ms,
            unmask_ms=d.unmask_ms,
        ),
    )


def _inverse(table: Mapping[K, V], value: V) -> K:
    for key, candidate in table.items():
        if candidate == value:
            return key
    raise WireError(f"enumeration value {value} is not known")
