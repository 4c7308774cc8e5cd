"""Waiting for what the daemon tells, so that no test sleeps or polls; and not for what hangs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from stratabox.client import Client, SandboxEvent, SandboxRecord


@contextmanager
def watching(client: Client, *sandboxes: str) -> Iterator[Iterator[SandboxEvent]]:
    """Every event of these sandboxes (none: of all), the present ones first.

    Once a present one has come, the watch has begun and misses nothing.
    """
    events = client.sandboxes.watch(sandboxes=sandboxes)
    assert isinstance(events, Generator)
    try:
        yield events
    finally:
        events.close()


def until(client: Client, sandbox: str, fits: Callable[[SandboxRecord], bool]) -> SandboxRecord:
    """The sandbox's record as soon as it fits; at once where it does already."""
    with watching(client, sandbox) as events:
        return next(event.sandbox for event in events if fits(event.sandbox))


@contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone at the end, also of a test that fails: Popen itself would wait."""
    with process:
        try:
            yield process
        finally:
            process.kill()
