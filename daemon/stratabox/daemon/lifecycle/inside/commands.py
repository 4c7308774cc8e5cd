"""Commands in guests as streams, and the processes that are left behind in them."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from stratabox.daemon.hypervisor.guest import exec_stream, exec_wire
from stratabox.daemon.hypervisor.guest.exec_heard import ExecStream, Output, Stream, Terminal
from stratabox.daemon.hypervisor.guest.exec_wire import Asked, Command, Ended, NotStarted, Where
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.storage.model.errors import (
    FailedError,
    NoSpaceError,
    NotFoundError,
    UnavailableError,
)
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

NOT_FOUND, NOT_USABLE = 127, 126
"""Exit codes of what cannot be run, as a shell's."""


@dataclass(frozen=True)
class Wanted:
    """A command as a caller wants it."""

    command: Command
    terminal: Terminal | None = None


@dataclass(frozen=True)
class Commands:
    """The use cases."""

    guests: Guests

    @asynccontextmanager
    async def run(self, reference: str, wanted: Wanted) -> AsyncIterator[ExecStream]:
        """A command in a sandbox; if it still runs when the context ends, it is killed.

        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise InvalidArgumentError: for a command that cannot be.
        :raise DeniedError: INVALID_STATE, NO_SSHD, NO_CHANNEL, AMBIGUOUS_NAME.
        :raise FailedError: CHANNEL_FAILED.
        :raise UnavailableError: AGENT_UNAVAILABLE, CHANNEL_UNAVAILABLE, CONNECTION_LOST.
        """
        guest, record, command = await self._checked(reference, wanted.command)
        stream: ExecStream | None = None
        if wanted.terminal is None and Asked.DETACHED not in command.asked:
            stream = await _by_port(guest, record, command)
        if stream is None:
            await _up_to_date(guest)
            stream = await exec_stream.begin(
                guest.require_channel(), command, sandbox=record.id, terminal=wanted.terminal
            )
        try:
            yield stream
        finally:
            await stream.close()

    async def prepared(self, reference: str, command: Command) -> tuple[Guest, Sandbox, Command]:
        """A guest that can be given a command, and the command with its sandbox's env. As `run`."""
        guest, record, command = await self._checked(reference, command)
        await _up_to_date(guest)
        return guest, record, command

    async def _checked(self, reference: str, command: Command) -> tuple[Guest, Sandbox, Command]:
        guest, record = await self.running(reference)
        its_own = {name: text.encode() for name, text in record.env.items()}
        command = replace(command, env=its_own | dict(command.env))
        exec_wire.check(command)
        return guest, record, command

    async def running(self, reference: str) -> tuple[Guest, Sandbox]:
        """The guest of a sandbox that runs and is ready. As `run`."""
        guest, record = await self.guests.find(reference)
        policy.require_state(record, SandboxState.RUNNING, action="execute a command in")
        if not guest.is_ready:
            raise UnavailableError(
                f"the agent of sandbox {record.name!r} has not answered since its start:"
                " wait until it is ready",
                reason="AGENT_UNAVAILABLE",
                sandbox=guest.id,
            )
        return guest, record


async def _by_port(guest: Guest, record: Sandbox, command: Command) -> ExecStream | None:
    """A command in a guest that goes on from saved memory and has no channel yet; None: by that.

    The guest knows what time it is before the command begins.

    :raise UnavailableError: CONNECTION_LOST, AGENT_UNAVAILABLE.
    """
    port = guest.exec_port
    if port is None or not port.is_of_use:
        return None
    agent, debt = guest.require_agent(), guest.telling.first()
    begun = None
    try:
        begun = await port.begin(command, sandbox=record.id, tell=debt is not None)
    finally:
        if begun is None and debt is not None:
            guest.telling.soon(agent)
    if begun is None:
        return None
    stream, missed, seconds = begun
    try:
        if debt is not None:
            await guest.telling.brought(agent, debt, missed, seconds)
    except BaseException:
        guest.telling.soon(agent)
        await stream.close()
        raise
    return stream


async def _up_to_date(guest: Guest) -> None:
    """Return when a guest that goes on from saved memory knows what time it is; and connect."""
    telling = asyncio.create_task(guest.tell_now(), name="tell now")
    try:
        await guest.connection()
        await telling
    finally:
        telling.cancel()
        await asyncio.wait((telling,))


def explain(failed: NotStarted, command: Command) -> tuple[Output, Ended]:
    """What a shell would print and end with, of a command that could not be started.

    :raise NotFoundError: USER_NOT_FOUND.
    :raise NoSpaceError: TOO_MANY_PROCESSES.
    :raise FailedError: AGENT_FAILED-like trouble in the guest, as no memory: EXEC_FAILED.
    """
    words = os.strerror(failed.error)
    name = command.argv[0].decode(errors="replace")
    match failed.where:
        case Where.USER if failed.error == errno.ENOENT:
            raise NotFoundError(f"the guest has no user {command.user!r}", reason="USER_NOT_FOUND")
        case Where.FOLDER:
            text, code = f"{command.cwd}: {words}", NOT_USABLE
        case Where.PROGRAM if failed.error == errno.ENOENT:
            text, code = f"{name}: not found", NOT_FOUND
        case Where.PROGRAM if failed.error not in (errno.ENOMEM, errno.EAGAIN):
            text, code = f"{name}: {words}", NOT_USABLE
        case Where.JOB if failed.error == errno.EDQUOT:
            raise NoSpaceError(
                "the guest has too many detached processes: end some, or wait for them",
                reason="TOO_MANY_PROCESSES",
            )
        case _:
            raise FailedError(f"the guest could not start {name!r}: {words}", reason="EXEC_FAILED")
    line = Output(Stream.STDERR, f"stratabox: {text}\n".encode())
    return line, Ended(code, 0, exec_wire.Flag(0), 0.0)
