"""A guest's serial console: heard all the time, kept, handed to any number of followers.

```
 guest ──▶ QEMU ──socket──▶ reader ──▶ the last 256 KiB, in memory ──▶ followers, each at its place
                              │                    └──▶ the log on disk, by the flusher
                              └── no faster than `Limits.rate`: then it is the guest that waits
```

QEMU sends single bytes and waits when they are not taken, as a serial line does. So a guest that
floods its console is slowed down and costs next to nothing, once it has had its burst: whatever a
boot prints. A follower that is too slow loses the oldest bytes and is told how many.

One for each `Domain`. What a guest writes while no daemon is connected is lost; the log says where.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor import process, sockets
from stratabox.daemon.hypervisor.console_log import PIECE_BYTES, ConsoleLog
from stratabox.storage.model.errors import UnavailableError

log = logging.getLogger(__name__)

TAIL_BYTES = 64 << 10
"""Of the guest's last words in messages."""
RING_BYTES = 256 << 10
"""How far a follower may lag behind."""
WRITE_SECONDS = 5.0
"""How long the guest may take none of what is typed."""
GAP = b"\r\n[stratabox: no daemon was running here; what the guest wrote meanwhile is missing]\r\n"

_BURST_BYTES = 256 << 10
_PAUSE_SECONDS = 0.001
"""Between two reads: a byte at a time would take as many rounds of the loop."""
_FLUSH_SECONDS = 0.2
_TYPED_BYTES = 8 << 10
"""Of what is typed, waiting in the kernel for a guest that does not read."""


