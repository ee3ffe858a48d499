"""The site's own rules about members, at each step at which fewer may be left; and what an operator hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from tests.secagg.cohort import NOW, make_plan, make_site, name_of
from tests.secagg.harness import Federation
from tests.secagg.test_participant_checks import OWN, N, message_of, state_of
from tests.secagg.test_sparse_sessions import run_with_dropouts

from maskwork.secagg import client
from maskwork.secagg.client_states import (
    Aborted,
    AdvertisedKeys,
    EndSession,
    Event,
    Masking,
    Send,
    SharedKeys,
    SignedSets,
    SiteRules,
    State,
    Uploading,
)
from maskwork.secagg.errors import AbortReason
from maskwork.secagg.messages import (
    AdvertiseKeys,
    Advertisements,
    DeliveredShares,
    ShareKeys,
    SurvivorSets,
    Withdraw,
)

Rules = Mapping[str, object]
ALL = frozenset(range(N))
FOUR = ALL - {4}
"""Who is left in each of the cases below."""


def trusting(*members: int, least: int) -> Rules:
    return {"trusted": frozenset(name_of(i) for i in members), "min_trusted_survivors": least}


def under(state: State, rules: Rules, *, index: int = OWN, size: int = N) -> State:
    """The state of a site with these rules."""
    site = make_site(index, size, rules=replace(SiteRules(), **rules))  # type: ignore[arg-type]
    return replace(state, session=replace(state.session, site=site))


def step_1() -> tuple[State, Event]:
    run = Federation(make_plan(N), dies_before={4: AdvertiseKeys}).run()
    return run.members[OWN].before(AdvertisedKeys), run.members[OWN].message(Advertisements)


def step_2() -> tuple[State, Event]:
    run = Federation(make_plan(N), dies_before={4: ShareKeys}).run()
    return run.members[OWN].before(SharedKeys), run.members[OWN].message(DeliveredShares)


def step_3() -> tuple[State, Event]:
    return state_of(Uploading), SurvivorSets(ALL, ALL, FOUR)


STEPS = {"step 1": (step_1, SharedKeys), "step 2": (step_2, Masking), "step 3": (step_3, SignedSets)}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"min_survivors": 5}, "4 survivors verified here are fewer than the policy's 5"),
        (trusting(1, 2, 4, least=3), "trusted survivors verified here 2 < 3"),
        (trusting(4, least=1), "trusted survivors verified here 0 < 1"),
    ],
    ids=["survivors", "trusted", "the only trusted"],
)
def test_members_that_the_policy_asks_for_and_that_are_gone(step: str, rules: Rules, said: str) -> None:
    """At whichever step it shows, the session ends here before this site says anything of that step."""
    before, message = STEPS[step][0]()
    following = client.step(under(before, rules), message, now=NOW)
    assert isinstance(following.state, Aborted)
    assert (following.state.reason, following.state.detail) == (AbortReason.POLICY, said)
    assert following.effects == (Send(Withdraw(AbortReason.POLICY, said)), EndSession())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("rules", [{"min_survivors": 4}, trusting(1, 2, 3, 4, least=3), trusting(4, least=0)])
def test_members_that_just_suffice(step: str, rules: Rules) -> None:
    make, following = STEPS[step]
    before, message = make()
    assert isinstance(client.step(under(before, rules), message, now=NOW).state, following)


def test_a_site_counts_itself_only_if_it_is_named() -> None:
    before, message = step_3()
    assert isinstance(client.step(under(before, trusting(OWN, 1, least=2)), message, now=NOW).state, SignedSets)
    assert isinstance(client.step(under(before, trusting(1, 4, least=2)), message, now=NOW).state, Aborted)


@pytest.mark.parametrize("kind", [SharedKeys, Uploading])
def test_a_trusted_survivor_that_this_site_did_not_verify_does_not_count(kind: type[State]) -> None:
    """On the sparse graph: it survives, as the coordinator says, but its certificate was never looked at here."""
    run = run_with_dropouts()
    member = run.members[0]
    message: Event = member.message(DeliveredShares) if kind is SharedKeys else member.message(SurvivorSets)
    before = member.before(kind)
    assert isinstance(before, SharedKeys | Uploading)
    stranger = next(i for i in sorted(run.survivors) if i not in before.peers and i != 0)
    neighbour = next(i for i in sorted(run.survivors) if i in before.peers)
    size = run.plan.cohort
    refused = client.step(under(before, trusting(stranger, least=1), index=0, size=size), message, now=NOW)
    assert isinstance(refused.state, Aborted)
    assert refused.state.detail == "trusted survivors verified here 0 < 1"
    taken = client.step(under(before, trusting(neighbour, least=1), index=0, size=size), message, now=NOW)
    assert not isinstance(taken.state, Aborted)


def test_what_ends_a_session_for_another_reason_stays_at_the_site() -> None:
    lie = replace(message_of(DeliveredShares), u2=frozenset({1, 2}))
    step = client.step(state_of(SharedKeys), lie, now=NOW)
    assert step.effects == (Send(Withdraw(AbortReason.BAD_SETS)), EndSession())
