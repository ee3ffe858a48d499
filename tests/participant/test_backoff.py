"""How long a site pauses before it dials again: short after a short absence of the coordinator, never long."""

import pytest

from maskwork.participant.client import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, next_backoff


@pytest.mark.parametrize("jitter", [0.5, 1.0])
def test_a_site_is_back_within_half_of_the_time_that_its_coordinator_was_away(jitter: float) -> None:
    backoff, away = FIRST_BACKOFF_S, 0.0
    while away < 60:
        # The earlier pauses came out short, this one comes out as long as it can be.
        assert backoff <= FIRST_BACKOFF_S + away / 2
        away += backoff * jitter
        backoff = next_backoff(backoff)


def test_a_coordinator_that_stays_away_is_dialled_a_dozen_times_a_minute() -> None:
    backoff = FIRST_BACKOFF_S
    for _ in range(20):
        backoff = next_backoff(backoff)
    assert backoff == next_backoff(backoff) == LONGEST_BACKOFF_S == 5.0
