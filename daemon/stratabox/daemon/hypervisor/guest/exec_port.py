"""A command over a port of its own, while a guest's channel is not there yet; see keeper_port.h.

A guest that goes on from saved memory needs 0.3 s until its sshd can be spoken to, and a command of
some ms would wait so long. Here a keeper waits that has only to start it.

```
 begin ──▶ connects ──▶ hears a greeting ──▶ asks ──▶ PortStream ──▶ hangs up
                            │ none in time, or the channel is there first
                            └──▶ hangs up; None: by the channel
```

*Nothing is asked before a greeting is heard*, so what was not asked here can be asked over the
channel. The port has one user at a time; whoever else comes meanwhile goes over the channel, which
is made when the first command has ended, or has had its `_HEAD_START`: both at once would share the
one CPU that an emulated guest has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from stratabox.daemon.hypervisor import sockets
from stratabox.daemon.hypervisor.guest import port_wire
from stratabox.daemon.hypervisor.guest.channel import Channel
from stratabox.daemon.hypervisor.guest.exec_heard import Heard, Hearing, LostError, Output
from stratabox.daemon.hypervisor.guest.exec_wire import (
    Command,
    Ended,
    NotStarted,
    new_token,
    request,
)
from stratabox.daemon.hypervisor.guest.port_wire import NonsenseError, Over, Taken, Told

log = logging.getLogger(__name__)

_PATIENCE = 0.5
"""Until a greeting is heard."""
_HEAD_START = 0.3
"""Of the command, before the channel is made beside it."""
_ANSWER_SECONDS = 60.0
_GRANT = port_wire.OUTPUT_ROOM // 8
"""Bytes of output that were taken, when the guest is told."""


class ExecPort:
    """The port of the guest whose sockets lie in `folder`."""

    def __init__(self, folder: Path, channel: Channel) -> None:
        self._folder = folder
        self._channel = channel
        self._user: PortStream | None = None
        self._beginning = False
        self._is_deaf = False
        """Nobody has answered: nobody is there, or too slow to be of use."""
        self._connecting: asyncio.TimerHandle | None = None

    @property
    def is_of_use(self) -> bool:
        """It is free, somebody may be there, and the channel is not."""
        free = self._user is None and not self._beginning
        return free and not self._is_deaf and not self._channel.is_connected

    async def begin(
        self, command: Command, *, sandbox: str, tell: bool
    ) -> tuple[PortStream, str, float] | None:
        """Ask for a command that `exec_wire.check` has seen; without a terminal, not detached.

        :param tell: have the guest told the time, and given random numbers, before it is run.
        :return: the stream; what it could not be told, in words; and how long that took, seconds.
            None: nothing was asked.
        :raise UnavailableError: CONNECTION_LOST; it may have been run.
        """
        if not self.is_of_use:
            return None
        self._beginning = True
        called = time.monotonic()
        try:
            line = await self._greeted()
            if line is None:
                self._is_deaf = True
                return None
            heard = time.monotonic()
            stream = PortStream(line, self)
            self._user = stream
            self._connecting = asyncio.get_running_loop().call_later(
                _HEAD_START, self._channel.connect_soon
            )
            try:
                missed, seconds = await stream.ask(command, sandbox, tell=tell)
            except BaseException:
                await stream.close()
                raise
            log.debug(
                "exec port %s: heard after %.0f ms, begun after %.0f ms more",
                self._folder.name, (heard - called) * 1e3, (time.monotonic() - heard) * 1e3,
            )  # fmt: skip
        finally:
            self._beginning = False
        return stream, missed, seconds

    def was_reset(self) -> None:
        """The guest starts over; or has ended. What ran is lost, and nobody need be asked."""
        self._is_deaf = True
        if self._user is not None:
            self._user.lose("the guest has ended, or starts over")

    def close(self) -> None:
        """Let go of it, for good."""
        self.was_reset()
        if self._connecting is not None:
            self._connecting.cancel()

    def failed(self) -> None:
        """Whoever answers is not to be asked again."""
        self._is_deaf = True

    def over(self, stream: PortStream, *, closed: bool) -> None:
        """The user's command has ended, or the user has hung up."""
        if self._user is stream:
            if closed:
                self._user = None
            if self._connecting is not None:
                self._connecting.cancel()
            self._channel.connect_soon()

    async def _greeted(self) -> _Line | None:
        """The line to a keeper that waits; None: nobody does."""
        loop = asyncio.get_running_loop()
        try:
            sock = sockets.connect(self._folder, sockets.EXEC)
        except OSError as error:
            log.info("exec port %s: %s", self._folder.name, error)
            return None
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(sock.close)
            _, line = await loop.create_unix_connection(_Line, sock=sock)
            stack.pop_all()
        connected = asyncio.create_task(self._channel.made(), name="channel or exec port")
        is_there = False
        try:
            either: set[asyncio.Future[Any]] = {line.greeted, connected}
            await asyncio.wait(either, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
            is_there = line.greeted.done() and line.greeted.result()
        finally:
            connected.cancel()
            if not is_there:
                line.hang_up()
        if not is_there:
            log.info("exec port %s: nobody is heard", self._folder.name)
        return line if is_there else None


class _Line(asyncio.Protocol):
    """The port's socket."""

    def __init__(self) -> None:
        self.greeted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.writable = asyncio.Event()
        self.writable.set()
        self._greeting: port_wire.Greeted | None = port_wire.Greeted()
        self._user: PortStream | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._user is not None:
            self._user.came(data)
        elif self._greeting is not None:
            try:
                if not self._greeting.feed(data):
                    return
            except NonsenseError as error:
                log.info("exec port: %s", error)
                self._answer(is_there=False)
            else:
                self._answer(is_there=True)
            self._greeting = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.writable.set()
        self._answer(is_there=False)
        if self._user is not None:
            self._user.lose(f"QEMU has hung up{f' ({exc})' if exc else ''}")

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def used_by(self, user: PortStream) -> None:
        """What comes is its from now on."""
        self._user = user

    def write(self, data: bytes) -> None:
        """Send; after the end nothing happens."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def hang_up(self) -> None:
        """At once."""
        self._user = None
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, *, is_there: bool) -> None:
        if not self.greeted.done():
            self.greeted.set_result(is_there)


class PortStream:
    """An `ExecStream` over the port. Made by `ExecPort.begin`."""

    def __init__(self, line: _Line, port: ExecPort) -> None:
        self._line = line
        self._port = port
        self._token = new_token()
        self._words = port_wire.Words(self._token)
        self._hearing = Hearing(self._was_taken)
        self._told: asyncio.Future[Told] = asyncio.get_running_loop().create_future()
        self._error = ""
        self._ended: Ended | None = None
        self._is_over = False
        self._input_room = port_wire.INPUT_ROOM
        self._has_input_room = asyncio.Event()
        self._output_room = port_wire.OUTPUT_ROOM
        self._output_taken = 0
        line.used_by(self)

    def __aiter__(self) -> AsyncIterator[Heard]:
        """What is heard, in order. :raise UnavailableError: CONNECTION_LOST."""
        return self._heard()

    async def ask(self, command: Command, sandbox: str, *, tell: bool) -> tuple[str, float]:
        """Ask for it, once. As `ExecPort.begin`."""
        begun = time.monotonic()
        self._line.write(port_wire.opening(time.time_ns() if tell else None))
        self._line.write(request(command, self._token, sandbox=sandbox))
        if not tell:
            return "", 0.0
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                told = await self._told
        except TimeoutError:
            raise LostError(
                f"the guest did not begin the command within {_ANSWER_SECONDS:g} s"
            ) from None
        missed = {"clock": told.clock, "random numbers": told.random}
        words = ", ".join(name for name, error in missed.items() if error)
        return words, time.monotonic() - begun

    async def write(self, data: bytes) -> None:
        """Give the command input; waits while it takes none. After its end nothing happens."""
        rest = memoryview(data)
        while rest and not self._is_over:
            if not self._input_room:
                self._has_input_room.clear()
                await self._has_input_room.wait()
                continue
            piece = rest[: self._input_room]
            self._input_room -= len(piece)
            self._line.write(port_wire.given(bytes(piece)))
            rest = rest[len(piece) :]
            await self._line.writable.wait()

    def end_of_input(self) -> None:
        """Its standard input ends here."""
        self._line.write(port_wire.end_of_input())

    def resize(self, columns: int, rows: int) -> None:
        """There is no terminal."""

    async def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group; KILL to all that it started. Waits for its start.

        :raise UnavailableError: CONNECTION_LOST.
        """
        await self._hearing.started.wait()
        await self._line.writable.wait()
        if self._error:
            raise self._lost()
        if self._hearing.said_started is not None and self._ended is None:
            self._line.write(port_wire.signalled(number))

    async def close(self) -> None:
        """Let go of it; a command that runs is killed by its keeper, which sees that."""
        self._end()
        self._line.hang_up()
        self._port.over(self, closed=True)

    def came(self, data: bytes) -> None:
        """The guest has said something."""
        try:
            for word in self._words.feed(data):
                self._take(word)
        except NonsenseError as error:
            self._line.hang_up()
            self.lose(f"the guest's keeper said nonsense: {error}")

    def lose(self, why: str) -> None:
        """Nothing comes any more."""
        if not self._is_over:
            log.info("exec port: %s", why)
            self._port.failed()
            self._error = why
            self._end()
            self._line.hang_up()

    def _take(self, word: port_wire.Word) -> None:
        match word:
            case Told():
                if not self._told.done():
                    self._told.set_result(word)
            case Taken():
                self._input_room += word.size
                if self._input_room > port_wire.INPUT_ROOM:
                    raise NonsenseError("it took more than it was given")
                self._has_input_room.set()
            case Over():
                self._end()
            case Ended():
                self._ended = word  # last: what it has left behind may still print
                self._port.over(self, closed=False)
            case Output():
                self._output_room -= len(word.data)
                if self._output_room < 0:
                    raise NonsenseError("it sent more than there is room for")
                self._hearing.take(word)
            case _:
                self._hearing.take(word)

    def _was_taken(self, size: int) -> None:
        self._output_taken += size
        if self._output_taken >= _GRANT:
            self._output_room += self._output_taken
            self._line.write(port_wire.taken(self._output_taken))
            self._output_taken = 0

    def _end(self) -> None:
        self._is_over = True
        self._hearing.end()
        self._has_input_room.set()
        if not self._told.done():
            self._told.set_exception(self._lost())
            self._told.exception()  # seen, also where nobody waits for it

    async def _heard(self) -> AsyncIterator[Heard]:
        async for heard in self._hearing.heard():
            yield heard
            if isinstance(heard, NotStarted):
                return
        if self._ended is None:
            raise self._lost()
        yield self._ended

    def _lost(self) -> LostError:
        return LostError(
            "the way into the guest was lost, and with it the command"
            f"{f': {self._error}' if self._error else ''}"
        )
