"""The wire to a guest's agent: JSON lines over one serial channel, from a guest that may lie.

The channel has no ids. What tells a reply from a late one to an earlier question is
``guest-sync-delimited``: 0xFF makes the agent drop half a command, and its reply, after another
0xFF, carries a number that was never used before. That is done whenever the last exchange did not
end well. Everything is bounded: a reply's size and time by the caller, its nesting by Python; and
the daemon reads only while it waits for a reply, and a flood only slowly, so a guest that floods
its port fills only its own queue. A long reply is looked through before it is parsed: what our
questions are answered with is a few fields, however long, and a million tiny ones would take a
hundred times their size in memory, and the interpreter for seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from stratabox.daemon.hypervisor import sockets
from stratabox.storage.model.errors import UnavailableError

_CHUNK = 256 << 10
_THREAD_ABOVE = 1 << 20
"""Replies above this size are parsed in a thread."""
_SYNC_BYTES = 4096
_CONNECT_PAUSE = 0.05
_FREE_BYTES = 4 << 20
"""What may lie before a mark: what an agent had still to say, and what the queues hold."""
_FLOOD_PAUSE = 0.05
"""After each piece of more than that."""
_LOOK_ABOVE = 64 << 10
_MOST_PARTS = 10_000
"""Of a reply that long: objects, lists, and what they hold."""


class AgentGoneError(UnavailableError):
    """The agent did not answer as it should. Whether the command was run is not known."""

    default_reason = "AGENT_UNAVAILABLE"


class QemuGoneError(AgentGoneError):
    """Nobody is at the other end of the channel, and nobody will be."""


class AgentChannel:
    """One connection to the agent's socket in `folder`, made when it is needed.

    Not for concurrent use: `GuestAgent` holds a lock.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sock: socket.socket | None = None
        self._buffer = bytearray()
        self._in_step = False
        self._asked: int | None = None
        """The number of a sync that was sent and that nobody has waited for yet."""
        self._skipped = 0
        """Bytes that were read and dropped, since the last sync began."""

    @property
    def in_step(self) -> bool:
        """The next line will be the reply to the next command."""
        return self._in_step

    def out_of_step(self) -> None:
        """Have the next exchange begin with a sync, as after a guest's reset."""
        self._in_step = False
        self._asked = None

    def close(self) -> None:
        """Hang up."""
        self._in_step = False
        self._asked = None
        self._buffer.clear()
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def begin_sync(self) -> None:
        """Ask the agent to get in step, at once and without waiting; `sync` hears the answer.

        Where that cannot be sent now (QEMU's queue is full, or it is gone) `sync` asks.
        """
        self._in_step = False
        with contextlib.suppress(OSError):
            if self._sock is None:
                self._sock = sockets.connect(self._folder, sockets.AGENT)
            number, question = _sync()
            # All of it or nothing: a socket's buffer holds more, and this is its first.
            self._sock.send(question)
            self._asked = number

    async def sync(self) -> None:
        """Connect where necessary and get in step; waits as long as the agent needs.

        :raise AgentGoneError: when QEMU hangs up.
        """
        number, self._asked = self._asked, None
        if number is None:
            await self._connect()
            number, question = _sync()
            self._in_step = False
            await self._send(question)
        self._skipped = 0
        while True:
            await self._skip_to_mark()
            with contextlib.suppress(_TooLongError, _GarbageError):
                reply = await _decode(await self._line(_SYNC_BYTES))
                if reply.get("return") == number:
                    self._in_step = True
                    return

    async def exchange(
        self, command: str, arguments: Mapping[str, object] | None, limit: int
    ) -> Mapping[str, object]:
        """Send a command and return the reply, which has "return" or "error".

        Unless this returns, the channel is out of step.

        :param limit: largest reply, bytes.
        :raise AgentGoneError: when QEMU hangs up, or the reply is too large or no reply at all.
        """
        self._in_step = False
        await self._send(_encode(command, arguments))
        try:
            reply = await _decode(await self._line(limit))
        except _TooLongError:
            self.close()  # whatever is left of it is not worth reading
            raise AgentGoneError(f"The guest's reply to {command} is too large.") from None
        except _GarbageError as error:
            raise AgentGoneError(f"The guest's reply to {command} makes no sense.") from error
        self._in_step = True
        return reply

    def send_now(self, command: str) -> None:
        """Queue a command behind the one that runs, at once and without waiting for a reply.

        Where it cannot be queued (no connection, a full queue) nothing happens.
        """
        self._in_step = False
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.send(_encode(command, None))

    async def _connect(self) -> None:
        while self._sock is None:
            try:
                self._sock = sockets.connect(self._folder, sockets.AGENT)
            except BlockingIOError:
                await asyncio.sleep(_CONNECT_PAUSE)
            except OSError as error:
                raise QemuGoneError("The guest's agent has no channel: QEMU is gone.") from error

    async def _send(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._opened(), data)
        except OSError as error:
            self.close()
            raise AgentGoneError("The channel to the guest's agent was lost.") from error

    async def _receive(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            data = await loop.sock_recv(self._opened(), _CHUNK)
        except OSError as error:
            self.close()
            raise AgentGoneError("The channel to the guest's agent was lost.") from error
        if not data:
            self.close()
            raise AgentGoneError("The channel to the guest's agent was lost.")
        self._buffer += data
        # A socket that always has something never makes its reader wait: the others' turn, then.
        await asyncio.sleep(0)

    async def _skip_to_mark(self) -> None:
        await self._slow_down()
        while (mark := self._buffer.rfind(b"\xff")) < 0:
            self._skipped += len(self._buffer)
            self._buffer.clear()
            await self._slow_down()
            await self._receive()
        # The last mark: replies to earlier syncs lie before it.
        self._skipped += mark
        del self._buffer[: mark + 1]

    async def _slow_down(self) -> None:
        if self._skipped > _FREE_BYTES:
            await asyncio.sleep(_FLOOD_PAUSE)

    async def _line(self, limit: int) -> bytes:
        seen = 0
        while (end := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if seen > limit:
                raise _TooLongError
            await self._receive()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _opened(self) -> socket.socket:
        if self._sock is None:
            raise AgentGoneError("The channel to the guest's agent was lost.")
        return self._sock


def _sync() -> tuple[int, bytes]:
    """A number that was never used before, and the question that the agent answers by it."""
    number = secrets.randbits(48)
    return number, b"\xff" + _encode("guest-sync-delimited", {"id": number})


class _TooLongError(Exception):
    """A line is longer than it may be."""


class _GarbageError(Exception):
    """A line is no JSON object."""


def _encode(command: str, arguments: Mapping[str, object] | None) -> bytes:
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message).encode() + b"\n"


async def _decode(line: bytes) -> Mapping[str, object]:
    if len(line) > _THREAD_ABOVE:
        return await asyncio.to_thread(_parse, line)
    return _parse(line)


def _parse(line: bytes) -> Mapping[str, object]:
    if len(line) > _LOOK_ABOVE and sum(map(line.count, (b"{", b"[", b","))) > _MOST_PARTS:
        raise _GarbageError
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _GarbageError from error
    if not isinstance(value, dict):
        raise _GarbageError
    return value
