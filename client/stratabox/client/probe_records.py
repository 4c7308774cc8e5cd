"""What makes a sandbox ready."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, kw_only=True)
class ReadinessProbe:
    """What must pass, once the guest's agent has answered, before a sandbox counts as ready.

    One of `command`, and `port` with or without `path`. None of them: nothing must, whatever a
    snapshot or a sandbox had.
    """

    #: A line for the guest's shell, or a program and its arguments: must exit with 0.
    command: str | tuple[str, ...] | None = None
    #: A TCP port in the guest that something must listen on.
    port: int | None = None
    #: What a server on that port is asked for by GET; its status must be 200 to 399.
    path: str | None = None
    #: From one try to the next.
    interval: timedelta = timedelta(seconds=1)
    #: What one try may take.
    timeout: timedelta = timedelta(seconds=10)
    #: How long it may go on failing until whoever waits is told; None: as long as they wait.
    start_period: timedelta | None = None
