"""The hours of the week in which a site lets sessions begin: windows of wall-clock time in a stated time zone.

Pure: `now` is an argument. It does not end anything: a session that has begun goes on, whatever the hour
(docs/policy.md says why).

Rules
1. A window is [start, end): at its end it is over.
2. A window whose end comes before its start goes over midnight, and belongs to the day on which it begins.
3. Wall-clock time: when clocks are put forward a window loses that hour, when they are put back it gains one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Annotated, Final
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field

from maskwork.settings import Section

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY: Final = f"(?:{'|'.join(DAYS)})"
_WINDOW: Final = re.compile(
    rf"(?P<days>{_DAY}(?:-{_DAY})?(?:,{_DAY}(?:-{_DAY})?)*) "
    r"(?P<from_h>\d\d):(?P<from_m>\d\d)-(?P<to_h>\d\d):(?P<to_m>\d\d)",
    re.ASCII,
)
_FULL_DAY: Final = 24 * 60


@dataclass(frozen=True, slots=True)
class Window:
    """One window: the days on which it begins, 0 being Monday, and minutes after midnight."""

    days: frozenset[int]
    start: int
    end: int

    def holds(self, day: int, minute: int) -> bool:
        """Whether a minute of a day of the week is within it."""
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


def parse_window(text: str) -> Window:
    """A window as it is written, "mon-fri 20:00-06:00".

    Raises:
        ValueError: it is not one; the text says what one looks like.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(f'{text[:80]!r} is no window: write "mon-fri 20:00-06:00" or "sat,sun 00:00-24:00"')
    start = _minutes(text, found["from_h"], found["from_m"])
    end = _minutes(text, found["to_h"], found["to_m"])
    if start in (end, _FULL_DAY):
        raise ValueError(f'{text!r} holds no time: write "00:00-24:00" for a whole day')
    return Window(frozenset(day for part in found["days"].split(",") for day in _days(part)), start, end)


def _minutes(text: str, hours: str, minutes: str) -> int:
    total = 60 * int(hours) + int(minutes)
    if int(minutes) > 59 or total > _FULL_DAY:
        raise ValueError(f"{text!r}: {hours}:{minutes} is no time of day")
    return total


def _days(part: str) -> tuple[int, ...]:
    first, _, last = part.partition("-")
    begin, end = DAYS.index(first), DAYS.index(last or first)
    return tuple((begin + step) % 7 for step in range((end - begin) % 7 + 1))


def zone_of(name: str) -> tzinfo:
    """A time zone by its name.

    Raises:
        ValueError: this machine knows none of that name.
    """
    if name == "UTC":  # known even where no time-zone database is installed
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(
            f'no time zone {name[:80]!r} is known on this machine: write one as "Europe/Berlin" or "UTC"; if it is '
            "right, the system's time-zone database (tzdata) is missing"
        ) from None


def _checked_zone(name: str) -> str:
    zone_of(name)
    return name


def _checked_window(text: str) -> str:
    parse_window(text)
    return text


class Hours(Section):
    """When a session may begin at this site; without this table, at any hour.

    Attributes:
        time_zone: name in the IANA database, as "Europe/Berlin", or "UTC"; the windows are wall-clock time there.
        windows: each "DAYS HH:MM-HH:MM", as "mon-fri 20:00-06:00" or "sat,sun 00:00-24:00". One whose end comes before
            its start goes over midnight, and belongs to the day on which it begins.
    """

    time_zone: Annotated[str, AfterValidator(_checked_zone)]
    windows: Annotated[tuple[Annotated[str, AfterValidator(_checked_window)], ...], Field(min_length=1)]

    def open_at(self, now: float) -> bool:
        """Whether a session may begin at `now`, in seconds since the epoch."""
        local = self.local(now)
        minute = 60 * local.hour + local.minute
        return any(parse_window(text).holds(local.weekday(), minute) for text in self.windows)

    def local(self, now: float) -> datetime:
        """`now` as the site's wall clock shows it."""
        return datetime.fromtimestamp(now, zone_of(self.time_zone))

    def __str__(self) -> str:
        """The windows and their time zone, for people."""
        return f"{', '.join(self.windows)} {self.time_zone}"
