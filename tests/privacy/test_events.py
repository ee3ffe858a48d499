"""Records of releases: read back equal, and refused where anything about them is unknown."""

from __future__ import annotations

import json
import math

import pytest

from maskwork.privacy.events import (
    DiscreteGaussianRelease,
    DiscreteLaplaceRelease,
    Level,
    PoissonSampledGaussianSteps,
    PrivacyEvent,
    SkellamRelease,
    UnknownEventError,
    from_json,
    level_of,
    to_json,
)

EVENTS: tuple[PrivacyEvent, ...] = (
    SkellamRelease(l1=100.0, l2=10.0, variance=250.0, total_variation=2.0**-70),
    DiscreteGaussianRelease(l1=100.0, l2=10.0, dimension=128, variance=30.5, parties=4),
    DiscreteLaplaceRelease(l1=12.0, scale=30.0),
    PoissonSampledGaussianSteps(noise_multiplier=1.1, sampling_probability=0.01, steps=100),
)


def test_records_are_read_back_equal() -> None:
    assert from_json(to_json(EVENTS)) == EVENTS
    assert from_json(to_json(())) == ()


def test_each_record_is_of_one_level() -> None:
    assert [level_of(event) for event in EVENTS] == [Level.PARTICIPANT] * 3 + [Level.EXAMPLE]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_unknown_kind_or_field_is_refused(event: PrivacyEvent) -> None:
    (said,) = json.loads(to_json((event,)))
    for changed in ({**said, "kind": "gaussian"}, {**said, "amplified": 0.1}, {"kind": said["kind"]}, [said], "x"):
        with pytest.raises(UnknownEventError):
            from_json(json.dumps([changed]))


@pytest.mark.parametrize("text", ["", "{}", "null", '[{"kind": null}]', "[1]"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(UnknownEventError):
        from_json(text)


@pytest.mark.parametrize("number", [0.0, -1.0, math.nan, math.inf, True, "1"])
def test_a_number_that_no_release_has_is_refused(number: float) -> None:
    with pytest.raises(UnknownEventError, match="variance"):
        SkellamRelease(l1=1.0, l2=1.0, variance=number)
    with pytest.raises(UnknownEventError, match="noise_multiplier"):
        PoissonSampledGaussianSteps(noise_multiplier=number, sampling_probability=0.5, steps=1)


def test_counts_are_whole_numbers_and_a_probability_is_one_at_most() -> None:
    with pytest.raises(UnknownEventError, match="parties"):
        DiscreteGaussianRelease(l1=1.0, l2=1.0, dimension=1, variance=1.0, parties=1.5)  # type: ignore[arg-type]
    with pytest.raises(UnknownEventError, match="probability"):
        PoissonSampledGaussianSteps(noise_multiplier=1.0, sampling_probability=1.01, steps=1)
