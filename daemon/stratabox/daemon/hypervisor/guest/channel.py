"""The channel: one SSH connection into a guest, over a port of its own, made when it is needed.

No network is in it: QEMU's socket is the wire, and in the guest ``sshd -i`` sits at its other end
(`channel_setup`). Everything that streams goes through it: commands, files, ports.

```
 none ──connection()──▶ hears sshd's banner ──▶ connected ──┐ the guest's sshd ends, the guest
   ▲                        │ hears nothing: hangs up, has  │ is reset, QEMU ends, close()
   │                        ▼ the guest told, tries again   │
   └──────────────────── told ◀─────────────────────────────┘
```

*Two ports.* On each an sshd waits with all its loading done, which takes an emulated guest 0.2 s.
What goes on from saved memory is spoken to through the one that its source was not: at once.

*A port has no instances.* The sshd of a guest that goes on from saved memory belongs to a
connection that is gone; QEMU tells the guest so, it ends, and the next one takes its place. Whoever
connects before it has ended hears nothing. So the banner is waited for, with growing patience,
before a word is said; what the last sshd had left in the queue comes before it, and is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncssh

from stratabox.daemon.hypervisor import sockets
from stratabox.daemon.hypervisor.guest import channel_keys, channel_setup
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.channel_keys import ChannelKeys
from stratabox.storage.model.errors import DeniedError, UnavailableError

log = logging.getLogger(__name__)
logging.getLogger("asyncssh").setLevel(logging.ERROR)  # it tells of every channel

CONNECT_SECONDS = 60.0
"""How long a caller waits at most."""
_PATIENCE, _LONGEST_PATIENCE = 2.0, 16.0
"""Until a port that says nothing is given up, at first and at last."""
_HEAD_START = 0.5
"""Of the port that is tried first."""
_GAP = 0.05
_LONGEST_GAP = 2.0
"""Between hanging up and calling again, at first and at last: the guest must have seen it."""
_LOGIN_SECONDS = 30.0
_BANNER = b"SSH-2.0-"
_STALE_BYTES = 1 << 20
"""What a last sshd can have left in QEMU's and the kernel's queues, at most."""
_REKEY_BYTES = 1 << 40
_NUDGE_SECONDS = 2.0
"""Linux (virtio_console) can forget to wake an sshd for what has come (onepoll.c). More that comes
wakes it. So for an sshd that does without that cure silence is broken after so long."""
_NEVER = 1 << 30  # a guest that is paused answers none
_LONGEST_BANNER = 255


class ChannelUnavailableError(UnavailableError):
    """The guest's sshd does not answer. CHANNEL_UNAVAILABLE."""

    default_reason = "CHANNEL_UNAVAILABLE"


class _StrangeError(Exception):
    """Who answers was not told by this daemon, with these keys."""


_STRANGE = (_StrangeError, asyncssh.PermissionDenied, asyncssh.HostKeyNotVerifiable)


