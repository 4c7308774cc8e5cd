"""The API's Unix socket, where systemd has opened it (sd_listen_fds(3)).

gRPC opens its sockets itself and takes none from others. So it listens beside the one that systemd
holds, and connections are passed on between the two:

```
client ─▶ /run/stratabox/api.sock, systemd's ─▶ Relay ─▶ /run/stratabox/.api.sock, gRPC's, mode 0600
```

Nobody is refused while the daemon restarts: who connects meanwhile waits in systemd's socket. For
clients that are connected the relay puts a GOAWAY into what they are sent. gRPC sends one, too,
when its server is stopped, but drops the calls that come before a client has read it:

```
close()   ─▶ no more connections are taken: who comes now waits for the next daemon
finish()  ─▶ GOAWAY, PING to each client: it begins its next call on a new connection
          ◀─ its answer to the PING: nothing new comes by the old one
             … until nothing that was begun is under way
stop()    ─▶ connections are closed, if clients have not done so
```
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from pathlib import Path

from stratabox.daemon.service.frames import ACK, PREFACE, Frame, Frames, Kind, goaway, ping

log = logging.getLogger(__name__)

_FIRST = 3
"""The first descriptor that systemd hands over."""
_PIECE = 64 << 10
_CONNECTIONS = 1024
_MARK = b"farewell"
_HEARD_SECONDS = 2.0
"""How long a client may take to hear of the end: one that is stopped never does."""
_FAULT_SECONDS = 1.0


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
    """Passes on what comes to one listening socket to another one, HTTP/2 in both directions.

    :param source: is closed by `stop`; what it lies at in the file system is left alone.
    """

    def __init__(self, source: socket.socket, target: Path) -> None:
        self._source = source
        self._target = target
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._changed = asyncio.Event()
        self._closed = False
        self._takes = False
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Take connections from now on, those that wait already first."""
        self._source.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Take no more: who comes now waits for the next daemon. Those that there are go on."""
        self._closed = True
        self._pause()

    async def finish(self) -> None:
        """Let clients go: return when nothing that they have begun is under way.

        What they still begin before they have heard of it is waited for, too.
        """
        for each in self._connections.values():
            each.leaving.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_HEARD_SECONDS):
                await self._until(lambda connection: connection.heard)
        await self._until(lambda connection: not connection.streams)

    async def stop(self) -> None:
        """End those that there are."""
        self.close()
        while self._connections:
            for task in self._connections:
                task.cancel()
            await asyncio.wait(self._connections)
        self._source.close()

    async def _until(self, fact: Callable[[_Connection], bool]) -> None:
        """Wait until it is so for each connection that there is."""
        while not all(map(fact, self._connections.values())):
            self._changed.clear()
            await self._changed.wait()

    def _listen(self) -> None:
        self._again = None
        if not self._closed and not self._takes and len(self._connections) < _CONNECTIONS:
            self._takes = True
            asyncio.get_running_loop().add_reader(self._source, self._accept)

    def _pause(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._takes:
            self._takes = False
            asyncio.get_running_loop().remove_reader(self._source)

    def _accept(self) -> None:
        """Take one. Not in a task: one that is cancelled could lose what it has just been given."""
        try:
            client, _ = self._source.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no more descriptors, say
            log.error("no connection can be taken: %s", error)
            self._pause()
            self._again = asyncio.get_running_loop().call_later(_FAULT_SECONDS, self._listen)
            return
        connection = _Connection(client, self._target, self._changed)
        task = asyncio.create_task(connection.carry(), name="activation's connection")
        self._connections[task] = connection
        task.add_done_callback(self._ended)
        if len(self._connections) >= _CONNECTIONS:
            self._pause()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task).close()
        self._changed.set()
        if self._again is None:
            self._listen()


class _Connection:
    """One that is passed on.

    :param changed: is set whenever `heard` or `streams` have changed.
    """

    def __init__(self, client: socket.socket, target: Path, changed: asyncio.Event) -> None:
        self._client = client
        self._target = target
        self._changed = changed
        self._from_client = Frames(skip=len(PREFACE))
        self._from_server = Frames()
        self._writing = asyncio.Lock()
        self._told = False
        self._newest = 0
        self.leaving = asyncio.Event()
        """To be set when the client is to go."""
        self.heard = False
        """The client begins nothing more here."""
        self.streams: set[int] = set()
        """What it has begun and is not over."""

    async def carry(self) -> None:
        """Pass on both ways until both have ended."""
        with socket.socket(socket.AF_UNIX) as server:
            self._client.setblocking(False)
            server.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(server, str(self._target))
            except OSError as error:
                log.error("the API does not take a connection: %s", error)
                return
            ways = [
                asyncio.create_task(self._carry_in(server)),
                asyncio.create_task(self._carry_out(server)),
            ]
            leaving = asyncio.create_task(self._leave())
            try:
                await asyncio.wait(ways)
            finally:
                for task in (*ways, leaving):
                    task.cancel()
                await asyncio.wait((*ways, leaving))

    def close(self) -> None:
        """Let go of it: `carry` has ended, or never began."""
        self._client.close()

    async def _carry_in(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # either side has gone: the end all the same
            while piece := await loop.sock_recv(self._client, _PIECE):
                frames = self._from_client.follow(piece)
                # Before gRPC has it: nobody may believe that nothing is under way.
                for each in frames:
                    if each.opens and each.stream > self._newest:
                        self._newest = each.stream
                        self.streams.add(each.stream)
                await loop.sock_sendall(server, piece)
                self._over(each.stream for each in frames if each.resets)
                if any(map(_is_answer, frames)):
                    self.heard = True
                    self._changed.set()
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    async def _carry_out(self, server: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while piece := await loop.sock_recv(server, _PIECE):
                async with self._writing:
                    frames = self._from_server.follow(piece)
                    rest = memoryview(piece)
                    if self._has_to_tell and (at := self._from_server.gap) is not None:
                        await loop.sock_sendall(self._client, rest[:at])
                        await self._tell()
                        rest = rest[at:]
                    await loop.sock_sendall(self._client, rest)
                self._over(each.stream for each in frames if each.closes)
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)

    async def _leave(self) -> None:
        """Tell the client, once it is to be; in the midst of a frame `_carry_out` does it."""
        await self.leaving.wait()
        with suppress(OSError):
            async with self._writing:
                if self._has_to_tell and self._from_server.lets_others_in:
                    await self._tell()

    @property
    def _has_to_tell(self) -> bool:
        return self.leaving.is_set() and not self._told

    async def _tell(self) -> None:
        self._told = True
        await asyncio.get_running_loop().sock_sendall(self._client, goaway() + ping(_MARK))

    def _over(self, streams: Iterable[int]) -> None:
        self.streams.difference_update(streams)
        self._changed.set()


def _is_answer(frame: Frame) -> bool:
    """To our PING. gRPC gets it, too, and passes over answers to what it has not asked."""
    return frame.kind == Kind.PING and bool(frame.flags & ACK) and frame.payload == _MARK
