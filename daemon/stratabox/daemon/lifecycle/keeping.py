"""How often snapshots are taken by themselves and how many are kept: pure decisions.

``upkeep/scheduling`` takes them, ``snapshots`` deletes those beyond `keep_last` with each new one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.records import Schedule
from stratabox.storage.model.states import Level

KEEP_LAST = range(100_001)
SHORTEST = timedelta(minutes=1)
LONGEST = timedelta(days=366)

BY_SCHEDULE = "stratabox.schedule"
"""Metadata of a snapshot that was taken by the clock: for when it was due."""


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """What a caller wants: a snapshot every so often."""

    every: timedelta
    level: Level | None = None
    """None: as for a snapshot by hand."""


def check_keep_last(keep_last: int) -> int:
    """:raise InvalidArgumentError: INVALID_ARGUMENT, when nothing can be kept so."""
    if keep_last not in KEEP_LAST:
        raise InvalidArgumentError(
            f"keep_last {keep_last} is not within {KEEP_LAST[0]}-{KEEP_LAST[-1]}", field="keep_last"
        )
    return keep_last


def check_rhythm(rhythm: Rhythm) -> None:
    """:raise InvalidArgumentError: INVALID_ARGUMENT, when it is too often, or hardly ever."""
    if not SHORTEST <= rhythm.every <= LONGEST or rhythm.every.microseconds:
        raise InvalidArgumentError(
            f"a snapshot every {rhythm.every.total_seconds():g} s cannot be: whole seconds, from"
            f" {SHORTEST.total_seconds():.0f} s to {LONGEST.days} days",
            field="snapshot_schedule.every",
        )


def begin(rhythm: Rhythm, now: datetime) -> Schedule:
    """A schedule that begins now; the first snapshot is due when the span is over."""
    return Schedule(every=rhythm.every, level=rhythm.level, next_at=now + rhythm.every)


def after(schedule: Schedule, now: datetime) -> Schedule:
    """The schedule once what was due is seen to: in step, and however many were missed are not
    made up for.
    """
    if schedule.next_at > now:
        return schedule
    missed = (now - schedule.next_at) // schedule.every
    return replace(schedule, next_at=schedule.next_at + (missed + 1) * schedule.every)
