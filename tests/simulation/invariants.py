"""What must hold in every run, whatever fails: checked at the moment in which it could be broken.

Counts as a failure, and raises `Violation`:
  1. A round is committed twice, out of order, or with another model than base + decode(exact modular sum of the
     survivors' encoded updates); the sum left after unmasking is compared bit for bit, both segments.
  2. A committed round is not there any more after a restart.
  3. Of one member's two secrets, shares of both kinds leave sites within a session.
  4. A key, public or of a mask, a nonce or a session id occurs in two sessions; a site masks twice in one session, or
     sends other bytes for the same place of an upload.
  5. A site takes up a (round, attempt) not above its highest, or answers for two survivor sets on one model.
  6. A process ends with an error, or a background task does.
  7. A job does not complete although faults have stopped (`world` checks that).
  8. The audit logs of the coordinator and of every site do not verify, or contradict each other, or a site refused a
     history although the coordinator has only one (`world` checks that too).

Does not count: attempts that come to nothing, rounds that wait, a liar or its victim left out of a session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maskwork.coordinator import aggregation
from maskwork.coordinator.aggregation import Released, ReleaseRequest
from maskwork.coordinator.records import AttemptRecord, CommittedRound, ResumeRecord
from maskwork.participant.training_calls import MaskRequest, MaskResult, TrainRequest, TrainSummary
from maskwork.secagg import keys, masking
from maskwork.secagg.encoding import decode_statistics, decode_sum, encode_statistics, encode_update
from maskwork.secagg.keys import ShareKind
from maskwork.secagg.messages import AdvertiseKeys, Unmask
from maskwork.secagg.plan import RoundPlan
from maskwork.secagg.ring import UInt32Array, packed_size, reduce_in_place
from maskwork.secagg.rotation import Float32Array
from maskwork.secagg.unmasking import remaining_masks
from maskwork.tensors import read_vector
from maskwork.wire.codec import Request, decode_plan

WEIGHT_CAP = 100


class Violation(BaseException):
    """An invariant does not hold. Not an `Exception`: no handler of production's may take it for a failed call."""


def must(holds: bool, what: str) -> None:
    """Raise `Violation` unless it holds."""
    if not holds:
        raise Violation(what)


def examples_of(site: str) -> int:
    """How many examples a site has."""
    return 10 + int(site.rpartition("-")[2])


def update_of(site: str, round_number: int, length: int) -> Float32Array:
    """What a site's training gives in a round, in every attempt at it: of norm about 1."""
    drawn = np.frombuffer(hashlib.shake_256(f"{site} {round_number}".encode()).digest(4 * length), "<i4")
    made: Float32Array = (drawn * (2.0**-31 * (3 / length) ** 0.5)).astype(np.float32)
    return made


