"""A domain's monitor: a QMP connection that comes back by itself.

A task owns the connection: it connects, hands events on, and when the connection is lost connects
again, to the other of the domain's two monitor sockets where the first stays silent. Callers only
execute commands. QEMU serves one client a socket; a second one waits in the queue without a
greeting, which is why every wait here is bounded.

*A lost reply.* QMP cannot tell whether a command whose reply was lost was run. `execute` says so
by `ReplyLostError` and repeats nothing by itself, but for commands that are declared repeatable.
`settle` waits until it can be asked: when QEMU closes a connection it drops the commands that it
had not begun, and it runs commands one by one. So once the *same* socket greets again, the lost
command has been run or never will be; on the other socket a question could overtake it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

from stratabox.daemon.hypervisor import qmp, sockets
from stratabox.daemon.hypervisor.events import OnEvent, Reconnected, parse
from stratabox.daemon.hypervisor.qmp import Connection, ReplyLostError
from stratabox.storage.model.errors import FailedError, UnavailableError

COMMAND_SECONDS = 30.0

_RETRY_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0)


class Monitor:
    """The monitor of the domain whose sockets lie in `folder`.

    :param on_event: called with each event, in the event loop; it must not block.
    """

    def __init__(self, folder: Path, on_event: OnEvent) -> None:
        self._folder = folder
        self._on_event = on_event
        self._connection: Connection | None = None
        self._connected = asyncio.Event()
        self._next = sockets.MONITOR
        self._keeper: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._descriptors = asyncio.Lock()

    async def open(self, seconds: float = qmp.GREETING_SECONDS) -> None:
        """Connect, and keep connected from now on.

        :raise UnavailableError: MONITOR_UNAVAILABLE, when neither socket greets in time; then
            nothing is left running.
        """
        self._keeper = asyncio.create_task(self._keep(), name=f"monitor {self._folder.name}")
        try:
            await self._current(seconds)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of the domain, which goes on running. Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            self._connected.set()  # nobody need wait for a connection that will never come
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper

    async def drained(self, seconds: float) -> None:
        """Wait until the connection of a QEMU that ended is lost: all its events were told then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                if self._watch is not None:
                    await asyncio.wait((self._watch,))

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        repeatable: bool = False,
        seconds: float = COMMAND_SECONDS,
    ) -> object:
        """Run a command and return what it returns.

        :param repeatable: running it twice is as running it once, so a lost reply leads to a
            second try on a new connection.
        :param seconds: for one try.
        :raise FailedError: QEMU_FAILED, when QEMU refuses it, in its words.
        :raise ReplyLostError: when no reply came.
        :raise UnavailableError: MONITOR_UNAVAILABLE, when there is no connection to send it over.
        """
        try:
            return await self._execute(command, arguments, seconds)
        except ReplyLostError:
            if not repeatable:
                raise
        return await self._execute(command, arguments, seconds)

    async def add_descriptor(self, descriptor: int, label: str, number: int | None = None) -> int:
        """Give QEMU a descriptor, into set `number` or a new one; returns the set's number.

        The caller's own descriptor stays open and is the caller's to close.

        :raise FailedError, UnavailableError: as `execute`.
        """
        arguments: dict[str, object] = {"opaque": label}
        if number is not None:
            arguments["fdset-id"] = number
        # QEMU holds the last descriptor that came until a command takes it: so one at a time.
        async with self._descriptors:
            connection = await self._current(COMMAND_SECONDS)
            try:
                connection.send_descriptor(descriptor)
                result = await connection.execute("add-fd", arguments, COMMAND_SECONDS)
            except ReplyLostError:
                self._drop(connection)
                raise
        got = result.get("fdset-id") if isinstance(result, dict) else None
        if not isinstance(got, int):
            raise FailedError("QEMU did not say where it put a file.", reason="QEMU_FAILED")
        return got

    async def settle(self, lost: ReplyLostError, seconds: float = COMMAND_SECONDS) -> None:
        """Return when the command whose reply was lost has been run or never will be.

        :raise UnavailableError: MONITOR_UNAVAILABLE, when that cannot be known now.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        old = self._connection
        while True:
            left = deadline - asyncio.get_running_loop().time()
            if old is not None:
                self._drop(old)
            self._next = lost.name
            current = await self._current(max(left, 0))
            if current.name == lost.name:
                return
            old = current

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None, seconds: float
    ) -> object:
        connection = await self._current(seconds)
        try:
            return await connection.execute(command, arguments, seconds)
        except ReplyLostError:
            self._drop(connection)
            raise

    async def _current(self, seconds: float) -> Connection:
        try:
            async with asyncio.timeout(seconds):
                while self._connection is None:
                    if self._keeper is None:
                        raise UnavailableError("QEMU is gone.", reason="MONITOR_UNAVAILABLE")
                    await self._connected.wait()
                return self._connection
        except TimeoutError:
            raise UnavailableError(
                "QEMU's monitor does not answer.", reason="MONITOR_UNAVAILABLE"
            ) from None

    def _drop(self, connection: Connection) -> None:
        """Have the keeper replace a connection, by one to the other socket first."""
        if connection is self._connection:
            self._forget()
            self._next = _other(connection.name)
            if self._watch is not None:
                self._watch.cancel()

    def _forget(self) -> None:
        self._connection = None
        self._connected.clear()

    async def _keep(self) -> None:
        tries = 0
        known = False
        while True:
            try:
                connection = await qmp.connect(self._folder, self._next, self._tell)
            except OSError:
                self._next = _other(self._next)
                await asyncio.sleep(_RETRY_SECONDS[min(tries, len(_RETRY_SECONDS) - 1)])
                tries += 1
                continue
            tries = 0
            self._watch = asyncio.create_task(connection.lost())
            self._connection = connection
            self._connected.set()
            if known:
                self._on_event(Reconnected())
            known = True
            try:
                await asyncio.wait((self._watch,))
            finally:
                self._watch.cancel()
                self._forget()
                await connection.close()

    def _tell(self, message: Mapping[str, object]) -> None:
        event = parse(message)
        if event is not None:
            self._on_event(event)


def _other(name: str) -> str:
    return sockets.RESCUE if name == sockets.MONITOR else sockets.MONITOR
