"""Listening in a guest, for one forwarded port that leads to the host.

The guest's sshd listens, by request over the guest's channel, and stops when the channel ends:
after a reboot, a restore, or a new start of the daemon it is asked again (`guest_side`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex

import asyncssh

from stratabox.daemon.lifecycle.inside.carrying import (
    BROKEN,
    OPEN_SECONDS,
    WINDOW,
    Far,
    carry,
    lost,
    pump,
    pump_in,
)
from stratabox.daemon.lifecycle.inside.crowd import Crowd
from stratabox.daemon.lifecycle.inside.endpoints import MODE
from stratabox.storage.model.errors import AlreadyExistsError, FailedError
from stratabox.storage.model.ports import Endpoint, Port

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 10.0
_CLOSE_SECONDS = 5.0
_EXISTS = "test -e"
_REMOVE = "rm -f --"


async def _shell(connection: asyncssh.SSHClientConnection, command: str, path: str) -> int:
    """Run a command with a path in the guest; its exit code, or -1.

    :raise OSError or asyncssh.Error: when the connection is lost.
    :raise TimeoutError: when it takes too long.
    """
    async with asyncio.timeout(OPEN_SECONDS):
        done = await connection.run(
            f"{command} {shlex.quote(path)} >/dev/null 2>&1", stdin=asyncssh.DEVNULL, encoding=None
        )
    return -1 if done.exit_status is None else done.exit_status


class GuestListening:
    """A socket that listens in a guest, and its connections. Closed by `close`."""

    def __init__(self, port: Port) -> None:
        self.crowd = Crowd()
        self._port = port
        self._connection: asyncssh.SSHClientConnection | None = None
        self._listener: asyncssh.SSHListener | None = None

    @property
    def connection(self) -> asyncssh.SSHClientConnection | None:
        """What it listens by; it is over when that is."""
        return self._connection

    async def open(self, connection: asyncssh.SSHClientConnection, *, first: bool) -> None:
        """Have the guest listen. If this raises, it does not.

        :param first: nobody has listened there for us before, so what is there is not ours.
        :raise AlreadyExistsError: PORT_IN_USE, when there is a file at the path.
        :raise FailedError: LISTEN_FAILED, when the guest refuses.
        :raise UnavailableError: CONNECTION_LOST.
        """
        wanted = self._port.guest
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                if wanted.path:
                    await self._open_path(connection, wanted.path, first=first)
                else:
                    self._listener = await connection.start_server(
                        lambda host, port: self._take,
                        wanted.address,
                        wanted.port,
                        window=WINDOW,
                    )
        except asyncssh.ChannelListenError as error:
            missing = "its folder is missing" if wanted.path else "the address is not the guest's"
            raise FailedError(
                f"the guest cannot listen at {wanted}: it is taken there, or {missing}",
                reason="LISTEN_FAILED",
                endpoint=wanted,
            ) from error
        except (*BROKEN, TimeoutError) as error:
            raise lost(error) from error
        self._connection = connection

    async def close(self, *, tell: bool = True) -> None:
        """Have the guest stop listening, where it still does, and close the connections.

        :param tell: or leave it to the end of the guest's channel, which is near.
        """
        listener, self._listener = self._listener, None
        connection, self._connection = self._connection, None
        still = tell and connection is not None and not connection.is_closed()
        if listener is not None and connection is not None and still:
            listener.close()
            # The answer never comes when the guest has gone meanwhile, and late when it is paused.
            closing = asyncio.ensure_future(listener.wait_closed())
            gone = asyncio.ensure_future(connection.wait_closed())
            await asyncio.wait(
                {closing, gone}, timeout=_CLOSE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            closed = closing.done()
            closing.cancel()
            gone.cancel()
            await asyncio.gather(closing, gone, return_exceptions=True)
            if self._port.guest.path and closed:
                with contextlib.suppress(*BROKEN, TimeoutError):
                    await _shell(connection, _REMOVE, self._port.guest.path)
        await self.crowd.disperse()

    async def _open_path(
        self, connection: asyncssh.SSHClientConnection, path: str, *, first: bool
    ) -> None:
        # The guest's sshd would put its socket in the place of anything.
        if first and await _shell(connection, _EXISTS, path) == 0:
            raise AlreadyExistsError(
                f"there is a file {path} in the guest: choose another path, or remove it",
                reason="PORT_IN_USE",
                endpoint=path,
            )
        self._listener = await connection.start_unix_server(lambda: self._take, path, window=WINDOW)
        if self._port.mode != MODE:
            await _shell(connection, f"chmod {self._port.mode:04o}", path)

    def _take(self, reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
        if self.crowd.is_full:
            log.warning("port %s has too many connections: one more is closed", self._port.id)
            writer.channel.abort()
            return
        work = _lead(Far(reader, writer), self._port.host, self._port.id)
        self.crowd.enter(work, f"connection {self._port.id}")


async def _lead(far: Far, target: Endpoint, name: str) -> None:
    """Carry one connection from the guest, and close it."""
    async with far:
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                if target.path:
                    reader, writer = await asyncio.open_unix_connection(target.path)
                else:
                    reader, writer = await asyncio.open_connection(target.address, target.port)
        except (OSError, TimeoutError) as error:
            log.info("port %s leads nowhere: %s does not answer: %s", name, target, error)
            return
        try:
            await carry(pump_in(reader, far), pump(far, writer), far)
            writer.close()
            await writer.wait_closed()
        except BROKEN as error:
            log.debug("a connection of port %s has broken: %s", name, error)
        finally:
            writer.transport.abort()
