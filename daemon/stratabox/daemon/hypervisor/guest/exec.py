"""Commands in the guest, by its agent: run, wait, or end with everything they started.

The agent can start a process and tell its output when it has ended, but it cannot end one. So each
command gets a marker in its environment and a session of its own, and a second command kills all
processes that have the marker, are of that session, or descend from such a one, until none is
left. (A process that empties its environment, starts a session *and* loses its parents escapes.)

A command begins by the program of `wake` where the guest has that, and else by a shell, which takes
longer and does the same.

`execute` returns when the command *and whatever holds its output* have ended, as a pipe would: a
background child that should outlive its command must redirect its output.

While an application snapshot is taken the agent refuses to start or ask anything; that is waited
out, and counts for the time-out.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stratabox.daemon.hypervisor.guest.agent import AgentRefusedError, GuestAgent
from stratabox.daemon.hypervisor.guest.agent_channel import AgentGoneError
from stratabox.daemon.hypervisor.guest.wake import PROGRAM
from stratabox.storage.model.errors import FailedError, InvalidArgumentError, UnavailableError

MARKER = "STRATABOX_EXEC"
DEFAULT_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
}
NO_DIRECTORY = 126
"""Exit code when `cwd` cannot be entered; stderr says so. As a shell's for "cannot execute"."""

_OUTPUT_BYTES = 48 << 20
"""The agent keeps 16 MiB of each stream, 4/3 of that as base64."""
_ARGUMENT_BYTES = 128 << 10
_ALL_BYTES = (2 << 20) - (16 << 10)
"""Linux: one argument and all of them with the environment (a quarter of the 8 MiB stack)."""
_FIRST_POLL, _LONGEST_POLL, _POLL_SHARE = 0.005, 0.25, 0.08
"""Seconds between two questions whether a command has ended, and that as a share of the time that
it has taken. Each question costs a guest without KVM some 2 ms."""
_START_SHARE = 0.3
"""Until the first question, as a share of the time that the guest took to start the command: one
that goes on from saved memory without KVM is as slow to end it, and has no time to be asked."""
_FROZEN_POLL = 0.1
_KILL_SECONDS = 30.0
_REPLY_SECONDS = 30.0
_REPORT_CHARACTERS = 300

_RUN = """\
cd -- "$1" || exit 126
shift
command -v setsid >/dev/null 2>&1 && exec setsid -- "$@"
exec "$@"
"""

# A script on standard input. Not "." alone: a shell ends where that finds nothing.
_TAKE = "command . /proc/self/fd/0\n"
_AFTER = "exec </dev/null\n"

# $1: marker, $2: session (0: not known). A round kills every process that has the marker, is of the
# session, or descends from such a one; the rounds end when there is none. Prints "done" then.
# Zombies cannot be killed and kernel threads (children of 2) are none of ours. The environment goes
# through tr because busybox's grep stops at the first NUL byte.
_KILL = """\
marker=$1 session=$2 round=0
while [ "$round" -lt 100 ]; do
  table='' doomed=' ' grown=yes
  for file in /proc/[0-9]*/stat; do
    { read -r line <"$file"; } 2>/dev/null || continue
    pid=${line%% *}
    set -- ${line##*) }
    if [ "$1" = Z ] || [ "$1" = X ] || [ "$2" = 2 ] || [ "$pid" = "$$" ]; then continue; fi
    table="$table$pid $2
"
    if [ "$session" != 0 ] && [ "$4" = "$session" ]; then
      doomed="$doomed$pid "
    elif { tr '\\0' '\\n' <"/proc/$pid/environ" | grep -qxF -e "$marker"; } 2>/dev/null; then
      doomed="$doomed$pid "
    fi
  done
  if [ "$doomed" = ' ' ]; then echo done; exit; fi
  while [ -n "$grown" ]; do
    grown=
    while read -r pid parent; do
      case "$doomed" in *" $pid "*) continue ;; esac
      case "$doomed" in *" $parent "*) doomed="$doomed$pid " grown=yes ;; esac
    done <<END
$table
END
  done
  kill -9 $doomed 2>/dev/null
  round=$((round + 1))
done
"""


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What is done in a guest before a command, or by itself.

    Each is asked for just before it is sent, and comes in on standard input: no list of the guest's
    processes shows it. It reports in the first line of its standard error: the marker (MARKER of
    its environment), a blank, the report.
    """

    script: Callable[[], bytes]
    """For the guest's shell."""
    orders: Callable[[], bytes] | None = None
    """For the program of `wake`, where it is in the guest; None: the shell is to do it."""


