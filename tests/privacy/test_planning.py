"""Answers before a run: what goes with what, and what is refused."""

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskwork.privacy import planning as pl
from maskwork.privacy.accountant import epsilon
from maskwork.privacy.mechanisms import Mechanism, Wanted, private_release
from maskwork.privacy.planning import PlanningError, Setting, plan

SETTING = Setting(
    Mechanism.SKELLAM, participants=100, rounds=40, parameters=2000, min_survivors=70, colluders=10, delta=1e-5
)


def with_(**changes: object) -> Setting:
    return dataclasses.replace(SETTING, **changes)  # type: ignore[arg-type]


def test_noise_gives_epsilon_and_loss() -> None:
    answer = plan(SETTING, noise_multiplier=2.0)
    wanted = Wanted(Mechanism.SKELLAM, 100, 60, 2000, 1.0, 2.0)
    release = private_release(wanted, ring_bits=answer.ring_bits)
    assert answer.epsilon == epsilon(release.events(60) * 40, 1e-5)
    noise = 2.0 * release.inflation
    # 100 participants of whom each provisions for 60, on the mean of 100
    assert answer.participant_noise == pytest.approx(noise / math.sqrt(60))
    assert answer.mean_noise == pytest.approx(noise * math.sqrt(100 / 60) / 100)
    assert answer.noise_share == pytest.approx(answer.mean_noise * math.sqrt(2000) / math.sqrt(40))
    assert answer.accuracy_loss == pl.loss_at(answer.noise_share)
    assert answer.accuracy_loss_at_worst == pl.loss_at(answer.noise_share, pl.MEASURED_LOSS_AT_WORST)
    assert answer.bytes_per_parameter == answer.ring_bits / 8
    assert (answer.setting, answer.participants_needed, answer.beyond_measured) == (SETTING, False, False)


def test_epsilon_gives_noise_that_is_enough_and_no_more() -> None:
    for asked in (0.5, 3.0, 12.0):
        answer = plan(SETTING, epsilon=asked)
        assert 0.99 * asked < answer.epsilon <= asked
        again = plan(SETTING, noise_multiplier=answer.noise_multiplier)
        assert again.epsilon == pytest.approx(answer.epsilon, rel=0.01)


@settings(max_examples=15, deadline=None)
@given(loss=st.floats(5.0, 70.0))
def test_a_loss_gives_noise_that_costs_no_more(loss: float) -> None:
    answer = plan(SETTING, accuracy_loss=loss)
    assert 0.8 * loss - 0.2 < answer.accuracy_loss <= loss * (1 + 1e-9)


def test_more_rounds_and_fewer_honest_cost_more() -> None:
    def spent(setting: Setting) -> float:
        return plan(setting, noise_multiplier=2.0).epsilon

    def lost(setting: Setting) -> float:
        return plan(setting, epsilon=4.0).accuracy_loss

    assert spent(SETTING) < spent(with_(rounds=80))
    assert spent(SETTING) < spent(with_(delta=1e-8))
    assert lost(SETTING) < lost(with_(colluders=50))
    assert lost(SETTING) < lost(with_(parameters=20_000))
    # the coordinator's own noise is not divided for the fewest survivors
    assert lost(with_(mechanism=Mechanism.CENTRAL_GAUSSIAN)) < lost(SETTING)


def test_the_clip_norm_only_scales_the_noise() -> None:
    one, ten = (plan(with_(clip_norm=c), epsilon=4.0) for c in (1.0, 10.0))
    assert (one.epsilon, one.accuracy_loss, one.ring_bits) == (ten.epsilon, ten.accuracy_loss, ten.ring_bits)
    assert ten.participant_noise == pytest.approx(10 * one.participant_noise)
    assert ten.mean_noise == pytest.approx(10 * one.mean_noise)


def test_central_noise_is_nobodys_among_the_participants() -> None:
    answer = plan(with_(mechanism=Mechanism.CENTRAL_GAUSSIAN), noise_multiplier=2.0)
    assert answer.participant_noise == 0
    assert answer.mean_noise == pytest.approx(2 / 100, rel=0.1)


