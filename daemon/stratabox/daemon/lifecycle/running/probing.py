"""Readiness probes: what is sound, and one try of one.

`readiness` tries again and again, and writes down what comes of it. Ports and HTTP are asked for
from inside the guest, on its loopback: over the channel where it has sshd, else through its agent.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import asyncssh

from stratabox.daemon.hypervisor import process
from stratabox.daemon.hypervisor.guest import checks
from stratabox.daemon.hypervisor.guest import exec as guest_exec
from stratabox.daemon.hypervisor.guest.identity import errand
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, StrataboxError
from stratabox.storage.model.probes import Probe
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState

if TYPE_CHECKING:
    from stratabox.daemon.lifecycle.running.guest import Guest

SHORTEST, LONGEST = 0.1, 3600.0
LONGEST_START = 86400.0
FINE = range(200, 400)
"""Statuses of HTTP that pass."""

_PATH = re.compile(r"/[\x21-\x7e]*")
_PATH_BYTES = 2048
_COMMAND_BYTES = 32 << 10
_OUTPUT_CHARACTERS = 500
_ANSWER_BYTES = 4096
_STATUS = re.compile(r"HTTP/\d(?:\.\d)? (\d{3})\b")
_HERE = "127.0.0.1"


def check(probe: Probe) -> Probe:
    """:raise InvalidArgumentError: INVALID_ARGUMENT, for a probe that cannot be."""
    if probe.argv and probe.port:
        _refuse("checks a command or a port, not both", "readiness_probe")
    if probe.argv and (not probe.argv[0] or any("\0" in word for word in probe.argv)):
        _refuse("has a command that is empty or holds a NUL character", "readiness_probe.command")
    if sum(len(word.encode()) for word in probe.argv) > _COMMAND_BYTES:
        _refuse(f"has a command of more than {_COMMAND_BYTES} bytes", "readiness_probe.command")
    if probe.port and probe.port not in range(1, 65536):
        _refuse(f"names port {probe.port}, which is not within 1-65535", "readiness_probe.port")
    if probe.path and (len(probe.path) > _PATH_BYTES or not _PATH.fullmatch(probe.path)):
        _refuse(
            f'asks for {probe.path[:40]!r}: a path begins with "/" and is percent-encoded,'
            f" {_PATH_BYTES} bytes at most",
            "readiness_probe.http.path",
        )
    for field, value, longest in (
        ("interval", probe.interval, LONGEST),
        ("timeout", probe.timeout, LONGEST),
        ("start_period", probe.start_period, LONGEST_START),
    ):
        least = 0.0 if field == "start_period" else SHORTEST
        if value is not None and not least <= value <= longest:
            _refuse(
                f"has {field} {value:g} s, which is not within {least:g}-{longest:g} s",
                f"readiness_probe.{field}",
            )
    return probe


async def attempt(guest: Guest, probe: Probe) -> str:
    """Try once; "" when it passed, else why not, in words for people."""
    sandbox = await guest.record()
    if sandbox.state is not SandboxState.RUNNING:
        return f"the sandbox is {sandbox.state}"
    try:
        if probe.argv:
            return await _run(guest, sandbox, probe)
        if not probe.path:
            return await _knock(guest, probe)
        return await _ask(guest, probe)
    except StrataboxError as error:
        return error.message


async def _run(guest: Guest, sandbox: Sandbox, probe: Probe) -> str:
    agent, debt = guest.require_agent(), guest.telling.first()
    result = None
    try:
        result = await guest_exec.execute(
            agent,
            probe.argv,
            env=sandbox.env,
            cwd=sandbox.env.get("HOME", "/root"),
            timeout=probe.timeout,
            first=errand() if debt else None,
        )
    finally:
        if debt:
            await guest.telling.heard(agent, debt, result)
    if result.exit_code == 0:
        return ""
    if result.timed_out:
        ended = f"was killed after {probe.timeout:g} s"
    elif result.signal is not None:
        ended = f"was ended by signal {result.signal}"
    else:
        ended = f"exited with code {result.exit_code}"
    printed = (result.stderr or result.stdout)[-4 * _OUTPUT_CHARACTERS :]
    words = process.printable(printed.decode(errors="replace")).strip()[-_OUTPUT_CHARACTERS:]
    return f"the command {ended}: {words}" if words else f"the command {ended} and printed nothing"


async def _knock(guest: Guest, probe: Probe) -> str:
    connection = await _channel(guest)
    if connection is None:
        if await checks.port_listens(guest.require_agent(), probe.port, probe.timeout):
            return ""
        return f"nothing listens on port {probe.port}"
    try:
        async with asyncio.timeout(probe.timeout):
            _, writer = await connection.open_connection(_HERE, probe.port)
            writer.channel.abort()
    except TimeoutError:
        return f"port {probe.port} did not take a connection within {probe.timeout:g} s"
    except (asyncssh.Error, OSError) as error:
        return f"port {probe.port} takes no connection: {_words(error)}"
    return ""


async def _ask(guest: Guest, probe: Probe) -> str:
    what = f"GET {probe.path} on port {probe.port}"
    connection = await _channel(guest)
    try:
        if connection is None:
            agent = guest.require_agent()
            line = await checks.http_status_line(agent, probe.port, probe.path, probe.timeout)
        else:
            async with asyncio.timeout(probe.timeout):
                line = await _status_line(connection, probe)
    except TimeoutError:
        return f"{what} was not answered within {probe.timeout:g} s"
    except LookupError as error:
        return f"{what} cannot be asked: {error}"
    except (asyncssh.Error, OSError) as error:
        return f"{what}: {_words(error)}"
    status = _STATUS.match(line)
    if status is None:
        said = process.printable(line)[:80]
        return f"{what} was answered with {said!r}" if said else f"{what} was not answered"
    return "" if int(status[1]) in FINE else f"{what} was answered with status {status[1]}"


async def _status_line(connection: asyncssh.SSHClientConnection, probe: Probe) -> str:
    reader, writer = await connection.open_connection(_HERE, probe.port)
    try:
        writer.write(
            f"GET {probe.path} HTTP/1.1\r\nHost: localhost:{probe.port}\r\n"
            "User-Agent: stratabox\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b""
        while b"\n" not in answer and len(answer) < _ANSWER_BYTES:
            piece = await reader.read(_ANSWER_BYTES)
            if not piece:
                break
            answer += piece
        return answer.partition(b"\n")[0][:_ANSWER_BYTES].decode(errors="replace").strip()
    finally:
        writer.channel.abort()


async def _channel(guest: Guest) -> asyncssh.SSHClientConnection | None:
    """The guest's channel; None where it has none.

    :raise StrataboxError: when it cannot be had just now.
    """
    try:
        return await guest.connection()
    except DeniedError as error:
        if error.reason in ("NO_SSHD", "NO_CHANNEL"):
            return None
        raise


def _words(error: BaseException) -> str:
    return process.printable(str(error))[:200] or type(error).__name__


def _refuse(what: str, field: str) -> None:
    raise InvalidArgumentError(f"the readiness probe {what}", field=field)