@dataclass(frozen=True, kw_only=True)
class ExecResult:
    """How a command ended."""

    exit_code: int | None
    """None when a signal ended it, or it was ended by its time-out."""
    signal: int | None
    """The signal that ended it."""
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    """The guest's agent keeps the first 16 MiB of each stream."""
    stderr_truncated: bool
    timed_out: bool
    """It was killed, with all that it started, and the output is what it wrote so far."""
    duration: float
    """Seconds, by the host's clock."""
    pid: int = 0
    """In the guest; 0: not known."""
    out_of_memory: bool = False
    """It was killed, and its guest's kernel has killed something for want of memory meanwhile."""
    disk_full: bool = False
    """It failed to write, and a disk of its guest is full."""
    first: str | None = None
    """What the errand that was done first reported; None: there was none, or it told nothing."""


async def execute(
    agent: GuestAgent,
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    timeout: float | None = None,
    first: Errand | None = None,
) -> ExecResult:
    """Run a command in the guest, as root, with nothing on its stdin.

    A command that does not exist ends with exit code 127, a `cwd` that does not with
    `NO_DIRECTORY`; stderr says which. When this call is cancelled, the command and all that it
    started are killed in the guest before the cancellation goes on (for at most 30 s).

    :param env: on top of `DEFAULT_ENVIRONMENT`.
    :param cwd: a relative one begins at "/".
    :param timeout: seconds after which the command is ended; a result with `timed_out`.
    :param first: is done before the command.
    :raise InvalidArgumentError: for no command at all, NUL bytes, text that is no Unicode, bad
        names of variables, or more arguments than Linux takes.
    :raise UnavailableError: AGENT_UNAVAILABLE, when the agent stops answering; the command may
        run on.
    :raise FailedError: AGENT_FAILED, when the agent refuses, as where it is told not to exec.
    """
    _check(argv, env or {}, cwd)
    value = str(uuid.uuid4())
    # Absolute: cd understands "-", and what CDPATH says, in ways of its own.
    command = [cwd if cwd.startswith("/") else f"/{cwd}", *argv]
    # PWD: as cd sets it. The last two are nobody else's to set.
    environment = {**DEFAULT_ENVIRONMENT, **(env or {}), "PWD": command[0], MARKER: value}
    request = {
        "path": "/bin/sh",
        "arg": ["-c", _TAKE + _AFTER + _RUN if first else _RUN, "sh", *command],
        "env": [f"{name}={word}" for name, word in environment.items()],
        "capture-output": True,
    }

    def make() -> Mapping[str, object]:
        if agent.has_program:
            given = _given(first.orders() if first and first.orders else b"")
            return request | {"path": PROGRAM, "arg": command} | given
        return request | _given(first.script() if first else b"")

    started = time.monotonic()
    pid = 0
    timed_out = False
    try:
        async with asyncio.timeout(timeout):
            pid = await _start(agent, make)
            status = await _wait(agent, pid, time.monotonic() - started)
    except TimeoutError:
        timed_out = True
        await _kill(agent, f"{MARKER}={value}", pid)
        status = await _wait_killed(agent, pid)
    except asyncio.CancelledError:
        await _kill_shielded(agent, f"{MARKER}={value}", pid)
        raise
    duration = time.monotonic() - started
    stdout, stderr = await asyncio.to_thread(_outputs, status)
    report, stderr = _report(value, stderr) if first else (None, stderr)
    return ExecResult(
        exit_code=None if timed_out else _integer(status.get("exitcode")),
        signal=_integer(status.get("signal")),
        stdout=stdout,
        stderr=stderr,
        stdout_truncated=bool(status.get("out-truncated")),
        stderr_truncated=bool(status.get("err-truncated")),
        timed_out=timed_out,
        duration=duration,
        pid=pid,
        first=report,
    )


