"""Doing a thing once: idempotency keys, and work that several callers wait for.

A piece of work runs in a task of its own. Callers wait for it; who gives up ends only the
waiting, unless the work is one that nobody else wants then (a create, restore or clone), which is
cancelled when its last caller has gone, and undoes itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from stratabox.daemon.lifecycle.common.threads import Tasks
from stratabox.storage.catalog import idempotency
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE, acting

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Key:
    """A caller's idempotency key, and what it was used for."""

    key: str
    method: str
    request: str
    """SHA-256 of the request without its key."""
    workspace: str = field(default_factory=lambda: acting.get() or DEFAULT_WORKSPACE)
    """Whose key it is."""

    def recall(self, tx: Transaction) -> dict[str, str] | None:
        """What it made before. :raise InvalidArgumentError: IDEMPOTENCY_MISMATCH."""
        return idempotency.recall(tx, self.key, self.method, self.request)

    def remember(self, tx: Transaction, **outcome: str) -> None:
        """Bind it to what is being made."""
        idempotency.remember(tx, self.key, self.method, self.request, outcome)


@dataclass
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    key: Key | None
    waiters: int = 0
    abandoned: bool = False
    """Its last caller has gone, and it is undoing itself."""


class Flights:
    """Work under way, by idempotency key."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._flights: dict[tuple[str, str], _Flight[Any]] = {}

    async def join(
        self,
        key: Key | None,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        name: str,
        outlives_callers: bool,
    ) -> T:
        """Do the work, or join the same key's work under way; returns its result.

        Work that is undoing itself is waited for and not joined: it has no result to give.

        :raise InvalidArgumentError: IDEMPOTENCY_MISMATCH.
        """
        name_of_it = (key.workspace, key.key) if key else None
        flight = self._flights.get(name_of_it) if name_of_it else None
        while flight is not None and flight.abandoned:
            await asyncio.wait({flight.task})
            flight = self._flights.get(name_of_it) if name_of_it else None
        if flight is None:
            flight = _Flight(self._tasks.spawn(work(), name), key)
            if name_of_it:
                self._flights[name_of_it] = flight
                flight.task.add_done_callback(lambda _: self._flights.pop(name_of_it, None))
        elif flight.key != key:
            assert key is not None
            raise InvalidArgumentError(
                f"idempotency key {key.key!r} is being used for another request",
                reason="IDEMPOTENCY_MISMATCH",
                idempotency_key=key.key,
            )
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not outlives_callers and not flight.task.done():
                flight.abandoned = True
                flight.task.cancel()
                await asyncio.wait({flight.task})