class Channel:
    """The channel of the guest whose sockets lie in `folder`.

    Any number of callers may use its connection at once.

    :param keys: folder of the store's keys (`channel_keys`).
    :param exists: its machine has the ports.
    :param by_port: and the one that commands go by without it (`exec_port`).
    :param first: which of them is tried first.
    :param moved: called with the other one when it is spoken to through that instead, from then on.
    """

    def __init__(
        self,
        folder: Path,
        keys: Path,
        agent: GuestAgent,
        *,
        exists: bool,
        by_port: bool = False,
        first: int = 0,
        moved: Callable[[int], None] = lambda port: None,
    ) -> None:
        self._folder = folder
        self._keys = keys
        self._agent = agent
        self._exists = exists
        self._by_port = by_port
        self._ports = (first, 1 - first)
        self._port = first
        self._moved = moved
        self._connection: asyncssh.SSHClientConnection | None = None
        self._making: asyncio.Task[asyncssh.SSHClientConnection] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._made = asyncio.Event()
        self._closed = False

    @property
    def is_connected(self) -> bool:
        """There is a connection that is in order, as far as is known."""
        return self._connection is not None and not self._connection.is_closed()

    async def connection(self) -> asyncssh.SSHClientConnection:
        """The connection; made where there is none. It stays the channel's: never close it.

        :raise DeniedError: NO_SSHD, where the guest has none; NO_CHANNEL, where its machine is of
            before there were channels; INVALID_STATE, after `close`.
        :raise FailedError: CHANNEL_FAILED, where it could not be set up in the guest; AGENT_FAILED.
        :raise UnavailableError: CHANNEL_UNAVAILABLE, when the guest's sshd does not answer within
            `CONNECT_SECONDS`; AGENT_UNAVAILABLE, when its agent does not, which must set it up.
        """
        if self._connection is not None and not self._connection.is_closed():
            return self._connection
        if not self._exists:
            raise DeniedError(
                "the guest's machine is of before there was a channel to its sshd: stop the sandbox"
                " and start it, or restore its snapshot cold",
                reason="NO_CHANNEL",
            )
        if self._closed:
            raise DeniedError("the sandbox is not running")
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make(), name=f"channel {self._folder.name}")
            self._making.add_done_callback(_seen)
        # Shielded: one who goes away must not take it from the others who wait.
        return await asyncio.shield(self._making)

    def tell_soon(self) -> None:
        """Have a guest that has booted given what it needs, in the background."""
        if self._exists and not self._closed:
            self._telling = asyncio.create_task(self._tell(), name=f"tell {self._folder.name}")
            self._telling.add_done_callback(_seen)

    def connect_soon(self) -> None:
        """Connect in the background, to have it ready; failure is for who needs it to hear."""
        makes = self._making is not None and not self._making.done()
        if self._exists and not self._closed and not self.is_connected and not makes:
            self._making = asyncio.create_task(self._make(), name=f"channel {self._folder.name}")
            self._making.add_done_callback(_seen)

    async def made(self) -> None:
        """Return when there is a connection."""
        while not self.is_connected:
            await self._made.wait()
            self._made.clear()

    def port_closed(self, number: int) -> None:
        """The guest's sshd on that port has ended (event `ChannelPort`).

        QEMU holds the line all the same, and the next sshd would be heard as the last one.
        """
        if number == self._port:
            self._drop()

    def was_reset(self) -> None:
        """The guest starts over."""
        self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    async def close(self) -> None:
        """Hang up, for good. What runs over it ends with errors of its own."""
        self._closed = True
        tasks = [task for task in (self._making, self._telling) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
            await connection.wait_closed()

    async def _tell(self, *, anew: bool = False) -> None:
        keys = await asyncio.to_thread(channel_keys.load, self._keys)
        await channel_setup.tell(self._agent, keys, anew=anew, by_port=self._by_port)

    async def _make(self) -> asyncssh.SSHClientConnection:
        deadline = time.monotonic() + CONNECT_SECONDS
        if self._telling is not None:
            telling, self._telling = self._telling, None
            await telling
        keys = await asyncio.to_thread(channel_keys.load, self._keys)
        patience, gap, told = _PATIENCE, _GAP, False
        while True:
            left = deadline - time.monotonic()
            try:
                connection = await self._try(keys, min(patience, max(left, _GAP)))
            except (TimeoutError, OSError, asyncssh.Error, _StrangeError) as error:
                log.info("channel %s: %s", self._folder.name, error or "nothing is heard")
                if time.monotonic() + gap >= deadline:
                    raise ChannelUnavailableError(
                        f"the guest's sshd did not answer within {CONNECT_SECONDS:g} s"
                        f" ({error or 'it says nothing'}); 'stratabox sandbox exec' without streams"
                        " goes by its agent"
                    ) from error
                # A key that is refused, from either side: it was told by another store.
                strange = isinstance(error, _STRANGE)
                if not told or strange:
                    await self._tell(anew=strange)
                    told = True
                patience = min(patience * 2, _LONGEST_PATIENCE)
                await asyncio.sleep(gap)
                gap = min(gap * 2, _LONGEST_GAP)  # floods fail at once, each time
            else:
                self._connection = connection
                self._made.set()
                return connection

    async def _try(self, keys: ChannelKeys, patience: float) -> asyncssh.SSHClientConnection:
        begun = time.monotonic()
        async with asyncio.timeout(patience):
            port, sock, banner = await self._find_sshd()
        heard = time.monotonic()
        try:
            if channel_setup.mark(keys).encode() not in banner:
                raise _StrangeError("its sshd was told by another daemon")
            async with asyncio.timeout(_LOGIN_SECONDS):
                connection = await asyncssh.connect(sock=sock, **_options(keys))
        except BaseException:
            sock.close()
            raise
        self._port = port
        if port != self._ports[0]:
            self._ports = (port, 1 - port)
            self._moved(port)
        log.debug(
            "channel %s: port %d, heard after %.0f ms, connected after %.0f ms more",
            self._folder.name, port, (heard - begun) * 1e3, (time.monotonic() - heard) * 1e3,
        )  # fmt: skip
        return connection

    async def _find_sshd(self) -> tuple[int, socket.socket, bytes]:
        """The port where an sshd is heard first; where the first one says nothing, both are tried.

        :raise OSError: when QEMU is gone.
        """
        tries: dict[asyncio.Task[bytes], tuple[int, socket.socket]] = {}
        async with AsyncExitStack() as undo:
            for number in self._ports:
                sock = sockets.connect(self._folder, sockets.CHANNELS[number])
                undo.callback(sock.close)
                hearing = asyncio.create_task(_hear_banner(sock), name="hear sshd")
                undo.push_async_callback(_ended, hearing)
                tries[hearing] = number, sock
                last = number == self._ports[-1]
                done, _ = await asyncio.wait(
                    tries, timeout=None if last else _HEAD_START, return_when=FIRST_COMPLETED
                )
                for heard in done:
                    banner = heard.result()
                    number, sock = tries.pop(heard)
                    kept = sock.dup()  # the others are closed, and what was this one
                    return number, kept, banner
        raise AssertionError("the last one is waited for")


def _options(keys: ChannelKeys) -> dict[str, Any]:
    return {
        "host": "guest",
        "config": None,
        "known_hosts": ([keys.host.convert_to_public()], [], []),
        "username": "root",
        "client_keys": [keys.client],
        "preferred_auth": "publickey",
        "agent_path": None,
        "gss_host": None,
        "host_based_auth": False,
        "server_host_key_algs": ["ssh-ed25519"],
        "kex_algs": ["curve25519-sha256"],
        "encryption_algs": [channel_setup.CIPHER],
        "mac_algs": [channel_setup.MAC],
        "compression_algs": ["none"],
        "rekey_bytes": _REKEY_BYTES,
        "keepalive_interval": _NUDGE_SECONDS,
        "keepalive_count_max": _NEVER,
        "login_timeout": _LOGIN_SECONDS,
    }


async def _ended(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    await asyncio.wait((task,))


async def _hear_banner(sock: socket.socket) -> bytes:
    """The banner of a fresh sshd, which is still to be read when this returns.

    :raise OSError: when QEMU hangs up, or says too much else.
    """
    loop = asyncio.get_running_loop()
    dropped = 0
    while dropped < _STALE_BYTES:
        # Peeked at: asyncssh wants to read it too.
        seen = await _peek(loop, sock)
        at = seen.find(_BANNER)
        if at == 0:
            end = seen.find(b"\n", 0, _LONGEST_BANNER)
            if end > 0 or len(seen) >= _LONGEST_BANNER:
                return seen[: max(end, 0)]
        stale = at if at > 0 else max(len(seen) - len(_BANNER) + 1, 0) if at < 0 else 0
        if stale:
            dropped += len(sock.recv(stale))
        else:
            await asyncio.sleep(0.005)  # the start of one, perhaps: peeking would not wait for more
    raise OSError("the port is full of what is no sshd's")


async def _peek(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    while True:
        try:
            seen = sock.recv(65536, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(loop, sock)
        else:
            if not seen:
                raise ConnectionResetError("QEMU has hung up")
            return seen


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)


async def has_ended(connection: asyncssh.SSHClientConnection) -> bool:
    """Whether a connection has ended, when something that was asked by it has just failed.

    asyncssh raises ChannelOpenError both for what a guest refuses and for what it cannot answer any
    more, and `is_closed` knows of an end only once the event loop has run what was queued for it.
    """
    await asyncio.sleep(0)
    return connection.is_closed()


def _seen(task: asyncio.Task[object]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.debug("%s ended with %r", task.get_name(), task.exception())