class Watch:
    """Sees everything that matters and remembers what it needs; a `tests.simulation.processes.Observer`."""

    def __init__(self) -> None:
        self.plans: dict[bytes, RoundPlan] = {}
        self.committed: dict[int, CommittedRound] = {}
        self.attempts = 0
        self.resumed = 0
        self._nonces: set[bytes] = set()
        self._encoded: dict[tuple[bytes, str], UInt32Array] = {}
        self._statistics: dict[tuple[bytes, str], list[float]] = {}
        self._uploads: dict[tuple[bytes, str], bytes] = {}
        self._keys: dict[bytes, bytes] = {}
        self._kinds: dict[tuple[bytes, int], ShareKind] = {}
        self._survivors: dict[bytes, tuple[str, ...]] = {}
        self._highest: dict[str, tuple[int, int]] = {}
        self._answered: dict[tuple[str, bytes], frozenset[str]] = {}

    # --- what processes write ----------------------------------------------------------------------------------

    def coordinator_wrote(self, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        match method, arguments:
            case "open_attempt", (AttemptRecord() as attempt,):
                plan = decode_plan(attempt.plan_bytes)
                must(attempt.session_id not in self.plans, "a session id occurs twice")
                must(plan.nonce not in self._nonces, "a nonce occurs twice")
                self.plans[attempt.session_id] = plan
                self._nonces.add(plan.nonce)
                self.attempts += 1
            case "save_resume", (ResumeRecord() as resume,):
                before = self._survivors.setdefault(resume.session_id, resume.survivors)
                must(before == resume.survivors, "two survivor sets in one session")
            case "commit_round", (CommittedRound() as committed,):
                at = committed.round_number
                must(at == len(self.committed) + 1, f"round {at} is committed after {len(self.committed)} rounds")
                self.committed[at] = committed
            case _:
                pass

    def site_wrote(self, site: str, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        match method, arguments:
            case "record_attempt", (_, _, round_number):
                taken_up = (round_number, named["attempt"])
                highest = self._highest.get(site, (0, 0))
                must(taken_up > highest, f"{site} takes up {taken_up} after {highest}")
                self._highest[site] = taken_up
            case "record_release", (_, _, model):
                survivors = frozenset(named["survivors"])
                before = self._answered.setdefault((site, model), survivors)
                must(before == survivors, f"{site} answers for two survivor sets on one model")
            case _:
                pass

    def restarted(self, rounds: tuple[CommittedRound, ...], model: Callable[[bytes], Path]) -> None:
        """A coordinator has come back with these committed rounds.

        One of them may be new to us: it was killed when the database had the round and its audit log had not.
        """
        kept = {committed.round_number: committed for committed in rounds}
        following = len(self.committed) + 1
        if following in kept:
            self.committed[following] = kept[following]
        must(kept == self.committed, "a committed round is not what it was before the restart")
        for committed in rounds:
            model(committed.model)  # raises when it is missing or damaged

    # --- what leaves a site ----------------------------------------------------------------------------------

    def sent(self, session: bytes, message: Request) -> None:
        """A site has sent a message."""
        match message:
            case AdvertiseKeys():
                self._fresh(message.encryption_key.raw, session)
                self._fresh(message.mask_key.raw, session)
            case Unmask():
                for share in message.shares:
                    kind = self._kinds.setdefault((session, share.owner), share.kind)
                    must(kind is share.kind, f"shares of both secrets of member {share.owner} have left sites")
            case _:
                pass

    def uploaded(self, session: bytes, site: str, offset: int, data: bytes) -> None:
        """A site has sent part of its upload; `offset` is from the start of both segments."""
        whole = self._uploads[session, site]
        must(whole[offset : offset + len(data)] == data, f"{site} sends other bytes for one place of an upload")

    def _fresh(self, key: bytes, session: bytes) -> None:
        must(self._keys.setdefault(key, session) == session, "a key occurs in two sessions")

    # --- what workers do ----------------------------------------------------------------------------------

    def train(self, site: str, kept: set[bytes], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """What a training worker does, with updates that are known."""
        (request,) = arguments
        match request:
            case TrainRequest(session_id):
                kept.add(session_id)
                return TrainSummary(examples_of(site), {"loss": 0.5}, 0, {}, 1.0, 0.1)
            case MaskRequest():
                must(request.session_id in kept, "an update is masked that was not trained")
                return self._mask(site, request)
            case _:
                kept.discard(request)
                return None

    def _mask(self, site: str, request: MaskRequest) -> MaskResult:
        at, plan = (request.session_id, site), self.plans[request.session_id]
        must(at not in self._encoded, f"{site} masks twice in one session")
        for signed in (*request.keys.update, *request.keys.statistics):
            self._fresh(signed.key, request.session_id)
        self._fresh(request.keys.rounding_key, request.session_id)
        update, weight = update_of(site, plan.round_number, plan.parameters), examples_of(site)
        encoded = np.zeros(plan.parameters, np.int32)
        encode_update(
            update,
            weight,
            encoding=request.encoding,
            rotation_seed=request.rotation_seed,
            rounding_key=request.keys.rounding_key,
            out_i32=encoded,
        )
        packed = np.zeros(packed_size(plan.parameters, plan.encoding.ring_bits), np.uint8)
        masking.mask_update(
            update,
            weight,
            encoding=request.encoding,
            keys=request.keys,
            rotation_seed=request.rotation_seed,
            out_u8=packed,
        )
        values = [float(weight), *(0.5 * weight for _ in plan.statistics[1:])]
        bounds, names = [s.bound for s in plan.statistics], [s.name for s in plan.statistics]
        statistics = masking.mask_statistics(encode_statistics(values, bounds, names), request.keys.statistics)
        self._encoded[at], self._statistics[at] = encoded.view(np.uint32), values
        self._uploads[at] = packed.tobytes() + statistics
        request.output.write_bytes(packed.tobytes())
        return MaskResult(len(packed), statistics, 0)

    def aggregate(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """What the coordinator's worker does; a release is checked against the sum that is known."""
        if function is not aggregation.release:
            return function(*arguments)
        (request,) = arguments
        self._check_sum(request)
        result = function(request)
        if isinstance(result, Released):
            self._check_model(request, result)
        return result

    def _expected_sum(self, session: bytes) -> UInt32Array:
        plan = self.plans[session]
        total = np.zeros(plan.parameters, np.uint32)
        for site in self._survivors[session]:
            total += self._encoded[session, site]
        reduce_in_place(total, plan.encoding.ring_bits)
        return total

    def _check_sum(self, request: ReleaseRequest) -> None:
        session, masks = request.job.session, remaining_masks(request.job)
        raw = np.frombuffer(request.accumulator.read_bytes(), np.uint8)
        edge = 8 * request.shape.statistics
        statistics, update = raw[:edge].view(np.uint64).copy(), raw[edge:].view(np.uint32).copy()
        masking.remove_statistics_masks(statistics, masks.statistics)
        masking.remove_masks(update, masks.update)
        reduce_in_place(update, request.shape.ring_bits)
        must(bool((update == self._expected_sum(session)).all()), "the sum is not that of the survivors' updates")
        columns = zip(*(self._statistics[session, site] for site in self._survivors[session]), strict=True)
        must(decode_statistics(statistics) == [sum(c) for c in columns], "the statistics are not the survivors' sums")

    def _check_model(self, request: ReleaseRequest, released: Released) -> None:
        session = request.job.session
        base = read_vector(request.models / f"{request.model.hex()}.safetensors")[1]
        mean = np.empty_like(base)
        decode_sum(
            self._expected_sum(session),
            replace(request.encoding),
            rotation_seed=keys.rotation_seed(session),
            total_weight=sum(examples_of(site) for site in self._survivors[session]),
            out_f32=mean,
        )
        made = read_vector(request.models / f"{released.model.hex()}.safetensors")[1]
        must(bool((made == base + mean).all()), "the model is not the base and the survivors' mean")
