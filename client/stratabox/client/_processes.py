"""The plans of `client.processes`, and how commands are asked for as streams."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any

from stratabox.client import _requests
from stratabox.client._plans import Call, Fold, Plan, Stream
from stratabox.client._requests import Seconds
from stratabox.client.errors import InternalError, InvalidArgumentError
from stratabox.client.process_records import (
    Printed,
    ProcessEnd,
    ProcessRecord,
    ProcessSignal,
    Terminal,
)
from stratabox.v1 import exec_pb2 as pb

SERVICE = "exec"
Words = str | Sequence[str | bytes]
"""A line for the guest's shell, or a program and its arguments as they are."""


def start(
    sandbox: str,
    command: Words,
    *,
    cwd: str | None = None,
    env: Mapping[str, str | bytes] | None = None,
    user: str | None = None,
    timeout: Seconds | None = None,
    stdin: bool = False,
    terminal: Terminal | bool = False,
    detach: bool = False,
) -> pb.ExecInput:
    """Make the first message. :raise InvalidArgumentError: when it cannot be sent."""
    shown = None
    if terminal:
        wanted = terminal if isinstance(terminal, Terminal) else Terminal()
        shown = pb.Terminal(
            term=wanted.term, size=pb.TerminalSize(columns=wanted.columns, rows=wanted.rows)
        )
    with _requests.checked():
        return pb.ExecInput(
            start=pb.ExecStart(
                sandbox=sandbox,
                argv=() if isinstance(command, str) else [_bytes(word) for word in command],
                shell=command if isinstance(command, str) else "",
                cwd=cwd or "",
                env={name: _bytes(value) for name, value in (env or {}).items()},
                user=user or "",
                timeout=_requests.duration(timeout),
                stdin=stdin,
                terminal=shown,
                detach=detach,
            )
        )


def signal(name: ProcessSignal | str) -> Any:
    """A signal as it is sent. :raise InvalidArgumentError: for one that cannot be."""
    try:
        which = ProcessSignal(name.removeprefix("SIG") if isinstance(name, str) else name)
    except ValueError:
        known = ", ".join(each.value for each in ProcessSignal)
        raise InvalidArgumentError(f"there is no signal {name!r}; there are {known}") from None
    return pb.Signal.Value(f"SIGNAL_{which.value}")


def resize(columns: int, rows: int) -> pb.ExecInput:
    """Make the message that a terminal has another size."""
    with _requests.checked():
        return pb.ExecInput(resize=pb.TerminalSize(columns=columns, rows=rows))


def end_of(message: pb.ExecExited) -> ProcessEnd:
    """Turn a message into how a command ended."""
    return ProcessEnd(
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        signal=message.signal if message.HasField("signal") else None,
        timed_out=message.timed_out,
        out_of_memory=message.out_of_memory,
        disk_full=message.disk_full,
        duration=message.duration.ToTimedelta(),
    )


def heard(message: pb.ExecOutput) -> Printed | ProcessEnd | pb.ExecStarted:
    """Turn a message from a command into what it says."""
    match message.WhichOneof("output"):
        case "stdout":
            return Printed("stdout", message.stdout, message.offset)
        case "stderr":
            return Printed("stderr", message.stderr, message.offset)
        case "gap":
            return Printed("gap", b"", message.offset, message.gap.bytes)
        case "exited":
            return end_of(message.exited)
        case "started":
            return message.started
    raise InternalError("the daemon sent an empty message")


class ProcessPlans:
    """Detached processes: commands that go on in a guest by themselves, and are found again.

    They outlive the daemon and the way to the guest, and end with a boot of it. What they print is
    kept in the guest's memory, the last MiB of each.
    """

    def start(
        self,
        sandbox: str,
        command: Words,
        *,
        cwd: str | None = None,
        env: Mapping[str, str | bytes] | None = None,
        user: str | None = None,
        timeout: Seconds | None = None,
    ) -> Plan[str]:
        """Start a process that goes on by itself, and return its id.

        Parameters as those of `sandbox.spawn`.

        :raise NoSpaceError: TOO_MANY_PROCESSES, when 64 of them run.
        """
        first = start(sandbox, command, cwd=cwd, env=env, user=user, timeout=timeout, detach=True)
        said: builtins.list[bytes] = []

        def step(message: pb.ExecOutput) -> str | None:
            got = heard(message)
            if isinstance(got, Printed):
                said.append(got.data)
            elif isinstance(got, ProcessEnd):
                words = b"".join(said).decode(errors="replace").strip()
                raise InvalidArgumentError(words or "the command could not be started")
            else:
                return got.process
            return None

        requests: Any = iter((first,))  # what the call wants, as it could take more than one
        return Fold(SERVICE, "Exec", requests, step)

    def list(self, sandbox: str) -> Plan[builtins.list[ProcessRecord]]:
        """List those whose output is still there, oldest first.

        :raise InvalidStateError: when the sandbox does not run.
        """
        with _requests.checked():
            request = pb.ListProcessesRequest(sandbox=sandbox)
        return Call(SERVICE, "ListProcesses", request, _records)

    def attach(
        self, sandbox: str, process: str, *, offset: int = 0, follow: bool = True
    ) -> Stream[Printed | ProcessEnd]:
        """Follow one: what it has printed from `offset` on, and what it prints, until its end.

        Ending the iteration leaves it alone.

        :param offset: Negative: so many bytes before the end.
        :param follow: False: end at what it has printed until now.
        :raise ProcessNotFoundError: when there is none.
        """
        with _requests.checked():
            request = pb.AttachProcessRequest(
                sandbox=sandbox, process=process, offset=offset, no_follow=not follow
            )

        def convert(message: pb.ExecOutput) -> Printed | ProcessEnd:
            got = heard(message)
            if isinstance(got, pb.ExecStarted):
                raise InternalError("the daemon said twice that it runs")
            return got

        return Stream(SERVICE, "AttachProcess", request, convert)

    def wait(self, sandbox: str, process: str) -> Plan[ProcessEnd]:
        """Wait until one has ended. :raise ProcessNotFoundError: when there is none."""
        with _requests.checked():
            request = pb.WaitProcessRequest(sandbox=sandbox, process=process)
        return Call(
            SERVICE, "WaitProcess", request, lambda message: end_of(message.exited), float("inf")
        )

    def signal(self, sandbox: str, process: str, signal: ProcessSignal | str) -> Plan[None]:
        """Send a signal to one; KILL goes to all that it has started.

        :raise ProcessNotFoundError: when there is none.
        """
        with _requests.checked():
            request = pb.SignalProcessRequest(
                sandbox=sandbox, process=process, signal=_signal(signal)
            )
        return Call(SERVICE, "SignalProcess", request, lambda message: None)


_signal = signal


def _records(message: pb.ListProcessesResponse) -> builtins.list[ProcessRecord]:
    return [
        ProcessRecord(
            id=each.id,
            started_in=each.started_in,
            inherited=each.inherited,
            argv=tuple(each.argv),
            user=each.user,
            pid=each.pid,
            started_at=each.started_at.ToDatetime(UTC),
            printed_bytes=each.printed_bytes,
            kept_from=each.kept_from,
            end=end_of(each.exited) if each.HasField("exited") else None,
        )
        for each in message.processes
    ]


def _bytes(word: str | bytes) -> bytes:
    return word if isinstance(word, bytes) else word.encode("utf-8", "surrogateescape")