@dataclass(frozen=True)
class Limits:
    """How much a guest may write to its console, and how much of it is kept."""

    rate: int = 16 << 10
    """Bytes a second, after a burst of 256 KiB."""
    log: int = 512 << 10
    """Bytes on disk."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Heard:
    """The next bytes for a follower."""

    data: bytes
    lost: int = 0
    """Bytes before these that the follower was too slow for."""


class Console:
    """The console of the domain whose sockets lie in `folder`."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._log = ConsoleLog(folder, limits.log)
        self._socket: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._ring = bytearray()
        self._begin = 0
        """Place of the ring's first byte in all that was heard."""
        self._pending = bytearray()
        """Heard, and not in the log yet."""
        self._news = asyncio.Event()
        """Set, and replaced, when there is something for followers."""
        self._unwritten = asyncio.Event()
        self._written = asyncio.Event()
        self._filing = asyncio.Lock()
        self._typing = asyncio.Lock()
        self._is_failing = False
        self._ending: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """It is heard now."""
        return self._socket is not None

    async def open(self, line: socket.socket | None = None, *, fresh: bool) -> None:
        """Listen to the guest from now on.

        A domain of a daemon of before there were consoles has none; then it stays closed.

        :param line: the console's connection, where there is one; it is this console's now.
        :param fresh: nothing can have been missed.
        """
        try:
            if line is None or line.fileno() < 0:
                line = sockets.connect(self._folder, sockets.CONSOLE)
            self._socket = line
        except OSError as error:
            log.info("the console in %s cannot be had: %s", self._folder, error)
            return
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _TYPED_BYTES)
        if not fresh:
            await self._recall()
        self._tasks = [
            asyncio.create_task(self._read(self._socket), name=f"console {self._folder.name}"),
            asyncio.create_task(self._flush(), name=f"console log {self._folder.name}"),
        ]

    async def _recall(self) -> None:
        """Take up what an earlier daemon heard, and mark what none did."""
        try:
            before = await asyncio.to_thread(self._log.read)
        except OSError as error:
            log.warning("a console's log in %s cannot be read: %s", self._folder, error)
            return
        self._ring += before[-RING_BYTES:]
        if before and not before.endswith(GAP):
            self._hear(GAP)

    async def close(self) -> None:
        """Stop listening, once what is there was heard and kept; followers end. Idempotent."""
        self.catch_up()
        sock, self._socket = self._socket, None
        if sock is not None:
            self._ending = asyncio.ensure_future(self._end(sock))
        if self._ending is None:
            return
        try:
            await asyncio.shield(self._ending)
        except asyncio.CancelledError:
            await asyncio.wait((self._ending,))
            raise

    async def _end(self, sock: socket.socket) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:  # none where it was closed before it was quite open
            await asyncio.wait(self._tasks)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        async with self._typing:  # whoever types is woken by that, and ends
            sock.close()
        self._tell()
        async with self._filing:
            await self._file()

    def catch_up(self) -> None:
        """Hear what waits already, whatever the rate, as far as it may be asked for."""
        left = RING_BYTES
        while self._socket is not None and left > 0:
            try:
                data = self._socket.recv(min(left, PIECE_BYTES))
            except OSError:  # nothing waits, or it ended
                return
            if not data:
                return
            left -= len(data)
            self._hear(data)

    def tail(self) -> str:
        """The last 64 KiB that the guest wrote, made printable."""
        self.catch_up()
        return process.printable(bytes(self._ring[-TAIL_BYTES:]).decode(errors="replace"))

    async def kept(self) -> bytes:
        """All that the log has, up to this moment."""
        kept, _ = await self._kept()
        return kept

    async def follow(self, *, from_log: bool) -> AsyncGenerator[Heard, None]:
        """What the guest writes from now on, until the console is closed. Nothing comes first.

        :param from_log: all that is kept comes first, without a gap.
        """
        kept, at = b"", self._begin + len(self._ring)
        if from_log:
            kept, at = await self._kept()
        yield Heard(b"")
        for start in range(0, len(kept), PIECE_BYTES):
            yield Heard(kept[start : start + PIECE_BYTES])
        while True:
            lost = max(0, self._begin - at)
            at += lost
            place = at - self._begin
            data = bytes(self._ring[place : place + PIECE_BYTES])
            if data or lost:
                at += len(data)
                yield Heard(data, lost)
            elif self._socket is None:
                return
            else:
                await self._news.wait()

    async def write(self, data: bytes) -> None:
        """Type something. Returns when QEMU, or the little that may wait for it, has it.

        :raise UnavailableError: CONSOLE_UNAVAILABLE when it is closed, CONSOLE_NOT_READ when the
            guest does not read it; metadata `written` says how many bytes were taken.
        """
        written = 0
        async with self._typing:
            while written < len(data):
                sock = self._socket
                if sock is None:
                    raise _unavailable("the guest's console is not connected")
                try:
                    written += sock.send(data[written:])
                except BlockingIOError:
                    try:
                        async with asyncio.timeout(WRITE_SECONDS):
                            await _writable(sock)
                    except TimeoutError:
                        raise UnavailableError(
                            "nothing in the guest reads its console: it took none of the last"
                            f" {len(data) - written} bytes within {WRITE_SECONDS:g} s",
                            reason="CONSOLE_NOT_READ",
                            written=written,
                        ) from None
                except OSError as error:
                    raise _unavailable(f"the guest's console is gone: {error}") from error

    async def _kept(self) -> tuple[bytes, int]:
        """What the log has, and the place of what comes behind it."""
        async with self._filing:
            self.catch_up()
            await self._file()
            # Nothing is pending at this moment, and what comes from now on waits for `_filing`.
            at = self._begin + len(self._ring)
            return await asyncio.to_thread(self._log.read), at

    async def _read(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        allowed, before = float(_BURST_BYTES), loop.time()
        while True:
            try:
                data = await loop.sock_recv(sock, PIECE_BYTES)
            except OSError as error:
                log.info("the console in %s is lost: %s", self._folder, error)
                return
            if not data:
                return
            self._hear(data)
            while len(self._pending) >= RING_BYTES:  # a disk that hangs
                self._written.clear()
                await self._written.wait()
            now = loop.time()
            allowed = min(_BURST_BYTES, allowed + (now - before) * self._limits.rate) - len(data)
            before = now
            await asyncio.sleep(max(_PAUSE_SECONDS, -allowed / self._limits.rate))

    def _hear(self, data: bytes) -> None:
        self._ring += data
        if len(self._ring) > 2 * RING_BYTES:
            surplus = len(self._ring) - RING_BYTES
            del self._ring[:surplus]
            self._begin += surplus
        self._pending += data
        self._unwritten.set()
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _flush(self) -> None:
        while True:
            await self._unwritten.wait()
            async with self._filing:
                await self._file()
            await asyncio.sleep(_FLUSH_SECONDS)  # what comes byte by byte is written together

    async def _file(self) -> None:
        """Write what is pending. The caller holds `_filing`."""
        self._unwritten.clear()
        while self._pending:
            piece = bytes(self._pending[:PIECE_BYTES])
            del self._pending[:PIECE_BYTES]
            writing = asyncio.ensure_future(asyncio.to_thread(self._log.append, piece))
            try:
                await asyncio.shield(writing)
                self._is_failing = False
            except OSError as error:
                # The guest goes on, and so does what is in memory: only the file lacks it.
                if not self._is_failing:
                    log.warning("a console's log in %s cannot be written: %s", self._folder, error)
                self._is_failing = True
            except asyncio.CancelledError:
                await asyncio.wait((writing,))
                writing.exception()  # seen: it is told with the next piece, if there is one
                raise
        self._written.set()


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(sock.fileno(), tell)
    try:
        await ready
    finally:
        loop.remove_writer(sock.fileno())


def _unavailable(message: str) -> UnavailableError:
    return UnavailableError(message, reason="CONSOLE_UNAVAILABLE")
