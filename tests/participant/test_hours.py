"""Hours of the week: windows, days, midnight and time zones; the clock is an argument."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from maskwork.participant.hours import DAYS, Hours, parse_window

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)


def hours(*windows: str, zone: str = "UTC") -> Hours:
    return Hours(time_zone=zone, windows=windows)


def at(text: str) -> float:
    """A moment of the week of `MONDAY`, in UTC: "wed 12:30"."""
    day, _, clock = text.partition(" ")
    hour, _, minute = clock.partition(":")
    return (MONDAY + timedelta(days=DAYS.index(day), hours=int(hour), minutes=int(minute))).timestamp()


@pytest.mark.parametrize(
    ("window", "moment", "is_open"),
    [
        ("mon-fri 08:00-18:00", "mon 08:00", True),
        ("mon-fri 08:00-18:00", "mon 07:59", False),
        ("mon-fri 08:00-18:00", "fri 17:59", True),
        ("mon-fri 08:00-18:00", "fri 18:00", False),
        ("mon-fri 08:00-18:00", "sat 12:00", False),
        # Over midnight: the window belongs to the day on which it begins.
        ("mon-fri 20:00-06:00", "mon 05:59", False),
        ("mon-fri 20:00-06:00", "mon 20:00", True),
        ("mon-fri 20:00-06:00", "tue 05:59", True),
        ("mon-fri 20:00-06:00", "tue 06:00", False),
        ("mon-fri 20:00-06:00", "fri 23:59", True),
        ("mon-fri 20:00-06:00", "sat 05:59", True),
        ("mon-fri 20:00-06:00", "sat 20:00", False),
        ("sun 20:00-06:00", "mon 05:59", True),
        ("sat,sun 00:00-24:00", "sun 23:59", True),
        ("sat,sun 00:00-24:00", "mon 00:00", False),
        ("mon 20:00-00:00", "mon 23:59", True),
        ("mon 20:00-00:00", "tue 00:00", False),
        ("sat-mon 10:00-11:00", "sun 10:30", True),
        ("sat-mon 10:00-11:00", "tue 10:30", False),
        ("tue,thu-fri 10:00-11:00", "thu 10:30", True),
        ("tue,thu-fri 10:00-11:00", "wed 10:30", False),
    ],
)
def test_a_window_is_open_from_its_start_to_before_its_end(window: str, moment: str, is_open: bool) -> None:
    assert hours(window).open_at(at(moment)) is is_open


def test_one_open_window_suffices() -> None:
    either = hours("mon 08:00-09:00", "tue 08:00-09:00")
    assert [either.open_at(at(f"{day} 08:30")) for day in ("mon", "tue", "wed")] == [True, True, False]


def test_windows_are_wall_clock_time_in_the_stated_zone() -> None:
    evening = hours("mon 20:00-21:00", zone="Europe/Berlin")
    assert [evening.open_at(at(f"mon {hour}:30")) for hour in (18, 19, 20)] == [False, True, False]
    # In summer 20:00 there is 18:00 in UTC.
    assert evening.open_at(datetime(2026, 7, 6, 18, 30, tzinfo=UTC).timestamp())
    # The day is the zone's too: Sunday 23:30 in UTC is Monday in Berlin.
    assert hours("mon 00:00-01:00", zone="Europe/Berlin").open_at(MONDAY.timestamp() - 1800)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mon",
        "mon 8:00-18:00",
        "mon 08:00-25:00",
        "mon 08:60-18:00",
        "mon 08:00-24:30",
        "mon 08:00-08:00",
        "mon 24:00-06:00",
        "mon- 08:00-18:00",
        "fun 08:00-18:00",
        "mon,  08:00-18:00",
        "Mon 08:00-18:00",
        "mon 08:00-18:00 ",
        "mon ٠٨:00-18:00",
    ],
)
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no window|no time"):
        parse_window(text)
    with pytest.raises(ValidationError):
        hours(text)


@pytest.mark.parametrize("zone", ["", "Europe", "../../etc/passwd", "Europe/Nowhere", "a\0b", "/etc/localtime"])
def test_what_is_no_time_zone_is_refused(zone: str) -> None:
    with pytest.raises(ValidationError, match="no time zone"):
        hours("mon 08:00-18:00", zone=zone)
