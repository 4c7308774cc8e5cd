"""The records of what happens."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from stratabox.client.records import EventType


class Subject(StrEnum):
    """What kind of thing something happened to."""

    SANDBOX = "sandbox"
    SNAPSHOT = "snapshot"
    VOLUME = "volume"
    IMAGE = "image"
    JOB = "job"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Happened:
    """A thing is new, is gone, or has another name, state, readiness or reason than before."""

    time: datetime
    subject: Subject
    id: str
    #: A job has none: its kind.
    name: str
    type: EventType
    #: As in its own record: "running".
    state: str
    #: Of a sandbox.
    ready: bool
    #: Why it is in that state, where something says so.
    reason: str | None
    #: Of the call that has brought it about; None: nobody's.
    request_id: str | None
