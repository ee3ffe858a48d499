"""Before a run: what a privacy budget, an amount of noise and a loss of accuracy have to do with one another.

For given participants, rounds, parameters and δ, ε and the noise multiplier determine each other, exactly; and the
noise determines the loss of accuracy, *as an estimate*. So of the three one is asked for and gives the other two. A
budget and a loss together say how many participants are needed, for a larger cohort has less noise on its mean.

The estimate goes through one number, the noise's share: the expected norm of the noise on a round's mean over the clip
norm, divided by the square root of the rounds. It is what the noise of all rounds together comes to, in units of the
way that a model can go in them. `MEASURED_LOSS` says what that did to accuracy where it was measured.

What this deliberately is not: it derives no sensitivity and no ring (`mechanisms` does), it does no training, and its
estimate is no forecast for another task: only ε is a guarantee.

Rules:
 1. ε is an upper bound and the noise multiplier is enough; where something is rounded, it is towards more noise.
 2. The noise is counted at the fewest honest survivors, the accuracy at the full cohort: each where it is worst.
 3. What cannot be is refused with what would be accepted.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from typing import Final

from maskwork.privacy.events import PrivacyEvent
from maskwork.privacy.mechanisms import MIN_HONEST, Mechanism, MechanismError, NoisyRelease, Wanted, private_release
from maskwork.secagg.encoding import MAX_CLIP_NORM, MIN_CLIP_NORM
from maskwork.secagg.plan import MAX_PARAMETERS, MAX_ROSTER
from maskwork.secagg.ring import MAX_BITS, MIN_BITS

MEASURED_ON: Final = "softmax regression on scikit-learn's digits, 3 simulated cohorts of 10 and 50"

MEASURED_LOSS: Final[tuple[tuple[float, float], ...]] = (
    (0.0, 0.0),
    (0.01, 0.1),
    (0.02, 0.1),
    (0.05, 0.7),
    (0.1, 2.2),
    (0.2, 7.4),
    (0.3, 13.4),
    (0.5, 23.7),
    (0.7, 31.0),
    (1, 40.2),
    (1.5, 52.6),
    (2, 62.1),
    (3, 73.0),
    (5, 78.8),
    (10, 81.1),
)
"""The noise's share, and percentage points of test accuracy lost: the mean of all cohorts of
`benchmarks/privacy_loss.py`, whose results are in `benchmarks/results/privacy-loss.json`."""

MEASURED_LOSS_AT_WORST: Final[tuple[tuple[float, float], ...]] = (
    (0.0, 0.0),
    (0.01, 0.6),
    (0.02, 0.6),
    (0.05, 2.2),
    (0.1, 6.8),
    (0.2, 20.5),
    (0.3, 31.4),
    (0.5, 50.8),
    (0.7, 62.8),
    (1, 73.9),
    (1.5, 79.5),
    (2, 81.5),
    (3, 83.5),
    (5, 85.0),
    (10, 87.0),
)
"""The same of the worst cohort, that of participants whose data differ most."""

DELTA_EXPONENT: Final = 1.1
"""Without a δ, it is n^-1.1: below 1/n, at which giving one participant's data away whole would be within the bound."""

MAX_ROUNDS: Final = 1_000_000
_MUCH_COARSER: Final = 1.05  # the narrowest ring is one that costs no more than this many times the widest one's ε
_AGREES: Final = 0.01


class PlanningError(ValueError):
    """A question that has no answer; the text says what would be accepted."""


