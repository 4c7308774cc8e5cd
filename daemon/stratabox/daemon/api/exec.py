"""ExecService."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from grpc.aio import ServicerContext

from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.hypervisor.guest.exec_heard import ExecStream, Output, Stream, Terminal
from stratabox.daemon.hypervisor.guest.exec_wire import (
    Asked,
    Command,
    Ended,
    Flag,
    NotStarted,
    Room,
    Started,
)
from stratabox.daemon.hypervisor.guest.process_wire import DetachedProcess, Gap, Kept
from stratabox.daemon.lifecycle.inside.commands import Commands, Wanted, explain
from stratabox.daemon.lifecycle.inside.processes import Processes
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import SandboxId
from stratabox.v1 import exec_pb2 as pb
from stratabox.v1 import exec_pb2_grpc

Context = ServicerContext[Any, Any]

FIRST_SECONDS = 30.0
"""How long a caller may take to say what is to be run."""
_MOST_CHARACTERS = 65535
_ARGV_BYTES = 1024

SIGNALS = {
    pb.SIGNAL_TERM: signal.SIGTERM,
    pb.SIGNAL_KILL: signal.SIGKILL,
    pb.SIGNAL_INT: signal.SIGINT,
    pb.SIGNAL_HUP: signal.SIGHUP,
    pb.SIGNAL_USR1: signal.SIGUSR1,
    pb.SIGNAL_USR2: signal.SIGUSR2,
}


@dataclass(frozen=True, kw_only=True)
class ExecServicer(exec_pb2_grpc.ExecServiceServicer):
    """Messages in, one command, messages out."""

    commands: Commands
    processes: Processes

    @streaming
    async def Exec(
        self, request_iterator: AsyncIterator[pb.ExecInput], context: Context
    ) -> AsyncIterator[pb.ExecOutput]:
        """Run a command."""
        start = await _first(request_iterator)
        wanted = _wanted(start)
        if start.detach:
            for message in await self._detached(start.sandbox, wanted.command):
                yield message
            return
        async with self.commands.run(start.sandbox, wanted) as stream:
            feed = _feed(request_iterator, stream, wanted)
            feeding = asyncio.create_task(feed, name="exec input")
            try:
                async for heard in stream:
                    if feeding.done() and not feeding.cancelled():
                        feeding.result()  # what was wrong with what the caller has sent
                    for message in _messages(heard, wanted.command):
                        yield message
            finally:
                feeding.cancel()
                await asyncio.wait((feeding,))

    @unary
    async def ListProcesses(
        self, request: pb.ListProcessesRequest, context: Context
    ) -> pb.ListProcessesResponse:
        """List detached processes."""
        found = await self.processes.list(request.sandbox)
        return pb.ListProcessesResponse(
            processes=[_process(each, found.sandbox) for each in found.processes]
        )

    @streaming
    async def AttachProcess(
        self, request: pb.AttachProcessRequest, context: Context
    ) -> AsyncIterator[pb.ExecOutput]:
        """Follow a detached process."""
        following = self.processes.follow(
            request.sandbox, request.process, request.offset, to_its_end=not request.no_follow
        )
        async with aclosing(following):
            async for heard in following:
                yield _followed(heard)

    @unary
    async def WaitProcess(
        self, request: pb.WaitProcessRequest, context: Context
    ) -> pb.WaitProcessResponse:
        """Wait for a detached process."""
        ended = await self.processes.wait(request.sandbox, request.process)
        return pb.WaitProcessResponse(exited=exited(ended))

    @unary
    async def SignalProcess(
        self, request: pb.SignalProcessRequest, context: Context
    ) -> pb.SignalProcessResponse:
        """Send a detached process a signal."""
        number = SIGNALS.get(request.signal)
        if number is None:
            raise InvalidArgumentError(f"there is no signal {request.signal}", field="signal")
        await self.processes.signal(request.sandbox, request.process, number)
        return pb.SignalProcessResponse()

    async def _detached(self, sandbox: str, command: Command) -> list[pb.ExecOutput]:
        match await self.processes.start(sandbox, command):
            case str(name), int(pid):
                return [pb.ExecOutput(started=pb.ExecStarted(process=name, pid=pid))]
            case Output() as line, Ended() as ended:
                return [pb.ExecOutput(stderr=line.data), pb.ExecOutput(exited=exited(ended))]
        raise AssertionError("it was started or not")


async def _first(requests: AsyncIterator[pb.ExecInput]) -> pb.ExecStart:
    try:
        async with asyncio.timeout(FIRST_SECONDS):
            first = await anext(aiter(requests), None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("input") != "start":
        raise InvalidArgumentError("the first message must say what to start", field="start")
    return first.start


def _wanted(start: pb.ExecStart) -> Wanted:
    if bool(start.argv) == bool(start.shell):
        raise InvalidArgumentError("name the command once: as argv or as shell", field="argv")
    has_terminal = start.HasField("terminal")
    if start.detach and (start.stdin or has_terminal):
        raise InvalidArgumentError(
            "a detached process has neither input nor a terminal", field="detach"
        )
    asked = Asked(0)
    if start.stdin or has_terminal:
        asked |= Asked.INPUT
    if has_terminal:
        asked |= Asked.TERMINAL
    if start.detach:
        asked |= Asked.DETACHED
    command = Command(
        argv=list(start.argv) or [b"/bin/sh", b"-c", start.shell.encode()],
        env=dict(start.env),
        cwd=start.cwd,
        user=start.user,
        timeout=convert.seconds_from(start.timeout, "timeout") or None,
        asked=asked,
    )
    return Wanted(command, _terminal(start.terminal) if has_terminal else None)


def _terminal(given: pb.Terminal) -> Terminal:
    term = given.term or Terminal.term
    if not term.isascii() or not term.isprintable() or len(term) > 64:
        raise InvalidArgumentError(f"{term[:64]!r} is no kind of terminal", field="terminal.term")
    if not given.HasField("size"):
        return Terminal(term)
    return Terminal(term, *_size(given.size))


def _size(size: pb.TerminalSize) -> tuple[int, int]:
    if not (0 < size.columns <= _MOST_CHARACTERS and 0 < size.rows <= _MOST_CHARACTERS):
        raise InvalidArgumentError(
            f"a terminal cannot be of {size.columns} times {size.rows} characters", field="size"
        )
    return size.columns, size.rows


async def _feed(requests: AsyncIterator[pb.ExecInput], stream: ExecStream, wanted: Wanted) -> None:
    """Pass on what the caller sends, as fast as the command takes it."""
    reads = Asked.INPUT in wanted.command.asked
    async for message in requests:
        match message.WhichOneof("input"):
            case "stdin" if reads:
                await stream.write(message.stdin)
            case "end_of_input" if reads:
                stream.end_of_input()
            case "resize" if wanted.terminal is not None:
                stream.resize(*_size(message.resize))
            case "signal" if message.signal in SIGNALS:
                await stream.signal(SIGNALS[message.signal])
            case "signal":
                raise InvalidArgumentError(f"there is no signal {message.signal}", field="signal")
            case what:
                raise InvalidArgumentError(
                    f"a command that was started so takes no {what or 'empty message'}",
                    field=what or "input",
                )
    if reads:
        stream.end_of_input()


def _messages(
    heard: Output | Started | NotStarted | Room | Ended, command: Command
) -> list[pb.ExecOutput]:
    match heard:
        case Room():
            return []  # nobody asks for it here
        case Started():
            return [pb.ExecOutput(started=pb.ExecStarted(pid=heard.pid))]
        case Output(stream=Stream.STDOUT):
            return [pb.ExecOutput(stdout=heard.data)]
        case Output():
            return [pb.ExecOutput(stderr=heard.data)]
        case Ended():
            return [pb.ExecOutput(exited=exited(heard))]
        case NotStarted():
            line, ended = explain(heard, command)
            return [pb.ExecOutput(stderr=line.data), pb.ExecOutput(exited=exited(ended))]


def _followed(heard: Kept | Gap | Ended) -> pb.ExecOutput:
    match heard:
        case Kept(stream=Stream.STDOUT):
            return pb.ExecOutput(stdout=heard.data, offset=heard.offset)
        case Kept():
            return pb.ExecOutput(stderr=heard.data, offset=heard.offset)
        case Gap():
            return pb.ExecOutput(gap=pb.OutputGap(bytes=heard.lost))
        case Ended():
            return pb.ExecOutput(exited=exited(heard))


def _process(found: DetachedProcess, sandbox: SandboxId) -> pb.Process:
    started = Timestamp()
    started.FromNanoseconds(found.started_at_ns)
    shown, left = [], _ARGV_BYTES
    for word in found.argv:
        shown.append(word[:left])
        left -= len(word)
        if left <= 0:
            break
    return pb.Process(
        id=found.id,
        started_in=found.started_in,
        inherited=found.started_in != sandbox,
        argv=shown,
        user=found.user,
        pid=found.pid,
        started_at=started,
        printed_bytes=found.printed,
        kept_from=found.kept_from,
        exited=exited(found.ended) if found.ended else None,
    )


def exited(how: Ended) -> pb.ExecExited:
    """How a command ended, as a message."""
    timed_out = Flag.TIMED_OUT in how.flags
    return pb.ExecExited(
        exit_code=None if how.signal or timed_out else how.code,
        signal=how.signal or None,
        timed_out=timed_out,
        out_of_memory=Flag.OUT_OF_MEMORY in how.flags,
        disk_full=Flag.DISK_FULL in how.flags,
        duration=convert.duration(timedelta(seconds=min(how.duration, 1e9))),
    )
