"""One command in a guest over its SSH connection, as a pipe: bytes in, bytes out.

For bulk: nothing is decoded, at most some 2 MiB of either direction are held, and whoever is
slower holds up the other. Terminals, signals and jobs are not done here.

Lines are made by `line`, which quotes for any POSIX shell; a user other than root is become by su.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncssh

from stratabox.daemon.hypervisor.guest.gathering import PIECE, Gathering
from stratabox.storage.model.errors import InvalidArgumentError, UnavailableError

_WINDOW = 2 << 20
_PACKET = 64 << 10
_HELD = 512 << 10  # of output, beyond which the guest is held up
_WORDS = 8 << 10  # of stderr that are kept, from its beginning
_OPEN_SECONDS = 30.0
_CLOSE_SECONDS = 10.0
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,63}\$?")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int | None
    """Its exit code; None: a signal ended it, or it was not told."""
    words: bytes
    """The beginning of its stderr."""


class Pipe(asyncssh.SSHClientSession[bytes]):
    """A command that runs. Made by `running`."""

    def __init__(self) -> None:
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._held: deque[bytes] = deque()
        self._size = 0
        self._words = bytearray()
        self._come = asyncio.Event()
        self._gathering = Gathering()
        self._room = asyncio.Event()
        self._room.set()
        self._over = asyncio.Event()
        self._eof = False
        self._lost: Exception | None = None

    # What asyncssh calls

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        """As asyncssh says."""
        self._channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        """As asyncssh says."""
        if datatype is not None:
            self._words += data[: _WORDS - len(self._words)]
            return
        self._held.append(data)
        self._size += len(data)
        self._come.set()
        self._gathering.grew(self._size)
        if self._size > _HELD and self._channel is not None:
            self._channel.pause_reading()

    def eof_received(self) -> bool:
        """As asyncssh says: our own direction stays open."""
        self._eof = True
        self._come.set()
        self._gathering.end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncssh says."""
        self._lost = exc
        self._eof = True
        self._come.set()
        self._gathering.end()
        self._room.set()
        self._over.set()

    def pause_writing(self) -> None:
        """As asyncssh says."""
        self._room.clear()

    def resume_writing(self) -> None:
        """As asyncssh says."""
        self._room.set()

    # What we call

    async def read(self) -> bytes:
        """The next bytes of its output; b"" when there will be no more."""
        while not self._held:
            if self._eof:
                return b""
            self._come.clear()
            await self._come.wait()
        await self._gathering.more(self._size)
        if len(self._held) == 1:
            data = self._held.popleft()
        else:
            pieces, size = [], 0
            while self._held and size + len(self._held[0]) <= PIECE:
                pieces.append(self._held.popleft())
                size += len(pieces[-1])
            data = b"".join(pieces) if pieces else self._held.popleft()
        before, self._size = self._size, self._size - len(data)
        if before > _HELD >= self._size and not self._eof:
            self._its_channel.resume_reading()
        return data

    async def read_line(self, limit: int) -> bytes:
        """The first line of its output, without its end; b"" when it did not come.

        Reads no further. :raise UnavailableError: when it is longer than `limit`.
        """
        line = b""
        while piece := await self.read():
            line += piece
            head, end, rest = line.partition(b"\n")
            if end:
                if rest:
                    self._held.appendleft(rest)
                    self._size += len(rest)
                return head
            if len(line) > limit:
                raise UnavailableError("the guest's answer makes no sense", reason=LOST)
        return b""

    async def write(self, data: bytes) -> bool:
        """Send it bytes, once there is room for more; False: it has ended and takes none."""
        await self._room.wait()
        if self._over.is_set():
            return False
        try:
            self._its_channel.write(data)
        except (OSError, asyncssh.Error):  # it ends just now
            return False
        return True

    def end_input(self) -> None:
        """It gets no more bytes."""
        if not self._over.is_set():
            self._its_channel.write_eof()

    async def ended(self) -> Ended:
        """Wait for its end; output that was not read is dropped.

        :raise UnavailableError: CHANNEL_UNAVAILABLE, when the connection ended before.
        """
        while await self.read():
            pass
        await self._over.wait()
        status = self._its_channel.get_exit_status()
        signal = self._its_channel.get_exit_signal()
        if status is None and signal is None:
            raise UnavailableError(
                "the connection to the guest ended while a command ran there", reason=LOST
            ) from self._lost
        return Ended(None if status is None or status < 0 else status, bytes(self._words))

    @property
    def words(self) -> bytes:
        """The beginning of its stderr, so far."""
        return bytes(self._words)

    @property
    def _its_channel(self) -> asyncssh.SSHClientChannel[bytes]:
        assert self._channel is not None
        return self._channel

    async def close(self) -> None:
        """End the command where it runs still, and forget the channel."""
        channel = self._channel
        if channel is None or self._over.is_set():
            return
        try:
            # Closing alone would leave one that neither reads nor writes just now.
            channel.terminate()
            channel.close()
        except (OSError, asyncssh.Error):
            return  # the connection is gone, and with it the command's pipes
        self._held.clear()
        self._size = 0
        channel.resume_reading()
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._over.wait()
        except TimeoutError:
            channel.abort()  # a guest that does not answer