async def run_errand(agent: GuestAgent, errand: Errand, seconds: float) -> str:
    """Have an errand done by itself, and return its report.

    :raise TimeoutError: when it has not ended by then; it may run on.
    :raise UnavailableError: AGENT_UNAVAILABLE, when the agent stops answering.
    :raise FailedError: AGENT_FAILED, when the agent refuses, or there is no report.
    """
    value = str(uuid.uuid4())
    request = {
        "path": "/bin/sh",
        "arg": ["-c", _TAKE],
        "env": [f"PATH={DEFAULT_ENVIRONMENT['PATH']}", f"{MARKER}={value}"],
        "capture-output": True,
    }

    def make() -> Mapping[str, object]:
        if agent.has_program and errand.orders is not None:
            return request | {"path": PROGRAM, "arg": []} | _given(errand.orders())
        return request | _given(errand.script())

    started = time.monotonic()
    async with asyncio.timeout(seconds):
        pid = await _start(agent, make)
        status = await _wait(agent, pid, time.monotonic() - started)
    report, stderr = _report(value, _outputs(status)[1])
    if report is None:
        words = stderr.decode(errors="replace").strip()[-300:]
        raise FailedError(
            f"the guest did not do it: {words or 'it said nothing'}", reason="AGENT_FAILED"
        )
    return report


def _check(argv: Sequence[str], env: Mapping[str, str], cwd: str) -> None:
    if not argv or not argv[0]:
        raise InvalidArgumentError("There is no command to run.")
    variables = [f"{name}={value}" for name, value in env.items()]
    sizes = []
    for text in (*argv, *variables, cwd):
        if "\0" in text:
            raise InvalidArgumentError("A command and its environment cannot hold NUL bytes.")
        try:
            sizes.append(len(text.encode()) + 1)
        except UnicodeEncodeError:
            raise InvalidArgumentError("A command and its environment must be Unicode.") from None
    for name in env:
        if not name or "=" in name:
            raise InvalidArgumentError(f"{name!r} is no name for an environment variable.")
    if max(sizes) > _ARGUMENT_BYTES:
        raise InvalidArgumentError(
            f"One argument or variable is longer than {_ARGUMENT_BYTES} bytes; write it to a file."
        )
    if sum(sizes) + 8 * len(sizes) > _ALL_BYTES:  # Linux counts the pointers too
        raise InvalidArgumentError(
            f"Arguments and environment are longer than {_ALL_BYTES} bytes together; "
            "write them to a file."
        )


def _given(data: bytes) -> dict[str, object]:
    """What a command is to read on its standard input; nothing: /dev/null."""
    return {"input-data": base64.b64encode(data).decode()} if data else {}


async def _start(agent: GuestAgent, make: Callable[[], Mapping[str, object]]) -> int:
    """Start a command. `make` gives the request, each time that it is sent."""
    while True:
        request = make()
        try:
            answer = await agent.execute("guest-exec", request, timeout=_REPLY_SECONDS)
        except AgentRefusedError as error:
            if "rgument list too long" in error.words:
                raise InvalidArgumentError(
                    "Arguments and environment are too long for the guest; write them to a file."
                ) from error
            if request["path"] == PROGRAM and PROGRAM in error.words:
                agent.has_program = False  # it is not there, or may not be run there
                continue
            if not await _is_frozen(agent, error):
                raise
            await asyncio.sleep(_FROZEN_POLL)
            continue
        pid = _integer(answer.get("pid")) if isinstance(answer, dict) else None
        if pid is None:
            raise AgentGoneError("The guest's agent started a command and did not say which.")
        return pid


