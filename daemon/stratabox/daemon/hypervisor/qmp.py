"""One QMP connection, from greeting to hang-up: what qemu.qmp gives, made safe for a daemon.

Only `monitor` and the launchers (which wait for the first greeting) use this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from stratabox.daemon.hypervisor import sockets
from stratabox.storage.model.errors import FailedError, UnavailableError

GREETING_SECONDS = 10.0

_GREETING_BYTES = 64 << 10
_REPLY_BYTES = 64 << 20  # query-block of many deep chains is large

# Every loss of a connection ends in an error or a reconnection of ours; qemu.qmp logs each as an
# error of its own besides, also for guests that simply ended.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class ReplyLostError(UnavailableError):
    """A command was sent and no reply came: nobody knows whether it was run.

    :param name: the socket that it was sent to.
    """

    default_reason = "MONITOR_UNAVAILABLE"

    def __init__(self, message: str, *, name: str, command: str) -> None:
        super().__init__(message, command=command)
        self.name = name


class Connection:
    """A greeted connection to one of a domain's monitor sockets."""

    def __init__(self, client: QMPClient, sock: socket.socket, name: str) -> None:
        self._client = client
        self._sock = sock
        self.name = name

    @property
    def is_open(self) -> bool:
        """Commands can be sent."""
        return self._client.runstate is Runstate.RUNNING

    async def lost(self) -> None:
        """Wait until QEMU hangs up; all events that it sent before have been told then."""
        while self.is_open:
            await self._client.runstate_changed()

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None, seconds: float
    ) -> object:
        """Run a command and return what it returns.

        A cancelled call leaves the connection usable: qemu.qmp drops the late reply by its id.

        :raise FailedError: QEMU_FAILED, when QEMU refuses it; `command` and QEMU's words within.
        :raise ReplyLostError: when no reply came. The connection is of no use any more.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise FailedError(
                f"QEMU refused {command}: {error}", reason="QEMU_FAILED", command=command
            ) from error
        except TimeoutError:
            text = f"QEMU did not answer {command} within {seconds:g} s."
            raise ReplyLostError(text, name=self.name, command=command) from None
        except (QMPError, OSError, EOFError) as error:
            text = f"The connection to QEMU was lost during {command}."
            raise ReplyLostError(text, name=self.name, command=command) from error

    def send_descriptor(self, descriptor: int) -> None:
        """Send a descriptor, which the next add-fd takes.

        :raise ReplyLostError: when the connection does not take it.
        """
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            text = "QEMU's monitor does not take a file."
            raise ReplyLostError(text, name=self.name, command="add-fd") from error

    async def close(self) -> None:
        """Hang up; QEMU goes on running. Commands without a reply end in ReplyLostError."""
        # Never half-way: qemu.qmp would leave its tasks behind. It takes no time to speak of.
        ending = asyncio.ensure_future(_hang_up(self._client, self._sock))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await asyncio.wait((ending,))
            raise


async def connect(
    folder: Path,
    name: str,
    on_message: Callable[[Mapping[str, object]], None],
    seconds: float = GREETING_SECONDS,
) -> Connection:
    """Connect to one monitor socket and wait for its greeting.

    :param on_message: called with each event, in order, from the event loop.
    :raise OSError: when nobody listens, QEMU hangs up, or (TimeoutError) it does not greet, as
        while it serves another client on this socket.
    """
    client = QMPClient(readbuflen=_REPLY_BYTES)
    # qemu.qmp's own listener keeps every event for ever: let it hear none.
    client.events.names.add("")
    client.register_listener(_Teller(on_message))
    sock = sockets.connect(folder, name)
    try:
        async with asyncio.timeout(seconds):
            await client.connect(sock)
    except (QMPError, AssertionError) as error:  # AssertionError: lost while it was established
        await _hang_up(client, sock)
        raise ConnectionResetError(f"{folder / name}: no QMP greeting ({error})") from error
    except BaseException:
        await _hang_up(client, sock)
        raise
    return Connection(client, sock, name)


async def greet_all(folder: Path, seconds: float) -> None:
    """Wait until both monitors of a domain that starts have greeted.

    :raise OSError: as `connect`.
    """
    async with asyncio.timeout(seconds):
        await asyncio.gather(*(_greet(folder, name) for name in (sockets.RESCUE, sockets.MONITOR)))


async def _greet(folder: Path, name: str) -> None:
    """Connect, hear the greeting and hang up again: a QMP client would take ten times as long."""
    loop = asyncio.get_running_loop()
    with sockets.connect(folder, name) as sock:
        heard = b""
        while b"\n" not in heard:
            data = await loop.sock_recv(sock, _GREETING_BYTES)
            heard += data
            if not data or len(heard) > _GREETING_BYTES:
                raise ConnectionResetError(f"{folder / name}: no QMP greeting")


class _Teller(EventListener):
    """Hands each event on at once, and keeps none."""

    def __init__(self, on_message: Callable[[Mapping[str, object]], None]) -> None:
        super().__init__()
        self._on_message = on_message

    def accept(self, event: Message) -> bool:
        # Not called from here: an error in it would end qemu.qmp's reader.
        asyncio.get_running_loop().call_soon(self._on_message, event)
        return False


async def _hang_up(client: QMPClient, sock: socket.socket) -> None:
    # Shut down first: a QEMU that hangs would let disconnect() wait for ever to flush.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    # AssertionError and QueueFull: qemu.qmp 0.0.6 can trip over a reply that comes in while it
    # disconnects. ValueError: a line above the limit.
    with contextlib.suppress(
        OSError, EOFError, QMPError, AssertionError, asyncio.QueueFull, ValueError
    ):
        await client.disconnect()
    sock.close()