LOST = "CHANNEL_UNAVAILABLE"


@asynccontextmanager
async def running(
    connection: asyncssh.SSHClientConnection, command: bytes, **options: Any
) -> AsyncIterator[Pipe]:
    """Run a command line; it is over when the context is.

    :raise UnavailableError: CHANNEL_UNAVAILABLE, when it cannot be begun.
    """
    pipe = Pipe()
    beginning = asyncio.ensure_future(
        connection.create_session(
            lambda: pipe,
            command,  # type: ignore[arg-type]  # asyncssh sends bytes as they are
            encoding=None,
            window=_WINDOW,
            max_pktsize=_PACKET,
            **options,
        )
    )
    try:
        # Shielded: one that is given up half-way would be begun by the guest all the same.
        async with asyncio.timeout(_OPEN_SECONDS):
            channel, _ = await asyncio.shield(beginning)
    except TimeoutError:
        beginning.add_done_callback(_end_late)
        raise UnavailableError(
            f"the guest did not begin a command within {_OPEN_SECONDS:g} s", reason=LOST
        ) from None
    except asyncio.CancelledError:
        beginning.add_done_callback(_end_late)
        raise
    except (OSError, asyncssh.Error) as error:
        raise UnavailableError(
            f"the guest cannot begin a command: {_short(error)}", reason=LOST
        ) from error
    channel.set_write_buffer_limits(high=_HELD)
    try:
        yield pipe
    finally:
        await pipe.close()


def _end_late(beginning: asyncio.Future[Any]) -> None:
    """End a command that nobody waits for any more, now that it has begun."""
    if beginning.cancelled() or beginning.exception() is not None:
        return
    channel, _ = beginning.result()
    try:
        channel.terminate()
        channel.close()
    except (OSError, asyncssh.Error):
        return  # the connection is gone


def line(script: str, *words: bytes, user: str = "") -> bytes:
    """A command line that runs a script of the POSIX shell with these arguments.

    :param user: as whom; empty: who the connection is.
    :raise InvalidArgumentError: when that can be no user's name.
    """
    command = b" ".join([b"exec sh -c", *map(_quoted, (script.encode(), b"sh", *words))])
    if not user or user == "root":
        return command
    if not _USER.fullmatch(user):
        raise InvalidArgumentError(f"{user!r} can be no user's name", field="user")
    return b"exec su -s /bin/sh -c " + _quoted(command) + b" " + user.encode()


def _quoted(word: bytes) -> bytes:
    return b"'" + word.replace(b"'", b"'\\''") + b"'"


def _short(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__
