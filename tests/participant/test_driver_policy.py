"""The policy during a session: what is asked again, what ends a session, what does not, and when a site comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from tests.participant.local_site import NAMES, NOW, OWN, PATIENCE_S, Table

from maskwork.participant.hours import DAYS, Hours
from maskwork.participant.policy import Policy
from maskwork.secagg import server_states as core
from maskwork.secagg.errors import AbortReason, DeclineCode
from maskwork.secagg.messages import AdvertiseKeys, ConsistencyCheck, Decline, Withdraw

pytestmark = pytest.mark.asyncio
TODAY = datetime.fromtimestamp(NOW, UTC)
WINDOW = f"{DAYS[TODAY.weekday()]} {TODAY:%H}:00-{(TODAY.hour + 1) % 24:02}:00"
"""The hour in which `NOW` is."""
HOURS = Policy(min_weight_cap=1, hours=Hours(time_zone="UTC", windows=(WINDOW,)))
OUTSIDE = NOW + 12 * 3600


class Clock:
    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Pauses:
    """A pause that ends when the test says."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def __call__(self, _seconds: float) -> None:
        over = asyncio.Event()
        await self.asked.put(over)
        await over.wait()

    async def end_one(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            (await self.asked.get()).set()


@asynccontextmanager
async def site(folder: Path, policy: Policy, *, clock: Clock, pause: Pauses | None = None) -> AsyncIterator[Table]:
    table = await Table(folder, policy, clock=clock, pause=pause or Pauses()).start()
    try:
        yield table
    finally:
        await table.close()


def trusting(*members: int, least: int) -> Policy:
    names = tuple(NAMES[i] for i in members)
    return Policy(min_weight_cap=1, trusted_participants=names, min_trusted_survivors=least)


# --- hours ----------------------------------------------------------------------------------------------------------


async def test_outside_its_hours_a_site_declines_and_connects_anew_when_they_begin(tmp_path: Path) -> None:
    clock, pauses = Clock(OUTSIDE), Pauses()
    async with site(tmp_path / "site", HOURS, clock=clock, pause=pauses) as table:
        session = await table.propose(table.offer())
        (declined,) = table.answers(session, Decline)
        assert declined.code is DeclineCode.PAUSED
        assert declined.detail.endswith(f"is outside the hours agreed to: {WINDOW} UTC")
        assert table.worker.calls == []
        await pauses.end_one()
        await table.settle()
        assert table.link.redials == 0  # the hours have not begun
        clock.now = NOW + 7 * 86_400
        await pauses.end_one()
        async with asyncio.timeout(PATIENCE_S):
            await table.link.redialled.wait()
        await table.connect()
        again = await table.play(table.offer(attempt=2))
        assert isinstance(table.state, core.Completed), again.hex()


async def test_hours_that_end_while_the_model_is_fetched_end_the_session_before_step_0_and_say_so(
    tmp_path: Path,
) -> None:
    clock = Clock()
    async with site(tmp_path / "site", HOURS, clock=clock) as table:
        table.link.held_downloads = True
        session = await table.propose(table.offer())
        assert table.answers(session, Decline) == []
        clock.now = OUTSIDE
        table.link.go.set()
        await table.settle()
        (declined,) = table.answers(session, Decline)
        assert declined.code is DeclineCode.PAUSED
        assert table.answers(session, AdvertiseKeys) == []
        assert table.ledger.highest_attempt("test", "job-1") is None
        (refused,) = table.ledger.plans("test")
        assert refused.refused_because == declined.detail


async def test_hours_that_end_during_a_session_do_not_break_it_and_the_log_says_so(tmp_path: Path) -> None:
    """Hours say when a session may begin: breaking one under way would cost every other site the round."""
    clock = Clock()
    async with site(tmp_path / "site", HOURS, clock=clock) as table:
        table.worker.held = {"train"}
        playing = asyncio.create_task(table.play(table.offer(), until=core.CollectingUpdates))
        session = await playing
        clock.now = OUTSIDE
        with structlog.testing.capture_logs() as logged:
            table.worker.go.set()
            await table.settle()
        (line,) = [e for e in logged if e["event"] == "trained"]
        assert line["after_hours"] is True
        assert table.answers(session, Withdraw) == []
        assert table.driver.active_session() == session


# --- trusted members ------------------------------------------------------------------------------------------------


async def test_a_roster_without_enough_trusted_members_is_declined_before_anything_is_fetched(tmp_path: Path) -> None:
    policy = trusting(0, OWN, least=2).model_copy(update={"trusted_participants": (NAMES[0], "elsewhere")})
    async with site(tmp_path / "site", policy, clock=Clock()) as table:
        session = await table.propose(table.offer())
        assert table.answers(session, Decline) == [Decline(DeclineCode.TOO_FEW_SURVIVORS, "trusted members 1 < 2")]
        assert table.worker.calls == []


async def test_trusted_members_that_are_lost_end_the_session_before_this_site_signs(tmp_path: Path) -> None:
    """The coordinator leaves a trusted member out of U3; the site says why and releases nothing."""
    async with site(tmp_path / "site", trusting(0, OWN, 2, 3, least=4), clock=Clock()) as table:
        offer = table.offer()
        session = await table.play(offer, until=core.CollectingSignatures)
        assert isinstance(table.state, core.CollectingSignatures)
        sets = table.state.sets
        assert sets.u3 == frozenset(range(4))
        await table.say(session, type(sets)(sets.u1, sets.u2, sets.u3 - {3}))
        said = "trusted survivors verified here 3 < 4"
        assert table.answers(session, Withdraw) == [Withdraw(AbortReason.POLICY, said)]
        assert table.answers(session, ConsistencyCheck) == []
        assert table.ledger.releases("test", offer.proposal.plan.model_digest) == ()


async def test_enough_trusted_members_complete_a_session(tmp_path: Path) -> None:
    async with site(tmp_path / "site", trusting(0, 2, 3, least=3), clock=Clock()) as table:
        await table.play(table.offer())
        assert isinstance(table.state, core.Completed)


# --- participation --------------------------------------------------------------------------------------------------


async def test_participation_is_counted_from_the_ledger_also_after_a_restart(tmp_path: Path) -> None:
    half = Policy(min_weight_cap=1, max_participation=0.5, participation_window=4)
    async with site(tmp_path / "site", half, clock=Clock()) as table:
        for number in (3, 4):
            await table.propose(table.offer(round_number=number, nonce=bytes([number]) * 16))
    async with site(tmp_path / "site", half, clock=Clock()) as table:
        table.link.held_downloads = True  # whatever is said now is said before anything is fetched
        session = await table.propose(table.offer(round_number=5))
        assert table.answers(session, Decline) == [
            Decline(DeclineCode.PARTICIPATION, "participation in 3 of 4 rounds > 0.5")
        ]
        session = await table.propose(table.offer(round_number=7))
        assert table.answers(session, Decline) == []