def test_the_ring_is_the_narrowest_that_costs_little() -> None:
    answer = plan(SETTING, noise_multiplier=2.0)
    given = plan(with_(ring_bits=answer.ring_bits), noise_multiplier=2.0)
    assert given == dataclasses.replace(answer, setting=given.setting)
    widest = plan(with_(ring_bits=32), noise_multiplier=2.0)
    assert answer.epsilon <= 1.05 * widest.epsilon
    assert answer.mean_noise <= 1.05 * widest.mean_noise
    with_less = with_(ring_bits=answer.ring_bits - 1)
    try:
        narrower = plan(with_less, noise_multiplier=2.0)
    except ValueError:
        return
    assert narrower.epsilon > 1.05 * widest.epsilon or narrower.mean_noise > 1.05 * widest.mean_noise


@pytest.mark.parametrize("asked", [{"epsilon": 4.0}, {"noise_multiplier": 3.0}])
def test_a_loss_and_another_give_the_participants(asked: dict[str, float]) -> None:
    answer = plan(SETTING, accuracy_loss=2.0, **asked)
    needed = answer.setting.participants
    assert answer.participants_needed
    assert answer.accuracy_loss <= 2.0
    assert answer.setting.min_survivors == math.ceil(0.7 * needed)
    assert answer.setting.colluders == 10
    one_less = plan(SETTING.with_participants(needed - 1), **asked)
    assert one_less.accuracy_loss > 2.0


def test_fewer_participants_than_were_asked_about_may_do() -> None:
    answer = plan(SETTING, accuracy_loss=75.0, epsilon=8.0)
    assert 17 <= answer.setting.participants < 100
    assert answer.setting.honest >= 2


def test_more_participants_than_there_can_be_are_refused() -> None:
    with pytest.raises(PlanningError, match=r"even 20,000 participants would lose about \d+\.\d points"):
        plan(with_(parameters=10**9), accuracy_loss=2.0, epsilon=0.5)
    # at most 1/δ, for δ is given
    with pytest.raises(PlanningError, match="even 500 participants"):
        plan(with_(delta=1 / 500), accuracy_loss=0.5, epsilon=0.5)


def test_epsilon_and_noise_have_to_agree() -> None:
    by_noise = plan(SETTING, noise_multiplier=2.0)
    assert plan(SETTING, noise_multiplier=2.0, epsilon=by_noise.epsilon) == by_noise
    for factor in (0.9, 1.1):
        with pytest.raises(PlanningError, match="do not agree: a noise multiplier of 2 spends epsilon") as refused:
            plan(SETTING, noise_multiplier=2.0, epsilon=factor * by_noise.epsilon)
        named = float(str(refused.value).split("takes a noise multiplier of ")[1].split(". ")[0])
        agreed = plan(SETTING, noise_multiplier=named)
        assert agreed.epsilon == pytest.approx(factor * by_noise.epsilon, rel=0.01)


def test_without_a_delta_it_is_below_one_in_n() -> None:
    answer = plan(with_(delta=None), noise_multiplier=2.0)
    assert answer.delta == 100**-1.1 < 1 / 100
    larger = plan(with_(delta=None), epsilon=2.0, accuracy_loss=1.0)
    assert larger.delta == larger.setting.participants**-1.1


