"""A whole federation in one process: n participants, a coordinator, and everything between them that can go wrong.

Only the pure halves and the numerics are driven; what stands in for network, disk and certificates is here. All is a
function of the arguments: every session seed follows from `seed`, every key from a fixed scalar.

Hooks: `uplink` and `downlink` see every message of the control streams and may change, drop, repeat or add some;
`dies_before` and `dies_after` kill members at a step; `schedule` reorders messages of different members (each
member's own stream stays in order, as a stream does).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
from tests.secagg.cohort import (
    NOW,
    make_plan,
    make_proposal,
    make_site,
    private_key,
    session_seed,
    statistics_of,
    survivors_statistics,
    survivors_sum,
    update_of,
    weight_of,
)

from maskwork.secagg import client, client_states, keys, masking, server, server_states
from maskwork.secagg.encoding import (
    decode_statistics,
    decode_sum,
    encode_statistics,
)
from maskwork.secagg.errors import DealerEquivocated, DropReason, PlanRefused
from maskwork.secagg.messages import CoordinatorMessage, Decline, Members, ParticipantMessage, Proposal
from maskwork.secagg.plan import (
    RoundPlan,
    session_id,
)
from maskwork.secagg.ring import packed_size, reduce_in_place
from maskwork.secagg.rotation import Float32Array
from maskwork.secagg.unmasking import remaining_masks

Uplink: TypeAlias = Callable[[int, ParticipantMessage], Sequence[ParticipantMessage]]
Downlink: TypeAlias = Callable[[int, CoordinatorMessage], Sequence[CoordinatorMessage]]
Channel: TypeAlias = tuple[str, int]
M = TypeVar("M")


@dataclass
class Member:
    """One participant: its state, and all that ever happened to it."""

    index: int
    site: client_states.Site
    state: client_states.State | None = None
    alive: bool = True
    connected: bool = True
    history: list[tuple[client_states.State, client_states.Event, client_states.Step]] = field(default_factory=list)
    effects: list[client_states.Effect] = field(default_factory=list)
    received: list[CoordinatorMessage] = field(default_factory=list)
    sent: list[ParticipantMessage] = field(default_factory=list)
    upload: tuple[bytes, bytes] | None = field(default=None, repr=False)

    def message(self, kind: type[M]) -> M:
        """The first message of a kind that the coordinator sent to it."""
        return next(m for m in self.received if isinstance(m, kind))

    def answer(self, kind: type[M]) -> M:
        """The first message of a kind that it sent."""
        return next(m for m in self.sent if isinstance(m, kind))

    def answers(self, kind: type[M]) -> list[M]:
        """All messages of a kind that it sent."""
        return [m for m in self.sent if isinstance(m, kind)]

    def before(self, kind: type[M]) -> M:
        """Its last state of a kind."""
        states = [s for state, _, step in self.history for s in (state, step.state) if isinstance(s, kind)]
        return states[-1]


def honest_up(_sender: int, message: ParticipantMessage) -> Sequence[ParticipantMessage]:
    return (message,)


def honest_down(_recipient: int, message: CoordinatorMessage) -> Sequence[CoordinatorMessage]:
    return (message,)


class Federation:
    """One session from proposal to sum. `run()` goes on until nothing is in flight."""

    def __init__(
        self,
        plan: RoundPlan,
        *,
        seed: int = 0,
        sites: Mapping[int, client_states.Site] | None = None,
        uplink: Uplink = honest_up,
        downlink: Downlink = honest_down,
        dies_before: Mapping[int, type] | None = None,
        dies_after: Mapping[int, type] | None = None,
        schedule: random.Random | None = None,
    ) -> None:
        n = plan.cohort
        self.plan, self.seed = plan, seed
        self.proposal = make_proposal(plan)
        self.id = session_id(self.proposal.plan_bytes)
        self.uplink, self.downlink = uplink, downlink
        self.dies_before, self.dies_after = dict(dies_before or {}), dict(dies_after or {})
        self.members = [Member(i, (sites or {}).get(i) or make_site(i, n)) for i in range(n)]
        self.state: server_states.State | None = None
        self.history: list[tuple[server_states.State, server_states.Event, server_states.Step]] = []
        self.effects: list[server_states.Effect] = []
        self.update = np.zeros(plan.parameters, np.uint32)
        self.statistics = np.zeros(len(plan.statistics), np.uint64)
        self.mean: Float32Array | None = None
        self._channels: dict[Channel, deque[object]] = {}
        self._order: deque[Channel] = deque()
        self._schedule = schedule
        opening = server.begin(self.proposal, tuple(private_key(1_000 + i).public_key() for i in range(n)))
        self._take(opening)

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, until: Callable[[Federation], bool] = lambda _: False) -> Federation:
        """Deliver until nothing is in flight, or until the condition holds between two deliveries."""
        while self._order and not until(self):
            at = self._schedule.randrange(len(self._order)) if self._schedule else 0
            channel = self._order[at]
            del self._order[at]
            self._deliver(channel, self._channels[channel].popleft())
        return self

    def run_to(self, kind: type) -> Federation:
        """Run until the coordinator is in a state of this kind."""
        return self.run(lambda f: isinstance(f.state, kind))

    def tell(self, event: server_states.Event) -> server_states.Step:
        """Feed the coordinator an event."""
        before = self.state
        assert before is not None
        step = server.step(before, event)
        check_transition(before, step.state, server_states.TRANSITIONS)
        self.history.append((before, event, step))
        self._take(step)
        return step

    def deadline(self) -> Federation:
        """The open stage's time is up."""
        assert isinstance(self.state, server_states.Collecting)
        self.tell(server_states.DeadlinePassed(self.state.stage))
        return self.run()

    def crash(self, index: int) -> None:
        """A member is gone for good, and the coordinator notices."""
        self.members[index].alive = False
        self._later(("lost", index), None)

    def disconnect(self, index: int) -> None:
        """A member's control stream breaks: what was in flight on it is lost, what it says now is too."""
        self.members[index].connected = False
        for channel in (("up", index), ("down", index)):
            self._order = deque(c for c in self._order if c != channel)
            self._channels.pop(channel, None)
        self.tell(server_states.Disconnected(index))

    def reconnect(self, index: int) -> None:
        self.members[index].connected = True
        self.tell(server_states.Reconnected(index))

    def feed(self, index: int, event: client_states.Event) -> client_states.Step:
        """Feed a member an event and act on what it wants done."""
        member = self.members[index]
        before = member.state
        assert before is not None
        step = client.step(before, event, now=NOW)
        check_transition(before, step.state, client_states.TRANSITIONS)
        member.history.append((before, event, step))
        self._act(member, step)
        return step

    # --- results ----------------------------------------------------------------------------------------------------

    @property
    def survivors(self) -> Members:
        """U3 of a completed session."""
        assert isinstance(self.state, server_states.Completed), self.state
        return self.state.survivors

    @property
    def aborted(self) -> server_states.Aborted:
        assert isinstance(self.state, server_states.Aborted), self.state
        return self.state

    @property
    def drops(self) -> dict[int, DropReason]:
        return {e.member: e.reason for e in self.effects if isinstance(e, server_states.DropPeer)}

    def seen(self, kind: type[M]) -> M:
        """The coordinator's last state of a kind."""
        states = [s for before, _, step in self.history for s in (before, step.state) if isinstance(s, kind)]
        return states[-1]

    def opening(self, kind: type[M]) -> M:
        """The coordinator's first state of a kind: its stage has just opened."""
        states = [s for before, _, step in self.history for s in (before, step.state) if isinstance(s, kind)]
        return states[0]

    def assert_exact(self) -> None:
        """Both segments are, bit for bit, the sum over the survivors."""
        expected = survivors_sum(self.id, self.plan, self.survivors, self.seed)
        reduced = self.update.copy()
        reduce_in_place(reduced, self.plan.encoding.ring_bits)
        np.testing.assert_array_equal(reduced, expected)
        assert decode_statistics(self.statistics) == survivors_statistics(self.survivors)

    # --- the world --------------------------------------------------------------------------------------------------

    def _later(self, channel: Channel, item: object) -> None:
        self._channels.setdefault(channel, deque()).append(item)
        self._order.append(channel)

    def _deliver(self, channel: Channel, item: Any) -> None:
        kind, index = channel
        member = self.members[index]
        match kind:
            case "down":
                if member.alive and member.connected:
                    member.received.append(item)
                    self._down(member, item)
            case "up":
                self.tell(server_states.Received(index, item))
            case "upload":
                member.upload = item
                self.tell(server_states.UploadCompleted(index))
            case "masked":
                if isinstance(member.state, client_states.Masking):
                    self.feed(index, client_states.UpdateMasked())
            case "unmask":
                self._remove_masks(item)
            case "lost":
                self.tell(server_states.Disconnected(index))
                self.tell(server_states.Lost(index, DropReason.DISCONNECTED, "its stream broke"))

    def _down(self, member: Member, message: CoordinatorMessage) -> None:
        if not isinstance(message, Proposal) or member.state is not None:
            if member.state is not None:
                self.feed(member.index, message)
            return
        try:
            step = client.begin(message, site=member.site, rand=session_seed(member.index, self.seed))
        except PlanRefused as refused:
            self._send(member, Decline(refused.code, refused.detail))
            return
        self._act(member, step)

    def _act(self, member: Member, step: client_states.Step) -> None:
        member.state = step.state
        member.effects.extend(step.effects)
        for effect in step.effects:
            match effect:
                case client_states.Send(message):
                    self._send(member, message)
                case client_states.MaskUpdate(masking_keys):
                    member.upload = self._masked(member.index, masking_keys)
                    self._later(("masked", member.index), None)
                case client_states.UploadUpdate():
                    if not self._dies(member, client_states.UploadUpdate, self.dies_before):
                        self._later(("upload", member.index), member.upload)
                        self._dies(member, client_states.UploadUpdate, self.dies_after)

    def _send(self, member: Member, message: ParticipantMessage) -> None:
        if not member.alive or self._dies(member, type(message), self.dies_before):
            return
        member.sent.append(message)
        if member.connected:
            for item in self.uplink(member.index, message):
                self._later(("up", member.index), item)
        self._dies(member, type(message), self.dies_after)

    def _dies(self, member: Member, kind: type, when: Mapping[int, type]) -> bool:
        if member.alive and when.get(member.index) is kind:
            self.crash(member.index)
        return not member.alive

    def _masked(self, index: int, masking_keys: masking.MaskingKeys) -> tuple[bytes, bytes]:
        packed = np.zeros(packed_size(self.plan.parameters, self.plan.encoding.ring_bits), np.uint8)
        masking.mask_update(
            update_of(index, self.plan.parameters),
            weight_of(index),
            encoding=self.plan.encoding,
            keys=masking_keys,
            rotation_seed=keys.rotation_seed(self.id),
            out_u8=packed,
        )
        specs = self.plan.statistics
        encoded = encode_statistics(statistics_of(index), [s.bound for s in specs], [s.name for s in specs])
        return packed.tobytes(), masking.mask_statistics(encoded, masking_keys.statistics)

    def _take(self, step: server_states.Step) -> None:
        self.state = step.state
        self.effects.extend(step.effects)
        for effect in step.effects:
            match effect:
                case server_states.SendTo(recipient, message):
                    for item in self.downlink(recipient, message):
                        self._later(("down", recipient), item)
                case server_states.AddUpdate(member):
                    upload = self.members[member].upload
                    assert upload is not None
                    packed = np.frombuffer(upload[0], np.uint8)
                    masking.accumulate(self.update, packed, self.plan.encoding.ring_bits)
                    masking.accumulate_statistics(self.statistics, upload[1])
                case server_states.RemoveMasks(job):
                    self._later(("unmask", 0), job)

    def _remove_masks(self, job: Any) -> None:
        try:
            masks = remaining_masks(job)
        except DealerEquivocated as error:
            self.tell(server_states.DealerConvicted(error.dealer, str(error)))
            return
        masking.remove_masks(self.update, masks.update)
        masking.remove_statistics_masks(self.statistics, masks.statistics)
        self.mean = np.zeros(self.plan.parameters, np.float32)
        decode_sum(
            self.update,
            self.plan.encoding,
            rotation_seed=keys.rotation_seed(self.id),
            total_weight=round(decode_statistics(self.statistics)[0]),
            out_f32=self.mean,
        )
        self.tell(server_states.MasksRemoved())


def check_transition(before: object, after: object, transitions: Mapping[type, frozenset[type]]) -> None:
    """A state either keeps its kind or goes where the table says."""
    if type(before) is not type(after):
        assert type(after) in transitions[type(before)], f"{type(before).__name__} -> {type(after).__name__}"


@cache
def clean_run(n: int, seed: int = 0) -> Federation:
    """A run in which nothing goes wrong, shared between tests: its states and messages are immutable."""
    return Federation(make_plan(n), seed=seed).run()
