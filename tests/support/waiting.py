"""Waiting for what the daemon tells, so that no test sleeps or polls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import cast

from stratabox.client import Client, SandboxEvent, SandboxRecord


@contextmanager
def watching(client: Client, *sandboxes: str) -> Iterator[Iterator[SandboxEvent]]:
    """Every event of these sandboxes, the present state first, until the context ends."""
    events = client.sandboxes.watch(sandboxes=sandboxes)
    with closing(cast("closing[Iterator[SandboxEvent]]", events)):  # type: ignore[type-var]
        # The present records come once the watch has begun: from there on nothing is missed.
        yield events


def until(
    client: Client, sandbox: str, fits: Callable[[SandboxRecord], bool]
) -> SandboxRecord:
    """The sandbox's record as soon as it fits, or at once where it does already."""
    with watching(client, sandbox) as events:
        return next(event.sandbox for event in events if fits(event.sandbox))
