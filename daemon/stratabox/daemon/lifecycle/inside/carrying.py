"""Carrying one connection between something near (a socket, a call) and a channel into a guest.

Bytes go both ways at once, with back-pressure: no more is read than the other side takes. When one
side sends no more the other is told, and may go on sending (half-close).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Protocol

import asyncssh

from stratabox.daemon.hypervisor.guest.channel import has_ended
from stratabox.storage.model.errors import FailedError, StrataboxError, UnavailableError
from stratabox.storage.model.ports import Endpoint

WINDOW = 512 << 10
"""Bytes of one connection that the guest may send ahead of whoever reads."""
PIECE = 64 << 10
OPEN_SECONDS = 30.0
"""How long the guest may take to connect to something of its own."""

BROKEN = (OSError, asyncssh.Error)
"""What a connection raises that somebody has broken off."""


class Reader(Protocol):
    """Where bytes come from."""

    async def read(self, n: int = -1, /) -> bytes:
        """At most so many; none: no more will come."""


class Writer(Protocol):
    """Where bytes go."""

    def write(self, data: bytes, /) -> None:
        """Take some, at once."""

    async def drain(self) -> None:
        """Wait until there is room for more."""

    def can_write_eof(self) -> bool:
        """The other side can be told that no more comes."""

    def write_eof(self) -> None:
        """Tell the other side that no more comes."""


class Far:
    """The guest's end of one connection. A context manager: closed at its end."""

    def __init__(
        self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]
    ) -> None:
        self.writer = writer
        self._reader = reader
        self._connection = writer.channel.get_connection()
        self.first = b""
        """What has been read of it already."""

    async def __aenter__(self) -> Far:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.writer.channel.abort()

    async def read(self, n: int = PIECE, /) -> bytes:
        """Some of what the guest sends; none: it sends no more.

        :raise asyncssh.Error: when the guest is gone, rather than at its end.
        :raise OSError: likewise.
        """
        data = self.first or await self._reader.read(n)
        self.first = b""
        if not data and self._connection.is_closed():
            raise asyncssh.ConnectionLost("the guest's channel has ended")
        return data

    async def closed(self) -> None:
        """Return when the guest takes and sends no more."""
        await self.writer.channel.wait_closed()


async def reach(connection: asyncssh.SSHClientConnection, endpoint: Endpoint) -> Far:
    """Connect to something that listens in the guest.

    :raise FailedError: CONNECTION_REFUSED, when nothing does.
    :raise UnavailableError: CONNECTION_LOST, when the guest is gone or does not answer.
    """
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            if endpoint.path:
                reader, writer = await connection.open_unix_connection(
                    endpoint.path, encoding=None, window=WINDOW
                )
            else:
                reader, writer = await connection.open_connection(
                    endpoint.address, endpoint.port, encoding=None, window=WINDOW
                )
    except asyncssh.ChannelOpenError as error:
        if await has_ended(connection):
            raise lost(error) from error
        raise FailedError(
            f"nothing in the guest takes connections at {endpoint}: {error.reason}",
            reason="CONNECTION_REFUSED",
            endpoint=endpoint,
        ) from error
    except TimeoutError as error:
        raise UnavailableError(
            f"the guest did not connect to {endpoint} within {OPEN_SECONDS:g} s",
            reason="CONNECTION_LOST",
        ) from error
    except BROKEN as error:
        raise lost(error) from error
    return Far(reader, writer)


def lost(error: BaseException) -> StrataboxError:
    """The error of a connection that has broken."""
    return UnavailableError(
        f"the connection into the guest has broken: {error}", reason="CONNECTION_LOST"
    )


async def pump(source: Reader, target: Writer) -> None:
    """Carry bytes one way until there are no more.

    :raise OSError or asyncssh.Error: when either side breaks.
    """
    while data := await source.read(PIECE):
        target.write(data)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()


async def pump_in(source: Reader, far: Far) -> None:
    """Carry bytes into the guest until there are no more, or until it takes none.

    :raise OSError or asyncssh.Error: when the source breaks.
    """
    while data := await source.read(PIECE):
        if not await send(far, data):
            return
    finish(far)


async def send(far: Far, data: bytes) -> bool:
    """Send some into the guest; False when it takes no more."""
    try:
        far.writer.write(data)
        await far.writer.drain()
    except BROKEN:
        return False
    return True


def finish(far: Far) -> None:
    """Tell the guest that no more comes, if it is still there to hear."""
    with contextlib.suppress(*BROKEN):
        far.writer.write_eof()


async def carry(up: Coroutine[Any, Any, None], down: Coroutine[Any, Any, None], far: Far) -> None:
    """Carry both ways until both have ended, or until the guest has closed its end.

    :param up: what goes into the guest; a guest that takes no more is no error.
    :param down: what comes out of it; all of it is carried, whoever ends first.
    :raise Exception: what one of them raises; the other way is given up.
    """
    sending = asyncio.ensure_future(up)
    coming = asyncio.ensure_future(down)
    gone = asyncio.ensure_future(far.closed())
    waiting: set[asyncio.Future[None]] = {sending, coming, gone}
    try:
        while not (coming.done() and (sending.done() or gone.done())):
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                each.result()
    finally:
        for task in (sending, coming, gone):
            task.cancel()
        await asyncio.gather(sending, coming, gone, return_exceptions=True)
