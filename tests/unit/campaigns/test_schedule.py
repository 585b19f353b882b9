from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sdpipeline.campaigns import schedule

BERLIN = "Europe/Berlin"


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def nights(cron: str, timezone: str, start: str, days: int) -> list[str]:
    """Local times of all runs."""
    after = utc(start)
    found = schedule.firings(cron, timezone, after=after, until=after + timedelta(days=days))
    return [at.strftime("%m-%d %H:%M") for at in found]


def test_a_night_whose_hour_is_skipped_by_the_clock_is_not_skipped() -> None:
    # In Berlin 02:00-03:00 does not exist on 2027-03-28.
    assert nights("30 2 * * *", BERLIN, "2027-03-26T12:00", 3) == ["03-27 02:30", "03-28 03:00", "03-29 02:30"]


def test_a_night_whose_hour_comes_twice_is_made_once() -> None:
    # In Berlin 02:00-03:00 occurs twice on 2027-10-31.
    assert nights("30 2 * * *", BERLIN, "2027-10-29T12:00", 3) == ["10-30 02:30", "10-31 02:30", "11-01 02:30"]


@pytest.mark.parametrize("zone", [BERLIN, "America/New_York", "Australia/Lord_Howe", "UTC", "Africa/Casablanca"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 3 * * *", "15 1 * * *", "0 0 * * *"])
def test_every_date_of_a_year_has_one_edition_in_every_zone(cron: str, zone: str) -> None:
    after = utc("2027-01-01T12:00")
    fired = schedule.firings(cron, zone, after=after, until=after + timedelta(days=365))
    editions = [schedule.edition(cron, zone, at) for at in fired]
    assert len(editions) == len(set(editions)) == 365
    assert editions == sorted(editions)


def test_an_edition_is_the_local_date_of_the_latest_firing() -> None:
    assert schedule.edition("0 3 * * *", BERLIN, utc("2026-11-25T01:59")) == "2026-11-24"
    assert schedule.edition("0 3 * * *", BERLIN, utc("2026-11-25T02:00")) == "2026-11-25"
    # 00:30 on the 25th in Tokyo is 15:30 on the 24th in UTC; the edition is the local date.
    assert schedule.edition("30 0 * * *", "Asia/Tokyo", utc("2026-11-24T16:00")) == "2026-11-25"


def test_editions_of_one_day_are_told_apart_by_their_time() -> None:
    assert schedule.edition("0 3,15 * * *", "UTC", utc("2026-11-25T16:00")) == "2026-11-25t1500"
    assert schedule.edition("0 3,15 * * *", "UTC", utc("2026-11-25T04:00")) == "2026-11-25t0300"


def test_a_yearly_schedule_finds_its_last_firing() -> None:
    assert schedule.edition("0 3 1 2 *", "UTC", utc("2026-11-25T16:00")) == "2026-02-01"


@pytest.mark.parametrize("cron", ["", "0 3 * *", "0 3 * * * *", "61 3 * * *", "nightly", "0 3 * * *" + " " * 300])
def test_what_is_no_cron_expression_is_refused(cron: str) -> None:
    with pytest.raises(schedule.WrongScheduleError, match=r"five fields|not a cron expression"):
        schedule.check_cron(cron)


def test_the_next_firings_are_told_in_the_schedules_own_time() -> None:
    found = schedule.upcoming("0 3 * * *", BERLIN, utc("2026-11-25T12:00"), 2)
    assert [at.isoformat() for at in found] == ["2026-11-26T03:00:00+01:00", "2026-11-27T03:00:00+01:00"]