@pytest.mark.parametrize("delta", [0.0100001, 0.5, 1.0, 0.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_promises_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PlanningError, match=r"at most 1/n = 0\.01"):
        with_(delta=delta)
    assert with_(delta=0.01).total_delta == 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"participants": 1}, "participants is 1: give an integer from 2 to 20,000"),
        ({"participants": 30_000}, "from 2 to 20,000"),
        ({"rounds": 0}, "rounds is 0"),
        ({"parameters": 0}, "parameters is 0"),
        ({"min_survivors": 101}, "min_survivors is 101: give an integer from 1 to 100"),
        ({"colluders": -1}, "colluders is -1"),
        ({"min_survivors": 11}, "leave 1 honest.* Ask for at least 12 survivors"),
        ({"colluders": 69}, "leave 1 honest.* Ask for at least 71 survivors"),
        ({"min_survivors": 1, "colluders": 0}, "at least 2 survivors"),
        ({"ring_bits": 7}, "ring_bits is 7: give an integer from 8 to 32"),
        ({"ring_bits": 33}, "from 8 to 32"),
        ({"mechanism": Mechanism.CENTRAL_LAPLACE}, "central-laplace.* plan another"),
        ({"clip_norm": math.nan}, "clip_norm is nan: give a number from"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"clip_norm": math.inf}, "clip_norm is inf"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(PlanningError, match=said):
        with_(**changes)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "none of epsilon, noise multiplier and accuracy loss is given"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0, "accuracy_loss": 1.0}, "all three"),
        ({"noise_multiplier": 0.0}, "a noise multiplier of 0 is no noise"),
        ({"noise_multiplier": -1.0}, "the noise multiplier is -1.0: give a positive number"),
        ({"noise_multiplier": math.nan}, "the noise multiplier is nan"),
        ({"epsilon": 0.0}, "the epsilon is 0.0: give a positive number"),
        ({"epsilon": math.inf}, "the epsilon is inf"),
        ({"accuracy_loss": -1.0}, "give a number from 0 to"),
        ({"accuracy_loss": math.nan}, "give a number from 0 to"),
        ({"accuracy_loss": 100.0}, "give a number from 0 to"),
        ({"accuracy_loss": 0.0}, "without any loss of accuracy there is no noise"),
        ({"noise_multiplier": 0.05}, "no finite epsilon goes with a noise multiplier of 0.05"),
    ],
)
def test_a_question_without_an_answer_is_refused(asked: dict[str, float], said: str) -> None:
    with pytest.raises(PlanningError, match=said):
        plan(SETTING, **asked)


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    # the noise that epsilon takes is more than the widest ring holds; or no noise is exact enough for so small a delta
    for setting, asked in ((with_(rounds=1_000_000, parameters=10**10), 1e-5), (with_(delta=1e-29), 1.0)):
        with pytest.raises(PlanningError, match="takes more noise than can be drawn here: allow a larger epsilon"):
            plan(setting, epsilon=asked)


def test_noise_that_is_too_much_for_a_few_is_shared_by_more() -> None:
    setting = with_(parameters=10**9, delta=None, colluders=0)
    with pytest.raises(PlanningError, match="takes more noise than can be drawn here"):
        plan(dataclasses.replace(setting, participants=3, min_survivors=2), epsilon=1.0)
    answer = plan(dataclasses.replace(setting, participants=3, min_survivors=2), epsilon=8.0, accuracy_loss=78.0)
    assert answer.setting.participants > 3


def test_a_ring_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match="ring of 10 bits is too narrow here"):
        plan(with_(ring_bits=10), epsilon=4.0)


@pytest.mark.parametrize("curve", [pl.MEASURED_LOSS, pl.MEASURED_LOSS_AT_WORST])
def test_the_measured_curves_are_monotone_and_end_in_nothing(curve: tuple[tuple[float, float], ...]) -> None:
    assert curve[0] == (0.0, 0.0)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(curve))
    assert 70 < curve[-1][1] < 100
    assert all(pl.loss_at(share) >= pl.loss_at(share, pl.MEASURED_LOSS) for share, _ in pl.MEASURED_LOSS_AT_WORST)


@given(loss=st.floats(0.0, 80.0))
def test_losses_and_shares_are_each_others_inverse(loss: float) -> None:
    assert pl.loss_at(pl.share_at(loss)) == pytest.approx(loss, abs=1e-9)


def test_straight_lines_between_the_points() -> None:
    curve = ((0.0, 0.0), (1.0, 0.0), (2.0, 4.0), (4.0, 8.0))
    assert [pl.loss_at(x, curve) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 9)] == [0, 0, 0, 2, 4, 6, 8, 8]
    assert [pl.share_at(y, curve) for y in (0.0, 1.0, 4.0, 7.0)] == [1, 1.25, 2, 3.5]
    with pytest.raises(PlanningError):
        pl.share_at(8.0, curve)
