"""When schedules are active: cron expressions on the wall clock of a time zone. Pure.

A schedule is active from each firing of ``start`` until the next firing of ``end``, which is no
longer part of it. Cron expressions are evaluated on the wall clock, without a time zone, and each
wall time is then converted to an instant. So the rules at a change of the clock are these:

- A wall time that occurs twice (the clock is set back) means its first occurrence.
- A wall time that is left out (the clock is set forward) means the instant of the change.
"""

from __future__ import annotations

import bisect
import functools
import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from croniter import croniter

# Numbers, lists, ranges, steps and English names. croniter also knows random and hashed fields,
# which would not be the same for everyone who reads the file.
_FIELD = re.compile(r"(?:[\d*,/-]|[A-Z]{3})+", re.IGNORECASE)
_MINUTE_S = 60  # the resolution of cron


def check_cron(expression: str) -> str:
    """Return the expression if it has five fields and fires at all.

    Raises:
        ValueError: it does not; the message says what to write.
    """
    fields = expression.split()
    if len(fields) != 5 or not all(_FIELD.fullmatch(field) for field in fields):
        raise ValueError(
            f"{expression!r} is no cron expression; write five fields (minute, hour, day of the "
            'month, month, day of the week) such as "0 8 * * 1-5"'
        )
    try:
        _previous(expression, datetime(2024, 3, 1, tzinfo=UTC))
    except ValueError as error:
        raise ValueError(f"{expression!r} never fires: {error}") from None
    return expression


def is_active(start: str, end: str, time_zone: str, now_s: float) -> bool:
    """Return whether the latest firing of ``start`` is later than the latest of ``end``."""
    # No time zone in use changes its clock within a minute.
    minute = int(now_s // _MINUTE_S)
    return last_firing_s(start, time_zone, minute) > last_firing_s(end, time_zone, minute)


@functools.lru_cache(maxsize=1024)  # the autoscaler asks once a second
def last_firing_s(expression: str, time_zone: str, minute: int) -> int:
    """Return the latest instant at which ``expression`` fired.

    Args:
        expression: one that ``check_cron`` accepts.
        minute: the time to look back from, in minutes since the epoch.

    Returns:
        Seconds since the epoch, at most ``60 * minute``.
    """
    zone = ZoneInfo(time_zone)
    now_s = minute * _MINUTE_S
    # After the clock was set back, the latest firing may be later on the wall clock than now.
    latest = max(_wall(zone, now_s), _wall(zone, now_s - 86400) + timedelta(days=1))
    wall = latest + timedelta(minutes=1)
    while True:
        wall = _previous(expression, wall)
        fired_s = _instant_s(zone, wall)
        if fired_s <= now_s:
            return fired_s


def _previous(expression: str, wall: datetime) -> datetime:
    """Return the latest wall time before ``wall`` at which ``expression`` fires."""
    # In UTC no wall time is left out or occurs twice, so croniter has no change of the clock to
    # deal with.
    previous: datetime = croniter(expression, wall, ret_type=datetime).get_prev()
    return previous


def _wall(zone: ZoneInfo, instant_s: float) -> datetime:
    """Return what clocks in ``zone`` show, as if it were a time in UTC."""
    return datetime.fromtimestamp(instant_s, zone).replace(tzinfo=UTC)


def _instant_s(zone: ZoneInfo, wall: datetime) -> int:
    """Return when clocks in ``zone`` first show ``wall``, in seconds since the epoch."""
    before, after = (int(wall.replace(tzinfo=zone, fold=fold).timestamp()) for fold in (0, 1))
    if before <= after:  # equal, except if the wall time occurs twice
        return before
    # The wall time is left out. PEP 495: fold 0 counts with the offset before the change, which
    # gives an instant after it, and fold 1 the other way round. The change is between the two.
    changed = datetime.fromtimestamp(before, zone).utcoffset()
    return bisect.bisect_left(
        range(before),
        True,
        lo=after,
        key=lambda instant_s: datetime.fromtimestamp(instant_s, zone).utcoffset() == changed,
    )
