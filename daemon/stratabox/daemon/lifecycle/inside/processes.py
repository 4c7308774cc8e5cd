"""Detached processes: commands that go on in guests by themselves, found and followed again.

The truth about them is in the guest, with their keepers (keeper_jobs.h); nothing is kept here. So
they live through the daemon's end and the channel's, and a copy of a guest's memory has them too.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import asyncssh

from stratabox.daemon.hypervisor.guest import channel_setup, exec_stream
from stratabox.daemon.hypervisor.guest.exec_heard import LostError, Output
from stratabox.daemon.hypervisor.guest.exec_wire import Asked, Command, Ended, NotStarted, Started
from stratabox.daemon.hypervisor.guest.process_wire import (
    ID_LETTERS,
    LIST_BYTES,
    DetachedProcess,
    Frames,
    Gap,
    Kept,
    NonsenseError,
    parse_list,
)
from stratabox.daemon.lifecycle.inside.commands import Commands, explain
from stratabox.storage.model.errors import DeniedError, FailedError, NotFoundError
from stratabox.storage.model.ids import SandboxId

_ANSWER_SECONDS = 60.0
_PIECE = 64 << 10
_NOT_THERE = 3
_FARTHEST = (1 << 62) - 1
_LATEST = 10**17
"""Offsets that the keeper can read have so many digits at most."""


@dataclass(frozen=True)
class Found:
    """The detached processes of one sandbox."""

    sandbox: SandboxId
    processes: list[DetachedProcess]


@dataclass(frozen=True)
class Processes:
    """The use cases."""

    commands: Commands

    async def start(
        self, reference: str, command: Command
    ) -> tuple[str, int] | tuple[Output, Ended]:
        """Start a command that goes on by itself: its id, and its process id in the guest.

        Or, of one that could not be started, what a shell would print and end with.

        :raise NoSpaceError: TOO_MANY_PROCESSES.
        :raise StrataboxError: as `Commands.run`.
        """
        guest, record, command = await self.commands.prepared(reference, command)
        name = secrets.token_hex(ID_LETTERS // 2)
        stream = await exec_stream.begin(
            guest.require_channel(),
            replace(command, asked=Asked.DETACHED),
            sandbox=record.id,
            job=name,
        )
        try:
            async for heard in stream:
                if isinstance(heard, Started):
                    return name, heard.pid
                if isinstance(heard, NotStarted):
                    return explain(heard, command)
        finally:
            await stream.close()
        raise FailedError("the guest did not say whether it started it", reason="EXEC_FAILED")

    async def list(self, reference: str) -> Found:
        """Those whose output is still there, oldest first.

        :raise StrataboxError: as `Commands.run`.
        """
        connection, sandbox = await self._connected(reference)
        async with _asked(connection, "list") as process:
            data = b""
            async with asyncio.timeout(_ANSWER_SECONDS):
                while piece := await process.stdout.read(_PIECE):
                    data += piece
                    if len(data) > LIST_BYTES:
                        raise NonsenseError("the list of its processes has no end")
            return Found(sandbox, parse_list(data))

    async def follow(
        self, reference: str, process: str, offset: int, *, to_its_end: bool
    ) -> AsyncGenerator[Kept | Gap | Ended]:
        """What one has printed from an offset on, and how it ended.

        :param offset: negative: so many bytes before the end.
        :raise NotFoundError: PROCESS_NOT_FOUND.
        :raise StrataboxError: as `Commands.run`.
        """
        name = await self._find(reference, process)
        connection, _ = await self._connected(reference)
        at = max(min(offset, _LATEST), -_LATEST)
        frames = Frames()
        async with _asked(connection, f"follow {name} {at} {'y' if to_its_end else 'n'}") as told:
            while piece := await told.stdout.read(_PIECE):
                for frame in frames.feed(piece):
                    yield frame
                    if isinstance(frame, Ended):
                        return
            await told.wait_closed()
            if told.returncode == _NOT_THERE:
                raise _none(process)
            if to_its_end:
                raise LostError("the way into the guest was lost; the process goes on")

    async def wait(self, reference: str, process: str) -> Ended:
        """Wait for one's end. :raise StrataboxError: as `follow`."""
        async for heard in self.follow(reference, process, _FARTHEST, to_its_end=True):
            if isinstance(heard, Ended):
                return heard
        raise AssertionError("followed to its end")

    async def signal(self, reference: str, process: str, number: signal.Signals) -> None:
        """Send one a signal; KILL to all that it has started. One that has ended takes none.

        :raise StrataboxError: as `follow`.
        """
        name = await self._find(reference, process)
        connection, _ = await self._connected(reference)
        async with _asked(connection, f"signal {name} {int(number)}") as told:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await told.wait_closed()
            if told.returncode == _NOT_THERE:
                raise _none(process)

    async def _find(self, reference: str, process: str) -> str:
        """The whole id of one."""
        fits = [
            each.id
            for each in (await self.list(reference)).processes
            if process and each.id.startswith(process)
        ]
        if len(fits) > 1 and process not in fits:
            raise DeniedError(
                f"{len(fits)} processes have ids that start with {process!r}: use more of it",
                reason="AMBIGUOUS_NAME",
            )
        if not fits:
            raise _none(process)
        return process if process in fits else fits[0]

    async def _connected(self, reference: str) -> tuple[asyncssh.SSHClientConnection, SandboxId]:
        guest, record = await self.commands.running(reference)
        return await guest.connection(), record.id


@asynccontextmanager
async def _asked(
    connection: asyncssh.SSHClientConnection, words: str
) -> AsyncIterator[asyncssh.SSHClientProcess[bytes]]:
    """Have the keeper asked something; what is left of that is closed with the context.

    :raise FailedError: CHANNEL_FAILED, for an answer that is none.
    :raise UnavailableError: CONNECTION_LOST.
    """
    command = f"exec {channel_setup.keeper_path()} jobs {words}"
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            process: asyncssh.SSHClientProcess[bytes] = await connection.create_process(
                command, encoding=None, window=exec_stream.WINDOW, request_pty=False
            )
        try:
            yield process
        finally:
            process.channel.abort()
    except NonsenseError as error:
        raise FailedError(
            f"what the guest says of its processes makes no sense: {error}", reason="CHANNEL_FAILED"
        ) from error
    except (TimeoutError, asyncssh.Error, OSError) as error:
        raise LostError(
            f"the guest did not answer about its processes ({str(error) or 'no time was left'})"
        ) from error


def _none(process: str) -> NotFoundError:
    return NotFoundError(
        f"there is no process {process!r} in the guest, or none any more",
        reason="PROCESS_NOT_FOUND",
        process=process,
    )
