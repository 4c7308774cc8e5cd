"""Requests of previews that are under way: each a connection to a port of a guest.

Called by the HTTP door (``daemon.previews``) for each request, and by the use cases of previews
when one leads there no more: then its requests end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from stratabox.daemon.lifecycle.inside.carrying import Far, reach
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import previews, sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import NoSpaceError
from stratabox.storage.model.ids import PreviewId, SandboxId
from stratabox.storage.model.ports import Endpoint
from stratabox.storage.model.previews import Preview
from stratabox.storage.model.states import SandboxState

MOST = 256
"""Requests of all previews under way at once."""
MOST_OF_ONE = 64
TOKEN = 26
"""Characters of a token: base 32, 130 bits."""

_ACCESS_NOTED_EVERY = timedelta(minutes=5)
_LOOPBACK = "127.0.0.1"


@dataclass
class _Open:
    """The requests of one preview that are under way."""

    sandbox: SandboxId
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


class Visits:
    """Leads requests to guests, and ends them."""

    def __init__(self, world: World, guests: Guests) -> None:
        self._world = world
        self._guests = guests
        self._open: dict[PreviewId, _Open] = {}
        world.when_over.append(self._close_of)

    def token_in(self, host: str) -> str | None:
        """The token that a request's Host names; None: it is no preview's."""
        name = host.lower().rsplit(":", 1)[0] if not host.endswith("]") else ""
        label, _, domain = name.partition(".")
        if domain != self._world.config.previews_domain or len(label) < TOKEN:
            return None
        return label[-TOKEN:]

    @asynccontextmanager
    async def open(self, token: str) -> AsyncIterator[Far]:
        """A connection to what a preview leads to, for one request; closed with the context.

        Whoever ends the preview cancels the task that holds this.

        :raise NotFoundError: PREVIEW_NOT_FOUND: there is none, or its time is up, or its sandbox
            does not run just now: not told apart.
        :raise NoSpaceError: TOO_MANY_CONNECTIONS.
        :raise FailedError: CONNECTION_REFUSED, CHANNEL_FAILED.
        :raise DeniedError: NO_CHANNEL.
        :raise UnavailableError: CONNECTION_LOST, CHANNEL_UNAVAILABLE, AGENT_UNAVAILABLE.
        """

        def look(tx: Transaction) -> tuple[Preview, SandboxId, int]:
            found = previews.find_token(tx, token)
            if found is None or found.is_over(tx.now) or found.sandbox is None or not found.port:
                raise previews.missing("")
            if sandboxes.get(tx, found.sandbox).state is not SandboxState.RUNNING:
                raise previews.missing("")
            if found.accessed_at is None or tx.now - found.accessed_at > _ACCESS_NOTED_EVERY:
                previews.note_access(tx, found.id)
            return found, found.sandbox, found.port

        preview, sandbox, port = await self._world.write(look)
        until = None
        if preview.expires_at is not None:
            left = (preview.expires_at - datetime.now(UTC)).total_seconds()
            until = asyncio.get_running_loop().time() + left
        try:
            async with asyncio.timeout_at(until) as limit:
                with self._one_more(preview.id, sandbox):
                    connection = await self._guests.of(sandbox).connection()
                    target = Endpoint(address=_LOOPBACK, port=port)
                    async with await reach(connection, target) as far:
                        yield far
        except TimeoutError:
            if limit.expired():
                raise previews.missing("") from None
            raise

    @contextmanager
    def _one_more(self, preview: PreviewId, sandbox: SandboxId) -> Iterator[None]:
        """Have a place for one request, which is this task.

        :raise NoSpaceError: TOO_MANY_CONNECTIONS.
        """
        task = asyncio.current_task()
        assert task is not None
        open_now = sum(len(each.tasks) for each in self._open.values())
        mine = self._open.setdefault(preview, _Open(sandbox))
        if open_now >= MOST or len(mine.tasks) >= MOST_OF_ONE:
            raise NoSpaceError(
                "too many requests of previews are under way: end some",
                reason="TOO_MANY_CONNECTIONS",
            )
        mine.tasks.add(task)
        mine.sandbox = sandbox
        try:
            yield
        finally:
            mine.tasks.discard(task)
            if not mine.tasks and self._open.get(preview) is mine:
                del self._open[preview]

    async def close(self, preview: PreviewId) -> None:
        """End the requests of one that leads there no more."""
        if found := self._open.get(preview):
            tasks = set(found.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _close_of(self, sandbox: SandboxId) -> None:
        """End the requests to a sandbox that is over. Nothing leads to it already."""
        for preview in [key for key, each in self._open.items() if each.sandbox == sandbox]:
            await self.close(preview)