async def _wait(agent: GuestAgent, pid: int, start: float = 0.0) -> Mapping[str, object]:
    """The last status of a command, when it has ended.

    :param start: seconds that it took to be started.
    """
    started = time.monotonic()
    if (pause := start * _START_SHARE) > _FIRST_POLL:
        await asyncio.sleep(min(pause, _LONGEST_POLL))
    while True:
        try:
            status = await agent.execute(
                "guest-exec-status", {"pid": pid}, timeout=_REPLY_SECONDS, limit=_OUTPUT_BYTES
            )
        except AgentRefusedError as error:
            if not await _is_frozen(agent, error):
                raise AgentGoneError(
                    "The guest's agent forgot the command: it, or the guest, was started again."
                ) from error
            await asyncio.sleep(_FROZEN_POLL)
            continue
        if not isinstance(status, dict):
            raise AgentGoneError("The guest's agent does not say how a command does.")
        if status.get("exited"):
            return status
        pause = (time.monotonic() - started) * _POLL_SHARE
        await asyncio.sleep(min(max(pause, _FIRST_POLL), _LONGEST_POLL))


async def _is_frozen(agent: GuestAgent, error: AgentRefusedError) -> bool:
    """Whether a refusal only means that file systems are frozen just now."""
    if error.kind != "CommandNotFound":
        return False
    # Agents before 6.1 do not say why they refuse.
    return "frozen" in error.words or await agent.fsfreeze_status() == "frozen"


async def _wait_killed(agent: GuestAgent, pid: int) -> Mapping[str, object]:
    if not pid:
        return {}
    try:
        async with asyncio.timeout(_KILL_SECONDS):
            return await _wait(agent, pid)
    except TimeoutError:
        raise AgentGoneError(
            "A command was killed, but something still holds its output."
        ) from None


async def _kill_shielded(agent: GuestAgent, marker: str, pid: int) -> None:
    killing = asyncio.ensure_future(_kill(agent, marker, pid))
    try:
        await asyncio.shield(killing)
    except asyncio.CancelledError:
        await asyncio.wait((killing,))  # cancelled twice: the guest must be clean all the same
    except UnavailableError:
        return  # the guest is gone or deaf; the caller's cancellation is what counts


async def _kill(agent: GuestAgent, marker: str, session: int) -> None:
    """Kill all that a command started; return when nothing of it is left.

    :raise UnavailableError: AGENT_UNAVAILABLE, when that cannot be done in time.
    """
    request = {
        "path": "/bin/sh",
        "arg": ["-c", _KILL, "sh", marker, str(session)],
        "env": [f"PATH={DEFAULT_ENVIRONMENT['PATH']}"],
        "capture-output": True,
    }
    try:
        async with asyncio.timeout(_KILL_SECONDS):
            while True:
                status = await _wait(agent, await _start(agent, lambda: request))
                if _outputs(status)[0].strip() == b"done":
                    return
    except TimeoutError:
        raise AgentGoneError(
            f"What a command started could not be ended within {_KILL_SECONDS:g} s."
        ) from None


def _outputs(status: Mapping[str, object]) -> tuple[bytes, bytes]:
    try:
        return (
            base64.b64decode(str(status.get("out-data", ""))),
            base64.b64decode(str(status.get("err-data", ""))),
        )
    except ValueError as error:  # no base64, or no ASCII at all
        raise AgentGoneError("The guest's agent sent output that makes no sense.") from error


def _report(marker: str, stderr: bytes) -> tuple[str | None, bytes]:
    """The report at the head of a standard error, and what is left of that."""
    line, end, rest = stderr.partition(b"\n")
    words = line.decode(errors="replace").removeprefix(f"{marker} ")
    if not end or not line.startswith(f"{marker} ".encode()):
        return None, stderr
    return words[:_REPORT_CHARACTERS], rest


def _integer(value: object) -> int | None:
    """A number that there can be of such; None for anything else that a guest may say."""
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else None
