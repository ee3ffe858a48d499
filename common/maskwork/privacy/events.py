"""What was released, as immutable records: the only thing that an accountant is ever told.

A record holds what a guarantee depends on and nothing else: sensitivities and noise as *integers on the ring*, after
scaling and rounding, at the number of honest survivors that the noise was counted for. So an accountant needs neither
the plan nor the data, and a ledger can be added up years later.

It computes no ε (`accountant` does) and draws no noise.

Rules it upholds:

1. A record is of one level: it protects a whole *participant*, or one *example* of a site's data. Levels never mix.
2. Reading refuses what it does not know: a kind, a field, a number that is not finite. Nothing is taken for harmless.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeAlias


class UnknownEventError(ValueError):
    """A record of a release that this version cannot account for."""


class Level(StrEnum):
    """Whom a guarantee protects."""

    PARTICIPANT = "participant"
    EXAMPLE = "example"


class _Checked:
    """Refuses numbers that no release can have."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            kinds = (int,) if field.type == "int" else (int, float)
            if type(value) not in kinds or not math.isfinite(value) or value < 0:
                raise UnknownEventError(f"{type(self).__name__}.{field.name} is {value!r}: no release has that")
            if value == 0 and field.name not in _MAY_BE_ZERO:
                raise UnknownEventError(f"{type(self).__name__}.{field.name} is zero: that is no noise, or no release")


_MAY_BE_ZERO: Final = frozenset({"total_variation", "steps"})


@dataclass(frozen=True, slots=True)
class SkellamRelease(_Checked):
    """An integer vector plus Skellam noise, the sum over the honest survivors.

    Attributes:
        l1: L1 sensitivity of the integer vector.
        l2: its L2 sensitivity.
        variance: of the honest survivors' noise together, per coordinate.
        total_variation: how far, at most, the noise drawn is from exact Skellam noise, the whole vector together.
    """

    l1: float
    l2: float
    variance: float
    total_variation: float = 0.0


@dataclass(frozen=True, slots=True)
class DiscreteGaussianRelease(_Checked):
    """An integer vector plus the sum of independent discrete Gaussians, one from each of `parties`.

    Attributes:
        l1: L1 sensitivity of the integer vector.
        l2: its L2 sensitivity.
        dimension: coordinates of the vector.
        variance: σ² of *each* party's noise, as the parameter of the discrete Gaussian.
        parties: independent draws in the sum; 1 for noise that the coordinator adds.
        total_variation: as in `SkellamRelease`.
    """

    l1: float
    l2: float
    dimension: int
    variance: float
    parties: int
    total_variation: float = 0.0


@dataclass(frozen=True, slots=True)
class DiscreteLaplaceRelease(_Checked):
    """An integer vector plus discrete Laplace noise: p(k) proportional to exp(-|k| / scale), drawn once.

    Attributes:
        l1: L1 sensitivity of the integer vector.
        scale: of the noise, per coordinate.
        total_variation: as in `SkellamRelease`.
    """

    l1: float
    scale: float
    total_variation: float = 0.0


@dataclass(frozen=True, slots=True)
class PoissonSampledGaussianSteps(_Checked):
    """Steps of DP-SGD at one site: each takes every example with the same probability, clips, and adds Gaussian noise.

    The sampling is the site's own and nobody else sees it; that is what makes its amplification count.

    Attributes:
        noise_multiplier: standard deviation of the noise in units of the clipping norm of one example's gradient.
        sampling_probability: of each example, in each step.
        steps: taken.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int

    def __post_init__(self) -> None:
        super(PoissonSampledGaussianSteps, self).__post_init__()
        if self.sampling_probability > 1:
            raise UnknownEventError(f"a sampling probability of {self.sampling_probability}: no release has that")


PrivacyEvent: TypeAlias = (
    SkellamRelease | DiscreteGaussianRelease | DiscreteLaplaceRelease | PoissonSampledGaussianSteps
)

_KINDS: Final[Mapping[str, type[PrivacyEvent]]] = {
    "skellam": SkellamRelease,
    "discrete-gaussian": DiscreteGaussianRelease,
    "discrete-laplace": DiscreteLaplaceRelease,
    "poisson-sampled-gaussian": PoissonSampledGaussianSteps,
}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}


def level_of(event: PrivacyEvent) -> Level:
    """Whom the record's guarantee protects."""
    return Level.EXAMPLE if isinstance(event, PoissonSampledGaussianSteps) else Level.PARTICIPANT


def to_json(events: tuple[PrivacyEvent, ...]) -> str:
    """The events of one charge as canonical JSON; `from_json` reads it back to equal ones."""
    said = [{"kind": _NAMES[type(event)], **dataclasses.asdict(event)} for event in events]
    return json.dumps(said, sort_keys=True, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> tuple[PrivacyEvent, ...]:
    """The events of one charge.

    Raises:
        UnknownEventError: it is no such JSON, or holds a kind, a field or a number that this version does not know.
    """
    try:
        said = json.loads(text)
    except ValueError as error:
        raise UnknownEventError(f"a record of releases is no JSON: {error}") from None
    if not isinstance(said, list):
        raise UnknownEventError("a record of releases is no list")
    return tuple(_event(each) for each in said)


def _event(said: object) -> PrivacyEvent:
    kind = _KINDS.get(str(said.get("kind"))) if isinstance(said, dict) else None
    if not isinstance(said, dict) or kind is None:
        raise UnknownEventError(f"a release of an unknown kind cannot be accounted for: {str(said)[:120]}")
    given = {name: value for name, value in said.items() if name != "kind"}
    try:
        return kind(**given)
    except TypeError as error:
        raise UnknownEventError(f"a release that cannot be accounted for: {error}") from None
