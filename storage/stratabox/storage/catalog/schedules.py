"""The columns of a sandbox's schedule."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from stratabox.storage.catalog.database import Row, text_of
from stratabox.storage.model.records import Schedule
from stratabox.storage.model.states import Level


def columns(schedule: Schedule | None) -> dict[str, Any]:
    """What is written of it."""
    return {
        "schedule_every": schedule and schedule.every // timedelta(seconds=1),
        "schedule_level": schedule and schedule.level,
        "schedule_next_at": text_of(schedule.next_at if schedule else None),
    }


def load(row: Row) -> Schedule | None:
    """What was written of it."""
    if row["schedule_every"] is None:
        return None
    return Schedule(
        every=timedelta(seconds=row["schedule_every"]),
        level=None if row["schedule_level"] is None else Level(row["schedule_level"]),
        next_at=datetime.fromisoformat(row["schedule_next_at"]),
    )
