"""Schedules are exact to the second, over changes of the clock, too."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from autoscale.schedule import check_cron, is_active

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, *, fold: int = 0, zone: ZoneInfo = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone, fold=fold).timestamp()


def active(start: str, end: str, now_s: float) -> bool:
    return is_active(start, end, "Europe/Berlin", now_s)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ("2026-06-01 07:59:59", False),  # a Monday
        ("2026-06-01 08:00:00", True),
        ("2026-06-01 17:59:59", True),
        ("2026-06-01 18:00:00", False),
        ("2026-06-06 12:00:00", False),  # a Saturday
    ],
)
def test_office_hours_start_and_end_on_the_second(when: str, expected: bool) -> None:
    assert active("0 8 * * 1-5", "0 18 * * 1-5", at(when)) is expected


def test_a_night_goes_over_midnight() -> None:
    night = ("0 22 * * *", "0 6 * * *")
    assert active(*night, at("2026-06-01 23:00"))
    assert active(*night, at("2026-06-02 05:59:59"))
    assert not active(*night, at("2026-06-02 06:00"))


@pytest.mark.parametrize("date", ["2026-03-28", "2026-03-30", "2026-10-24", "2026-10-26"])
def test_hours_follow_the_wall_clock_before_and_after_a_change(date: str) -> None:
    assert not active("0 8 * * *", "0 18 * * *", at(f"{date} 07:59:59"))
    assert active("0 8 * * *", "0 18 * * *", at(f"{date} 08:00"))


def test_a_left_out_wall_time_means_the_change() -> None:
    """On 2026-03-29 the clock goes from 02:00 to 03:00."""
    change_s = at("2026-03-29 03:00")
    assert not active("30 2 * * *", "0 9 * * *", change_s - 1)
    assert active("30 2 * * *", "0 9 * * *", change_s)


def test_a_schedule_that_is_left_out_as_a_whole_is_not_active_until_the_next_day() -> None:
    change_s = at("2026-03-29 03:00")
    for minutes in range(-10, 120):
        assert not active("15 2 * * *", "45 2 * * *", change_s + 60 * minutes)
    assert active("15 2 * * *", "45 2 * * *", at("2026-03-30 02:30"))


def test_a_wall_time_that_occurs_twice_means_the_first() -> None:
    """On 2026-10-25 the clock goes from 03:00 to 02:00."""
    first, second = at("2026-10-25 02:30"), at("2026-10-25 02:30", fold=1)
    assert second - first == 3600
    assert not active("30 2 * * *", "0 9 * * *", first - 1)
    for seconds in range(0, 3 * 3600, 300):
        assert active("30 2 * * *", "0 9 * * *", first + seconds)
    # It is not active again at the second 02:30 once it has ended.
    assert active("30 2 * * *", "45 2 * * *", first)
    assert not active("30 2 * * *", "45 2 * * *", second)


def test_hours_of_two_years_have_the_answer_of_its_wall_clock() -> None:
    start_s = int(at("2026-01-01 00:30"))
    for now_s in range(start_s, start_s + 2 * 366 * 86400, 61 * 3600):
        wall = datetime.fromtimestamp(now_s, BERLIN)
        assert active("0 8 * * 1-5", "0 18 * * 1-5", now_s) is (
            wall.weekday() < 5 and 8 <= wall.hour < 18
        )


@pytest.mark.parametrize(
    "expression",
    ["", "8 * * *", "0 0 8 * * 1-5", "61 * * * *", "R * * * *", "@daily", "0 0 31 2 *"],
)
def test_other_expressions_are_refused(expression: str) -> None:
    with pytest.raises(ValueError, match=r"cron expression|never fires"):
        check_cron(expression)


@pytest.mark.parametrize("expression", ["*/5 8-18 * * MON-FRI", "0 0 29 2 *", "0 0 1,15 * *"])
def test_usual_expressions_are_accepted(expression: str) -> None:
    assert check_cron(expression) == expression
