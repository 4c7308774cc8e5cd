"""One command over a guest's channel: its output as it comes, its input, signals, its end.

```
 open ──▶ what it prints … ──▶ Ended | NotStarted ──▶ (nothing more)
   │                                   ▲
   └── close: it is killed, with all that it started, unless it had ended or was detached
```

What nobody asks for is not read: the channel's window fills, and the command waits in its write.
So one stream costs at most `WINDOW` and a little, whatever the guest prints.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import asyncssh
from asyncssh.constants import EXTENDED_DATA_STDERR

from stratabox.daemon.hypervisor.guest import channel_setup
from stratabox.daemon.hypervisor.guest.channel import Channel, has_ended
from stratabox.daemon.hypervisor.guest.exec_heard import (
    Heard,
    Hearing,
    LostError,
    Output,
    Stream,
    Terminal,
)
from stratabox.daemon.hypervisor.guest.exec_wire import (
    Asked,
    Command,
    Ended,
    Listener,
    NotStarted,
    new_token,
    request,
)
from stratabox.storage.model.errors import FailedError

WINDOW = 512 << 10
_PACKET = 32 << 10
_HIGH, _LOW = 320 << 10, 64 << 10
"""Bytes that wait to be taken: when the channel is read no more, and when it is again."""
_WRITE_HIGH = 256 << 10
_OPEN_SECONDS = 60.0

# A terminal that passes all bytes as they are, until the keeper has read what is asked of it.
_RAW = dict.fromkeys(
    (
        asyncssh.PTY_ECHO, asyncssh.PTY_ICANON, asyncssh.PTY_ISIG, asyncssh.PTY_IEXTEN,
        asyncssh.PTY_ICRNL, asyncssh.PTY_INLCR, asyncssh.PTY_IGNCR, asyncssh.PTY_IXON,
        asyncssh.PTY_IXOFF, asyncssh.PTY_IXANY, asyncssh.PTY_ISTRIP, asyncssh.PTY_OPOST,
    ),
    0,
) | {asyncssh.PTY_CS8: 1}  # fmt: skip


class ChannelStream:
    """An `ExecStream` over the channel. Made by `begin`."""

    def __init__(
        self, connection: asyncssh.SSHClientConnection, token: bytes, *, terminal: bool
    ) -> None:
        self._connection = connection
        self._terminal = terminal
        self._session = _Session(token, terminal=terminal)
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._over = False

    def __aiter__(self) -> AsyncIterator[Heard]:
        """What is heard, in order. :raise UnavailableError: CONNECTION_LOST."""
        return self._heard()

    async def write(self, data: bytes) -> None:
        """Give the command input; waits while it takes none. After its end nothing happens."""
        if self._channel is None or self._channel.is_closing():
            return
        try:
            self._channel.write(data)
        except BrokenPipeError:
            return
        await self._session.writable()

    def end_of_input(self) -> None:
        """Its standard input ends here. On a terminal nothing does: a ^D is what says so there."""
        if self._channel is not None and not self._terminal and not self._channel.is_closing():
            self._channel.write_eof()

    def resize(self, columns: int, rows: int) -> None:
        """Its terminal has another size."""
        if self._channel is not None and self._terminal and not self._channel.is_closing():
            self._channel.change_terminal_size(columns, rows)

    async def signal(self, number: signal.Signals) -> None:
        """Send a signal to its process group; KILL to all that it started. Waits for its start.

        :raise UnavailableError: CONNECTION_LOST.
        """
        await self._session.hearing.started.wait()
        if (started := self._session.hearing.said_started) is None or self._over:
            return
        # The keeper kills what the command has started, and tells its end.
        what = f"-TERM {started.keeper}" if number is signal.SIGKILL else _kill(number, started.pid)
        try:
            await self._connection.run(f"kill {what}", encoding=None)
        except (asyncssh.Error, OSError) as error:
            raise _lost(error) from error

    async def close(self) -> None:
        """Let go of it; a command that runs is killed by its keeper, which sees that."""
        self._session.give_up()
        if self._channel is not None:
            self._channel.abort()

    async def begin(self, command: str, asked: bytes, terminal: Terminal | None) -> None:
        """Ask for it. Its channel is closed if this raises."""
        shown: dict[str, Any] = {"request_pty": False}
        if terminal is not None:
            size = (terminal.columns, terminal.rows)
            shown = {"term_type": terminal.term, "term_size": size, "term_modes": _RAW}
        opening = asyncio.ensure_future(
            self._connection.create_session(
                lambda: self._session,
                command,
                encoding=None,
                window=WINDOW,
                max_pktsize=_PACKET,
                **shown,
            )
        )
        try:
            # Shielded: one that is given up half-way would be begun by the guest all the same.
            async with asyncio.timeout(_OPEN_SECONDS):
                channel, _ = await asyncio.shield(opening)
        except TimeoutError as error:
            opening.add_done_callback(_abort_late)
            raise LostError(
                f"the guest's sshd did not begin the command within {_OPEN_SECONDS:g} s"
            ) from error
        except asyncio.CancelledError:
            opening.add_done_callback(_abort_late)
            raise
        self._channel = channel
        channel.set_write_buffer_limits(high=_WRITE_HIGH)
        channel.write(asked)

    async def _heard(self) -> AsyncIterator[Heard]:
        ended: Ended | None = None
        async for heard in self._session.hearing.heard():
            if isinstance(heard, Ended):
                ended = heard  # last: what it has left behind may still print
                continue
            yield heard
            if isinstance(heard, NotStarted):
                self._over = True
                return
        self._over = True
        if ended is not None:
            yield ended
        elif not self._session.detached:
            raise _lost(self._session.error)


class _Session(asyncssh.SSHClientSession[bytes]):
    """What asyncssh calls when something comes."""

    def __init__(self, token: bytes, *, terminal: bool) -> None:
        self.hearing = Hearing(self._was_taken)
        self.error: Exception | None = None
        self.detached = False
        # The keeper speaks on stderr, which a terminal shows with stdout.
        self._speaks_on = Stream.STDOUT if terminal else Stream.STDERR
        self._listener = Listener(token)
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self._channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        stream = Stream.STDERR if datatype == EXTENDED_DATA_STDERR else Stream.STDOUT
        heard = self._listener.feed(data) if stream is self._speaks_on else [data]
        for each in heard:
            self.hearing.take(Output(stream, each) if isinstance(each, bytes) else each)
        if self.hearing.size > _HIGH and not self._paused and self._channel is not None:
            self._paused = True
            self._channel.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        if held := self._listener.end():
            self.hearing.take(Output(self._speaks_on, held))
        self.give_up()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def give_up(self) -> None:
        """Nothing comes any more, or nobody wants it."""
        self.hearing.end()
        self._writable.set()

    async def writable(self) -> None:
        await self._writable.wait()

    def _was_taken(self, size: int) -> None:
        if self._paused and self.hearing.size < _LOW and self._channel is not None:
            self._paused = False
            self._channel.resume_reading()


async def begin(
    channel: Channel,
    command: Command,
    *,
    sandbox: str,
    terminal: Terminal | None = None,
    job: str = "",
) -> ChannelStream:
    """Ask a guest to run a command that `exec_wire.check` has seen.

    :param job: id of a detached one.
    :raise StrataboxError: as `Channel.connection`.
    :raise UnavailableError: CONNECTION_LOST.
    """
    connection = await channel.connection()
    try:
        return await _begin(connection, command, sandbox, terminal, job)
    except (asyncssh.Error, OSError) as error:
        if not await has_ended(connection):
            raise _refused(error) from error
    # The connection had ended without a word, and nothing was asked of the guest yet.
    connection = await channel.connection()
    try:
        return await _begin(connection, command, sandbox, terminal, job)
    except (asyncssh.Error, OSError) as error:
        raise (_lost if await has_ended(connection) else _refused)(error) from error


async def _begin(
    connection: asyncssh.SSHClientConnection,
    command: Command,
    sandbox: str,
    terminal: Terminal | None,
    job: str,
) -> ChannelStream:
    token = new_token()
    stream = ChannelStream(connection, token, terminal=terminal is not None)
    stream._session.detached = Asked.DETACHED in command.asked
    try:
        await stream.begin(
            f"exec {channel_setup.keeper_path()} run",
            request(command, token, sandbox=sandbox, job=job),
            terminal,
        )
    except BaseException:
        await stream.close()
        raise
    return stream


def _abort_late(opening: asyncio.Future[Any]) -> None:
    """Let go of a command that nobody waits for any more, now that it has begun."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].abort()


def _kill(number: signal.Signals, pid: int) -> str:
    return f"-{number.name.removeprefix('SIG')} -{pid}"  # no "--": dash takes that for a process


def _refused(error: Exception) -> Exception:
    if isinstance(error, asyncssh.ChannelOpenError):
        return FailedError(f"the guest's sshd refused: {error.reason}", reason="CHANNEL_FAILED")
    return _lost(error)


def _lost(error: Exception | None) -> LostError:
    return LostError(
        "the way into the guest was lost, and with it the command: its sshd has ended, or the guest"
        f" has{f' ({error})' if error and str(error) else ''}"
    )