class TooMuchNoise(PlanningError):
    """What an ε takes is more noise than these participants can draw."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A federation as it is thought of before a run.

    Attributes:
        mechanism: who adds which noise.
        participants: n, the cohort of every round.
        rounds: of the whole run.
        parameters: d, of the model.
        min_survivors: a round with fewer is aborted.
        colluders: participants that may tell the coordinator their noise; the guarantee holds in spite of them.
        delta: of the guarantee over the whole run; None for n^-1.1.
        ring_bits: of the sums; None for the narrowest that costs little.
        clip_norm: C, the largest norm of an update. Neither ε nor the estimate depends on it.
    """

    mechanism: Mechanism
    participants: int
    rounds: int
    parameters: int
    min_survivors: int
    colluders: int = 0
    delta: float | None = None
    ring_bits: int | None = None
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.mechanism is Mechanism.CENTRAL_LAPLACE:
            raise PlanningError("central-laplace goes by the L1 norm, for which no loss was measured: plan another one")
        _within("participants", self.participants, 2, MAX_ROSTER)
        _within("rounds", self.rounds, 1, MAX_ROUNDS)
        _within("parameters", self.parameters, 1, MAX_PARAMETERS)
        _within("min_survivors", self.min_survivors, 1, self.participants)
        _within("colluders", self.colluders, 0, self.participants)
        if self.ring_bits is not None:
            _within("ring_bits", self.ring_bits, MIN_BITS, MAX_BITS)
        if not MIN_CLIP_NORM <= self.clip_norm <= MAX_CLIP_NORM:  # a NaN fails too
            raise PlanningError(
                f"clip_norm is {self.clip_norm!r}: give a number from {MIN_CLIP_NORM:.2g} to {MAX_CLIP_NORM:.2g}"
            )
        if self.honest < MIN_HONEST:
            raise PlanningError(
                f"{self.min_survivors} survivors less {self.colluders} colluders leave {self.honest} honest: the sum "
                f"of fewer than {MIN_HONEST} honest participants hides nobody. Ask for at least "
                f"{self.colluders + MIN_HONEST} survivors, or expect fewer colluders"
            )
        _check_delta(self.delta, self.participants)

    @property
    def honest(self) -> int:
        """The fewest honest participants whose noise is in a sum."""
        return self.min_survivors - self.colluders

    @property
    def total_delta(self) -> float:
        """The δ of the whole run."""
        return float(self.participants**-DELTA_EXPONENT) if self.delta is None else self.delta

    def with_participants(self, participants: int) -> Setting:
        """The same with another cohort, of which the same share survives; colluders stay as many as they are."""
        survivors = -(-self.min_survivors * participants // self.participants)
        return dataclasses.replace(self, participants=participants, min_survivors=survivors)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes together.

    Attributes:
        setting: what it holds for; of another cohort than was asked about if `participants_needed`.
        epsilon: ε of the whole run at `delta`, an upper bound.
        delta: δ of the whole run.
        noise_multiplier: standard deviation of the fewest honest participants' noise together, in units of the
            sensitivity, which is the clip norm and a little for rounding.
        ring_bits: of the sums.
        bytes_per_parameter: that one participant sends in one round.
        participant_noise: standard deviation of what each participant adds to each coordinate of its update, in the
            update's units; 0 where the coordinator adds the noise.
        mean_noise: the same of the noise on the mean of a round in which everybody survives.
        noise_share: of the module's docstring.
        accuracy_loss: percentage points, the estimate.
        accuracy_loss_at_worst: the same where participants' data differ much.
        beyond_measured: whether the noise's share is beyond all that was measured; the losses are then the largest.
        participants_needed: whether the cohort is what was looked for.
    """

    setting: Setting
    epsilon: float
    delta: float
    noise_multiplier: float
    ring_bits: int
    bytes_per_parameter: float
    participant_noise: float
    mean_noise: float
    noise_share: float
    accuracy_loss: float
    accuracy_loss_at_worst: float
    beyond_measured: bool
    participants_needed: bool = False


def loss_at(noise_share: float, curve: tuple[tuple[float, float], ...] = MEASURED_LOSS) -> float:
    """Percentage points of accuracy, by straight lines between measured points; the last one's beyond them."""
    after = bisect.bisect_right(curve, (noise_share, math.inf))
    if after == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[after - 1], curve[after]
    return y0 + (y1 - y0) * (noise_share - x0) / (x1 - x0)


def share_at(loss: float, curve: tuple[tuple[float, float], ...] = MEASURED_LOSS) -> float:
    """The largest share of noise with a loss of no more than that.

    Raises:
        PlanningError: the loss is negative, or as large as the largest that was measured.
    """
    if not 0 <= loss < curve[-1][1]:  # a NaN fails too
        raise PlanningError(
            f"a loss of {loss:g} points of accuracy is not one to plan for: give a number from 0 to {curve[-1][1]:g}"
        )
    after = next(i for i, (_, lost) in enumerate(curve) if lost > loss)
    (x0, y0), (x1, y1) = curve[after - 1], curve[after]
    return x0 + (x1 - x0) * (loss - y0) / (y1 - y0)


def plan(
    setting: Setting,
    *,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accuracy_loss: float | None = None,
) -> Answer:
    """What goes with one of the three; with a loss and one of the others, the participants that it takes.

    Args:
        setting: the federation.
        epsilon: not to be exceeded by the whole run.
        noise_multiplier: standard deviation of the fewest honest participants' noise together, in units of the
            sensitivity.
        accuracy_loss: percentage points, not to be exceeded by the estimate.

    Raises:
        PlanningError: the question has no answer; the text says what would be accepted.
        ValueError: of the accountant or the mechanism, likewise.
    """
    _check_asked(epsilon, noise_multiplier, accuracy_loss)
    if epsilon is not None and noise_multiplier is not None:
        return _agreed(setting, epsilon, noise_multiplier)
    if accuracy_loss is None:
        return _answer(setting, *_settled(setting, epsilon, noise_multiplier))
    if epsilon is None and noise_multiplier is None:
        noise_multiplier = _noise_that_loses(setting, accuracy_loss)
        return _answer(setting, *_settled(setting, None, noise_multiplier))
    return _participants_for(setting, epsilon, noise_multiplier, accuracy_loss)


def _agreed(setting: Setting, epsilon: float, noise_multiplier: float) -> Answer:
    """Both are given: they must be the same thing said twice."""
    spent = _epsilon_of(setting, *_settled(setting, None, noise_multiplier))
    if abs(spent - epsilon) <= _AGREES * epsilon:
        return _answer(setting, *_settled(setting, None, noise_multiplier))
    needed, _ = _settled(setting, epsilon, None)
    raise PlanningError(
        f"epsilon and the noise multiplier determine each other, and these two do not agree: a noise multiplier of "
        f"{noise_multiplier:g} spends epsilon {spent:.4g}, and epsilon {epsilon:g} takes a noise multiplier of "
        f"{needed:.4g}. Give one of the two, or a pair that agrees"
    )


def _participants_for(
    setting: Setting,
    epsilon: float | None,
    noise_multiplier: float | None,
    accuracy_loss: float,
) -> Answer:
    """The smallest cohort whose estimated loss is no larger than what is accepted."""

    def at(participants: int) -> Answer:
        cohort = setting.with_participants(participants)
        return _answer(cohort, *_settled(cohort, epsilon, noise_multiplier))

    def is_enough(participants: int) -> bool:
        try:
            return at(participants).accuracy_loss <= accuracy_loss
        except (MechanismError, TooMuchNoise):  # for so few to draw; more of them share it
            return False

    least, most = _smallest_cohort(setting), _largest_cohort(setting)
    upper = least
    while not is_enough(upper):  # doubled, not begun at the largest: a ring may be too narrow for that one
        if upper == most:
            lost = at(most).accuracy_loss
            raise PlanningError(
                f"even {most:,} participants would lose about {lost:.1f} points of accuracy, more than "
                f"{accuracy_loss:g}: allow {math.ceil(10 * lost) / 10:g}, a larger epsilon or less noise, or fewer "
                "parameters"
            )
        upper = min(2 * upper, most)
    needed = bisect.bisect_left(range(upper), True, lo=least, key=is_enough)
    return dataclasses.replace(at(needed), participants_needed=True)


def _smallest_cohort(setting: Setting) -> int:
    """The smallest of which the setting's share of survivors leaves enough who are honest."""
    needed = setting.colluders + MIN_HONEST
    return max(MIN_HONEST, (needed - 1) * setting.participants // setting.min_survivors + 1)


def _largest_cohort(setting: Setting) -> int:
    """A given δ goes with no more than 1/δ participants."""
    return MAX_ROSTER if setting.delta is None else min(MAX_ROSTER, math.floor(1 / setting.delta))


def _settled(setting: Setting, epsilon: float | None, noise_multiplier: float | None) -> tuple[float, int]:
    """The noise multiplier and the ring, from one of the two numbers that determine each other."""
    if noise_multiplier is None:
        assert epsilon is not None  # `_check_asked`
        bits = _ring(setting, _noise_for(setting, epsilon, setting.ring_bits or MAX_BITS))
        return _noise_for(setting, epsilon, bits), bits
    return noise_multiplier, _ring(setting, noise_multiplier)


def _ring(setting: Setting, noise_multiplier: float) -> int:
    """The narrowest ring whose rounding costs little, in ε and in noise."""
    if setting.ring_bits is not None:
        return setting.ring_bits
    most_epsilon = _MUCH_COARSER * _epsilon_of(setting, noise_multiplier, MAX_BITS)
    most_inflation = _MUCH_COARSER * _release(setting, noise_multiplier, MAX_BITS).inflation
    for bits in range(MIN_BITS, MAX_BITS):
        try:
            inflation = _release(setting, noise_multiplier, bits).inflation
        except ValueError:
            continue  # too narrow to hold the sum at all
        if inflation <= most_inflation and _epsilon_of(setting, noise_multiplier, bits) <= most_epsilon:
            return bits
    return MAX_BITS


def _release(setting: Setting, noise_multiplier: float, bits: int) -> NoisyRelease:
    """A round of a job with these numbers."""
    wanted = Wanted(
        setting.mechanism,
        setting.participants,
        setting.honest,
        setting.parameters,
        setting.clip_norm,
        noise_multiplier,
    )
    return private_release(wanted, ring_bits=bits)


def _epsilon_of(setting: Setting, noise_multiplier: float, bits: int) -> float:
    """Of the whole run, every round with the fewest honest survivors."""
    from maskwork.privacy.accountant import Composition  # two seconds, for those who ask

    composition = Composition()
    for event in _release(setting, noise_multiplier, bits).events(setting.honest):
        composition.add(event, setting.rounds)
    return composition.epsilon(setting.total_delta)


def _noise_for(setting: Setting, epsilon: float, bits: int) -> float:
    from maskwork.privacy.accountant import noise_multiplier_for

    def events(noise_multiplier: float) -> tuple[PrivacyEvent, ...]:
        return _release(setting, noise_multiplier, bits).events(setting.honest)

    try:
        return noise_multiplier_for(epsilon, setting.total_delta, setting.rounds, events)
    except MechanismError as error:
        raise TooMuchNoise(
            f"epsilon {epsilon:g} at delta {setting.total_delta:.3g} takes more noise than can be drawn here: allow a "
            f"larger epsilon or delta, or fewer rounds ({error})"
        ) from None


def _mean_noise(setting: Setting, noise: float) -> float:
    """Standard deviation of each coordinate's noise on the mean of the full cohort.

    Distributed noise is provisioned for the fewest honest survivors, so when all survive there is more of it; the
    coordinator's own noise does not depend on them.
    """
    more = setting.participants / setting.honest if setting.mechanism.distributed else 1.0
    return noise * math.sqrt(more) / setting.participants


def _noise_share(setting: Setting, noise: float) -> float:
    """Of noise on a round's sum in clip norms: a noise multiplier times its inflation."""
    return _mean_noise(setting, noise) * math.sqrt(setting.parameters / setting.rounds)


def _noise_that_loses(setting: Setting, accuracy_loss: float) -> float:
    noise = share_at(accuracy_loss) / _noise_share(setting, 1.0)
    if noise == 0:
        raise PlanningError("without any loss of accuracy there is no noise, and so no privacy: allow some")
    # Less noise leaves room for finer steps in the same ring, so what is taken off here is enough.
    return noise / _release(setting, noise, _ring(setting, noise)).inflation


def _answer(setting: Setting, noise_multiplier: float, bits: int) -> Answer:
    epsilon = _epsilon_of(setting, noise_multiplier, bits)
    if math.isinf(epsilon):
        raise PlanningError(
            f"no finite epsilon goes with a noise multiplier of {noise_multiplier:g} at delta {setting.total_delta:g}: "
            "give more noise (which costs less accuracy among more participants), or a larger delta"
        )
    noise = noise_multiplier * _release(setting, noise_multiplier, bits).inflation
    own = noise * setting.clip_norm / math.sqrt(setting.honest) if setting.mechanism.distributed else 0.0
    share = _noise_share(setting, noise)
    return Answer(
        setting=setting,
        epsilon=epsilon,
        delta=setting.total_delta,
        noise_multiplier=noise_multiplier,
        ring_bits=bits,
        bytes_per_parameter=bits / 8,
        participant_noise=own,
        mean_noise=_mean_noise(setting, noise) * setting.clip_norm,
        noise_share=share,
        accuracy_loss=loss_at(share),
        accuracy_loss_at_worst=loss_at(share, MEASURED_LOSS_AT_WORST),
        beyond_measured=share > MEASURED_LOSS[-1][0],
    )


def _check_asked(epsilon: float | None, noise_multiplier: float | None, accuracy_loss: float | None) -> None:
    given = [value for value in (epsilon, noise_multiplier, accuracy_loss) if value is not None]
    if not 1 <= len(given) <= 2:
        raise PlanningError(
            f"{'none' if not given else 'all three'} of epsilon, noise multiplier and accuracy loss is given: give one "
            "for the other two, or a loss and one of the others for the participants that it takes"
        )
    if noise_multiplier == 0:
        raise PlanningError(
            "a noise multiplier of 0 is no noise, and no privacy: give a positive one, or an epsilon to find it"
        )
    for name, value in (("epsilon", epsilon), ("noise multiplier", noise_multiplier)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise PlanningError(f"the {name} is {value!r}: give a positive number")
    if accuracy_loss is not None:
        share_at(accuracy_loss)


def _check_delta(delta: float | None, participants: int) -> None:
    if delta is not None and not 0 < delta <= 1 / participants:  # a NaN fails too
        raise PlanningError(
            f"delta is {delta!r}: give a positive one of at most 1/n = {1 / participants:.3g}. Above it, publishing "
            f"one of the {participants} participants' data whole would count as private"
        )


def _within(name: str, value: int, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise PlanningError(f"{name} is {value!r}: give an integer from {least} to {most:,}")
