"""Listening at the host, for one forwarded port.

Takes connections for as long as the port is there, whether its guest runs or not, so that nobody
else can take its place; while the guest does not run, they are closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from stratabox.daemon.lifecycle.inside.carrying import BROKEN, Far, carry, pump, pump_in
from stratabox.daemon.lifecycle.inside.crowd import Crowd
from stratabox.storage.model.errors import (
    AlreadyExistsError,
    FailedError,
    StrataboxError,
)
from stratabox.storage.model.ports import Endpoint

log = logging.getLogger(__name__)

Connect = Callable[[], Awaitable[Far]]

_BACKLOG = 128
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 1.0
"""Until connections are taken again when this host had no room for one."""
_RESET = struct.pack("ii", 1, 0)


class Listening:
    """A socket that listens at the host, and its connections. Closed by `close`."""

    def __init__(self, bound: socket.socket, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        """Where it listens, with the port that was chosen."""
        self.crowd = Crowd()
        self._socket = bound
        self._file = _identity(endpoint.path) if endpoint.path else None
        self._accepting: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, endpoint: Endpoint, mode: int) -> Listening:
        """Take the address or path; connections wait until `serve`.

        :raise AlreadyExistsError: PORT_IN_USE.
        :raise FailedError: LISTEN_FAILED.
        """
        try:
            bound = _bound_path(endpoint.path, mode) if endpoint.path else _bound_port(endpoint)
        except OSError as error:
            raise _explained(endpoint, error) from error
        if not endpoint.path:
            endpoint = Endpoint(address=endpoint.address, port=bound.getsockname()[1])
        return cls(bound, endpoint)

    def serve(self, connect: Connect, name: str) -> None:
        """Lead every connection to what `connect` gives."""
        self._accepting = asyncio.create_task(self._accept(connect, name), name=f"listen {name}")

    async def close(self) -> None:
        """Stop listening, close the connections, and remove the socket's file."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        self._socket.close()
        if self._file is not None and _identity(self.endpoint.path) == self._file:
            with contextlib.suppress(FileNotFoundError):
                Path(self.endpoint.path).unlink()
        await self.crowd.disperse()

    async def _accept(self, connect: Connect, name: str) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Too many at once wait in the kernel's queue, and nothing of them is taken in.
            await self.crowd.room()
            try:
                taken, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    log.error("port %s takes no connections for now: %s", name, error)
                    await asyncio.sleep(_PAUSE_SECONDS)
                    continue
                if error.errno == errno.ECONNABORTED:
                    continue
                raise
            self.crowd.enter(_lead(taken, connect, name), f"connection {name}")


async def _lead(taken: socket.socket, connect: Connect, name: str) -> None:
    """Carry one connection, and close it."""
    with taken:
        try:
            far = await connect()
        except StrataboxError as error:
            log.info("a connection to port %s is closed: %s", name, error.message)
            _reset(taken)
            return
        async with far:
            reader, writer = await asyncio.open_connection(sock=taken)
            try:
                await carry(pump_in(reader, far), pump(far, writer), far)
                writer.close()
                await writer.wait_closed()
            except BROKEN as error:
                log.debug("a connection to port %s has broken: %s", name, error)
            finally:
                writer.transport.abort()  # where it is not closed yet


def _reset(taken: socket.socket) -> None:
    """Have the other side see that this is no orderly end."""
    if taken.family != socket.AF_UNIX:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _bound_port(endpoint: Endpoint) -> socket.socket:
    family = socket.AF_INET6 if ":" in endpoint.address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Connections of before that linger must not keep a port from its own daemon.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((endpoint.address, endpoint.port))
        bound.listen(_BACKLOG)
    except BaseException:
        bound.close()
        raise
    return bound


def _bound_path(path: str, mode: int) -> socket.socket:
    _remove_dead(path)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        bound.bind(path)
        try:
            # Nobody can connect before it listens, whatever the mode until then.
            Path(path).chmod(mode)
            bound.listen(_BACKLOG)
        except BaseException:
            Path(path).unlink()
            raise
    except BaseException:
        bound.close()
        raise
    return bound


def _remove_dead(path: str) -> None:
    """Remove a socket of ours that nobody listens on: an earlier daemon was killed."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as asking:
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
        except BlockingIOError:
            return  # somebody's queue is full, so somebody listens


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _explained(endpoint: Endpoint, error: OSError) -> StrataboxError:
    if error.errno == errno.EADDRINUSE:
        return AlreadyExistsError(
            f"{endpoint} is taken at the host: choose another"
            f" {'path' if endpoint.path else 'port'}, or none",
            reason="PORT_IN_USE",
            endpoint=endpoint,
        )
    return FailedError(
        f"the daemon cannot listen at {endpoint}: {error.strerror}",
        reason="LISTEN_FAILED",
        endpoint=endpoint,
    )
