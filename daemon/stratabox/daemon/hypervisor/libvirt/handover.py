"""What the program that libvirt runs as QEMU asks the daemon for (`emulator.c` has the format).

One `Handover` is for one start: it listens under a name that nobody can guess before it is told to
libvirt, gives to the first who comes with the right uid, and then listens no more. So a libvirtd
that executes something long after the daemon has given up starts no guest.

The kernel tells both sides who the other one is. Those who come with another uid get nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from stratabox.daemon.hypervisor import process, sockets
from stratabox.storage.model.errors import FailedError

FIRST = 512
"""Number of the first descriptor in QEMU; libvirt's own are below."""
PATIENCE_SECONDS = 60.0

_MAGIC = 0x32786273
_HEAD = struct.Struct("<6I")
_PEER = struct.Struct("3i")
_IN_ONE_MESSAGE = 200
_SUFFIX = ".sock"
_LINE_MOST = 1024


class Handover:
    """Where one domain's emulator fetches its arguments and files; a context manager.

    :param folder: where the emulator lies, and the socket during the start.
    :param uid: that the emulator runs as.
    :param store_id: whose leftovers it is, should the daemon be killed meanwhile; see `sweep`.
    """

    def __init__(self, folder: Path, uid: int, store_id: str) -> None:
        self._uid = uid
        self._path = folder / f"{store_id}-{secrets.token_hex(16)}{_SUFFIX}"
        self._listening = sockets.listen(folder, self._path.name)
        try:
            self._listening.setblocking(False)
            if uid != os.geteuid():
                os.chown(self._path, uid, -1)
        except BaseException:
            self.close()
            raise
        self.pid: int | None = None
        """Of the process that all was given to, from the moment when that began. It is, or becomes,
        QEMU."""
        self.started = 0
        """Its start time."""

    def __enter__(self) -> Handover:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self._path.unlink(missing_ok=True)
        self._listening.close()

    @property
    def arguments(self) -> list[str]:
        """What has the emulator come here."""
        return ["-stratabox", self._path.name, str(os.geteuid())]

    async def give(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        descriptors: Sequence[int],
        walls: Sequence[str] = (),
        agree: Callable[[str], None] = lambda found: None,
    ) -> None:
        """Wait for the emulator and give it everything; on return it becomes QEMU.

        :param descriptors: known to QEMU by numbers from `FIRST` on; the last one is where its
            messages go.
        :param walls: that it is to build, as ``walls.h`` has them; none: none.
        :param agree: called with what it has found of these, as `emulator.c` says it; when this
            raises, it ends instead of becoming QEMU.
        :raise FailedError: QEMU_FAILED, when it goes away, or takes nothing.
        """
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listening)
            with connection:
                pid, uid, _ = _PEER.unpack(
                    connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
                )
                started = process.start_time(pid) if pid > 0 else None
                if uid != self._uid or started is None:
                    continue
                self.pid, self.started = pid, started
                try:
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        await _send(connection, walls, arguments, environment, descriptors)
                        agree(await _line(connection))
                        await loop.sock_sendall(connection, b"y")
                except OSError as error:
                    raise FailedError(
                        f"what libvirt ran as QEMU did not take its files: {error}.",
                        reason="QEMU_FAILED",
                    ) from error
                return


def sweep(folder: Path, store_id: str) -> None:
    """Remove what a killed daemon of this store has left. None of its starts is under way."""
    for each in folder.glob(f"{store_id}-*{_SUFFIX}"):
        each.unlink(missing_ok=True)


async def _send(
    connection: socket.socket,
    walls: Sequence[str],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Sequence[int],
) -> None:
    loop = asyncio.get_running_loop()
    words = [*walls, *arguments, *(f"{name}={value}" for name, value in environment.items())]
    text = b"".join(os.fsencode(word) + b"\0" for word in words)
    counts = (len(descriptors), len(walls), len(arguments), len(environment), len(text))
    head = _HEAD.pack(_MAGIC, *counts)
    await loop.sock_sendall(connection, head + text)
    for begin in range(0, len(descriptors), _IN_ONE_MESSAGE):
        await _writable(connection)
        socket.send_fds(connection, [b"f"], list(descriptors[begin : begin + _IN_ONE_MESSAGE]))


async def _line(connection: socket.socket) -> str:
    """What it answers: it has all files by then, which stay open in it when we close ours."""
    loop = asyncio.get_running_loop()
    line = b""
    while not line.endswith(b"\n"):
        piece = await loop.sock_recv(connection, _LINE_MOST)
        if not piece or len(line) > _LINE_MOST:
            raise ConnectionResetError("it ended")
        line += piece
    return process.printable(line.decode(errors="replace")).strip()


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(connection)
