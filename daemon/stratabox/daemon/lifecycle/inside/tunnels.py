"""Listening in a guest for a caller, who leads the connections on: for as long as the call lasts.

As `guest_listening`, which leads them to the daemon's host and is there until it is removed.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import asyncssh

from stratabox.daemon.lifecycle.inside.carrying import BROKEN, OPEN_SECONDS, WINDOW, Far, lost
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ports import Endpoint

_CLOSE_SECONDS = 5.0

Take = Callable[[Far, str], None]
"""Takes a connection, and the address that it comes from; the taker closes it."""


@dataclass(frozen=True)
class Listening:
    """A guest that listens."""

    port: int
    _connection: asyncssh.SSHClientConnection

    async def over(self) -> None:
        """Return when it listens no more: the guest's channel has ended."""
        await self._connection.wait_closed()


@asynccontextmanager
async def listening(
    connection: asyncssh.SSHClientConnection, endpoint: Endpoint, take: Take
) -> AsyncIterator[Listening]:
    """Have the guest listen until the context ends; port 0: one that is free.

    :raise FailedError: LISTEN_FAILED, when the guest refuses, or the address is not its loopback.
    :raise UnavailableError: CONNECTION_LOST.
    """
    if not ipaddress.ip_address(endpoint.address).is_loopback:
        # Its sshd would listen at the loopback all the same, and say nothing.
        raise _refused(endpoint, "only addresses of its loopback can be listened at")

    try:
        async with asyncio.timeout(OPEN_SECONDS):
            listener = await connection.start_server(
                lambda host, port: partial(_handed, take, f"{host}:{port}"),
                endpoint.address,
                endpoint.port,
                window=WINDOW,
            )
    except asyncssh.ChannelListenError as error:
        raise _refused(endpoint, "it is taken there") from error
    except (*BROKEN, TimeoutError) as error:
        raise lost(error) from error
    try:
        yield Listening(listener.get_port(), connection)
    finally:
        if not connection.is_closed():
            listener.close()
            # The answer never comes when the guest has gone meanwhile, and late when it is paused.
            waits = [asyncio.ensure_future(each.wait_closed()) for each in (listener, connection)]
            await asyncio.wait(waits, timeout=_CLOSE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for each in waits:
                each.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


def _handed(
    take: Take,
    source: str,
    reader: asyncssh.SSHReader[bytes],
    writer: asyncssh.SSHWriter[bytes],
) -> None:
    take(Far(reader, writer), source)


def _refused(endpoint: Endpoint, why: str) -> FailedError:
    return FailedError(
        f"the guest cannot listen at {endpoint}: {why}", reason="LISTEN_FAILED", endpoint=endpoint
    )
