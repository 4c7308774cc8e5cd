"""Records of commands that run as streams, and of processes that are left behind in guests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum


class ProcessSignal(Enum):
    """A signal that can be sent to a process."""

    TERM = "TERM"
    KILL = "KILL"
    INT = "INT"
    HUP = "HUP"
    USR1 = "USR1"
    USR2 = "USR2"


@dataclass(frozen=True, kw_only=True)
class Terminal:
    """A terminal for a command."""

    term: str = "xterm-256color"
    columns: int = 80
    rows: int = 24


@dataclass(frozen=True)
class Printed:
    """What a command has printed, a piece of it.

    `stream` is "stdout" or "stderr", or "gap": then `lost` bytes of a detached process's output are
    kept no more. `offset` is where to go on in a detached process's output.
    """

    stream: str
    data: bytes
    offset: int = 0
    lost: int = 0


@dataclass(frozen=True, kw_only=True)
class ProcessEnd:
    """How a command ended.

    Exactly one of `exit_code` and `signal` is set, unless it was killed by its time-out.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool
    out_of_memory: bool
    """Meanwhile the guest had no memory left, and its kernel killed something."""
    disk_full: bool
    """It failed, and a disk of the guest is full."""
    duration: timedelta
    """In the guest's own time."""

    @property
    def ok(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.exit_code == 0 and not self.timed_out


@dataclass(frozen=True, kw_only=True)
class ProcessRecord:
    """A detached process in a guest, as it was when the daemon answered."""

    id: str
    started_in: str
    """Id of the sandbox that it was started in."""
    inherited: bool
    """It was started in another sandbox, which this one's memory is a copy of."""
    argv: tuple[bytes, ...]
    """The command, shortened."""
    user: str
    pid: int
    started_at: datetime
    """By the guest's clock."""
    printed_bytes: int
    kept_from: int
    """The oldest offset whose output is still there."""
    end: ProcessEnd | None
    """None while it runs."""
