"""Those of one sandbox's ports that listen in its guest, kept so.

What listens there is gone with the guest's channel: after a reboot, a restore, the end of its sshd
or a new start of the daemon the guest is asked again, once it is ready. Where that fails the port
says why, and it is tried again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import asyncssh

from stratabox.daemon.lifecycle.inside.guest_listening import GuestListening
from stratabox.storage.model.errors import StrataboxError
from stratabox.storage.model.ids import PortId, SandboxId
from stratabox.storage.model.ports import Port

log = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Until a guest that is ready and could not be asked is asked again."""

Connect = Callable[[], Awaitable[asyncssh.SSHClientConnection]]


class GuestSide:
    """The ports of one sandbox that listen in its guest. Closed by `close`."""

    def __init__(self, sandbox: SandboxId, connect: Connect, is_ready: Callable[[], bool]) -> None:
        self._sandbox = sandbox
        self._connect = connect
        self._is_ready = is_ready
        self._ports: dict[PortId, Port] = {}
        self._listening: dict[PortId, GuestListening] = {}
        self._problems: dict[PortId, str] = {}
        self._lock = asyncio.Lock()
        self._poked = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None

    @property
    def is_empty(self) -> bool:
        """It has no ports."""
        return not self._ports

    def listens(self, port: PortId) -> GuestListening | None:
        """What listens for a port now."""
        listening = self._listening.get(port)
        connection = listening.connection if listening else None
        return listening if connection is not None and not connection.is_closed() else None

    def problem(self, port: PortId) -> str:
        """Why a port does not listen, though the guest is ready."""
        return "" if self.listens(port) else self._problems.get(port, "")

    def take(self, port: Port) -> None:
        """Take in a port of an earlier daemon; it listens as soon as the guest is ready."""
        self._ports[port.id] = port
        self.poke()

    async def add(self, port: Port) -> None:
        """Take in a new port; it listens when this returns, if the guest is ready.

        If this raises, it is not taken in.

        :raise StrataboxError: when the guest cannot listen there, or cannot be reached.
        """
        async with self._lock:
            if self._is_ready():
                listening = GuestListening(port)
                await listening.open(await self._connect(), first=True)
                self._listening[port.id] = listening
            self._ports[port.id] = port
        self.poke()

    async def remove(self, port: PortId) -> None:
        """Stop listening for one."""
        async with self._lock:
            self._ports.pop(port, None)
            self._problems.pop(port, None)
            if listening := self._listening.pop(port, None):
                await listening.close()

    def poke(self) -> None:
        """Look again soon: something may have changed."""
        self._poked.set()
        if self._keeping is None and self._ports:
            self._keeping = asyncio.create_task(self._keep(), name=f"ports {self._sandbox}")

    async def close(self) -> None:
        """Let go of all of them. The guest's channel is over, or about to be."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
            self._keeping = None
        async with self._lock:
            for listening in self._listening.values():
                await listening.close(tell=False)
            self._listening.clear()
            self._ports.clear()

    async def _keep(self) -> None:
        while True:
            self._poked.clear()
            async with self._lock:
                connection = await self._settle()
            poked = asyncio.ensure_future(self._poked.wait())
            waiting: set[asyncio.Future[Any]] = {poked}
            if connection is not None:
                waiting.add(asyncio.ensure_future(connection.wait_closed()))
            # A guest that is not ready is no reason to ask again: one that becomes ready pokes.
            failed = connection is None and self._is_ready()
            try:
                await asyncio.wait(
                    waiting,
                    timeout=RETRY_SECONDS if failed else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                for each in waiting:
                    each.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    async def _settle(self) -> asyncssh.SSHClientConnection | None:
        """Have every port listen by the connection of now; None when that could not be all."""
        for gone in [each for each in self._listening if not self.listens(each)]:
            await self._listening.pop(gone).close()
        if not self._ports or not self._is_ready():
            return None
        try:
            connection = await self._connect()
        except StrataboxError as error:
            self._problems = dict.fromkeys(self._ports, error.message)
            log.warning("ports of sandbox %s do not listen: %s", self._sandbox, error.message)
            return None
        complete = True
        for id, port in self._ports.items():
            old = self._listening.get(id)
            if old is not None and old.connection is connection:
                continue
            if old is not None:
                await self._listening.pop(id).close()
            listening = GuestListening(port)
            try:
                await listening.open(connection, first=False)
            except StrataboxError as error:
                self._problems[id] = error.message
                log.warning("port %s does not listen: %s", id, error.message)
                complete = False
            else:
                self._listening[id] = listening
                self._problems.pop(id, None)
        return connection if complete else None
