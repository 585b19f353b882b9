"""Cron schedules of campaigns, and the edition that each firing makes."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

LOOK_BACK_DAYS = (1, 8, 40, 400)
"""How far to look back for the latest firing, in widening steps: from every minute to once a year."""

MAX_CHARACTERS = 200


class WrongScheduleError(ValueError):
    """The text is not a cron expression."""


def check_cron(cron: str) -> None:
    """Raise WrongScheduleError unless the text is a cron expression of five fields."""
    try:
        if len(cron) > MAX_CHARACTERS or len(cron.split()) != 5:
            raise WrongScheduleError("is not five fields: minute, hour, day of month, month, day of week")
        CronSim(cron, datetime.now(UTC))
    except CronSimError as error:
        raise WrongScheduleError(f"is not a cron expression: {error}") from error


def timezones() -> set[str]:
    """Return the names of all time zones."""
    return available_timezones()


def firings(cron: str, timezone: str, *, after: datetime, until: datetime) -> Iterator[datetime]:
    """Yield every firing later than ``after`` and not later than ``until``, in the schedule's own time zone.

    When clocks go forward, a time that does not exist fires right after the gap. When they go back, a time that exists
    twice fires once. (Expressions with ``*`` for the hour follow elapsed time, as Debian's cron does:
    https://github.com/cuu508/cronsim.)
    """
    for at in CronSim(cron, after.astimezone(ZoneInfo(timezone))):
        if at.astimezone(UTC) > until.astimezone(UTC):
            return
        yield at


def latest(cron: str, timezone: str, now: datetime) -> datetime | None:
    """Return the last firing up to ``now``, or None if there was none for over a year."""
    for days in LOOK_BACK_DAYS:
        found = list(firings(cron, timezone, after=now - timedelta(days=days), until=now))
        if found:
            return found[-1]
    return None


def upcoming(cron: str, timezone: str, now: datetime, count: int) -> list[datetime]:
    """Return the next ``count`` firings within a year."""
    after = firings(cron, timezone, after=now, until=now + timedelta(days=366))
    return [at for at, _ in zip(after, range(count), strict=False)]


def edition(cron: str, timezone: str, now: datetime) -> str:
    """Return the name of the edition due at ``now``: the local date of the latest firing.

    The time is added if that date has several firings. Before the first firing, the name is today's date.
    """
    at = latest(cron, timezone, now)
    if at is None:
        return now.astimezone(ZoneInfo(timezone)).date().isoformat()
    midnight = at.replace(hour=0, minute=0, second=0, microsecond=0)
    that_day = firings(cron, timezone, after=midnight - timedelta(seconds=1), until=midnight + timedelta(hours=25))
    several = sum(each.date() == at.date() for each in that_day) > 1
    return at.date().isoformat() + (f"t{at:%H%M}" if several else "")
