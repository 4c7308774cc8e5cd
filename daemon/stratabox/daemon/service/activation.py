"""The API's Unix socket, where systemd has opened it (sd_listen_fds(3)).

gRPC opens its sockets itself and takes none from others. So it listens beside the one that systemd
holds, and connections are passed on between the two:

```
client ─▶ /run/stratabox/api.sock, systemd's ─▶ Relay ─▶ /run/stratabox/.api.sock, gRPC's, mode 0600
```

Nobody is refused while the daemon restarts: who connects meanwhile waits in systemd's socket.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

_FIRST = 3
"""The first descriptor that systemd hands over."""
_PIECE = 256 << 10
_CONNECTIONS = 1024


def inherited(environ: MutableMapping[str, str]) -> dict[Path, socket.socket]:
    """The listening Unix sockets that were handed over, by their paths; for the caller to close.

    Takes the variables out of the environment, so that no child of the daemon's looks for them.
    Others that were handed over are closed.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    found: dict[Path, socket.socket] = {}
    if pid != str(os.getpid()) or not count.isdecimal():
        return found
    for descriptor in range(_FIRST, _FIRST + int(count)):
        os.set_inheritable(descriptor, False)
        given = socket.socket(fileno=descriptor)
        name = given.getsockname() if given.family == socket.AF_UNIX else None
        listens = given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if isinstance(name, str) and name and listens:
            found[Path(name)] = given
        else:
            log.warning("a socket that systemd has handed over is of no use here: %s", name)
            given.close()
    return found


class Relay:
    """Passes on what comes to one listening socket to another one.

    :param source: is closed by `stop`; what it lies at in the file system is left alone.
    """

    def __init__(self, source: socket.socket, target: Path) -> None:
        self._source = source
        self._target = target
        self._room = asyncio.Semaphore(_CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take connections from now on, those that wait already first."""
        self._source.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="activation")

    async def close(self) -> None:
        """Take no more: who comes now waits for the next daemon. Those that there are go on."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})

    async def stop(self) -> None:
        """End those that there are."""
        await self.close()
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        self._source.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                client, _ = await loop.sock_accept(self._source)
            except OSError as error:  # no more descriptors, say
                self._room.release()
                log.error("no connection can be taken: %s", error)
                await asyncio.sleep(1)
                continue
            task = asyncio.create_task(self._carry(client), name="activation's connection")
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _carry(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            client.setblocking(False)
            server.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(server, str(self._target))
            except OSError as error:
                log.error("the API does not take a connection: %s", error)
                return
            ways = [
                asyncio.create_task(_pump(client, server)),
                asyncio.create_task(_pump(server, client)),
            ]
            try:
                await asyncio.wait(ways)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)


async def _pump(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until its end, and tell that."""
    loop = asyncio.get_running_loop()
    with suppress(OSError):  # either side has gone: the end all the same
        while piece := await loop.sock_recv(source, _PIECE):
            await loop.sock_sendall(target, piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
