"""Run: one command in a session's guest, as a stream of frames.

```
 start ─▶ started ─▶ stdout, stderr, flow, keepalive … ─▶ exit
```

It lives as long as its stream: whoever listens gone, or its time over, the guest sends it SIGTERM,
and 5 s later kills all that it started.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from stratabox.daemon.hypervisor.guest.exec_heard import (
    ExecStream,
    Heard,
    LostError,
    Output,
    Stream,
    Terminal,
)
from stratabox.daemon.hypervisor.guest.exec_wire import (
    Asked,
    Command,
    Ended,
    Flag,
    NotStarted,
    Room,
    Started,
    Where,
)
from stratabox.daemon.lifecycle.inside.accounts import Accounts
from stratabox.daemon.lifecycle.inside.commands import Commands, Wanted, explain
from stratabox.daemon.tenki.guest_paths import HOME, USER, absolute
from stratabox.storage.model.errors import InvalidArgumentError, NotFoundError
from stratabox.storage.model.states import SandboxState
from stratabox.tenki.v1 import data_plane_pb2 as pb

WINDOW = 256 << 10
"""Bytes of input that a caller may send ahead of what the command takes."""
KEEPALIVE_SECONDS = 10.0
_SLICE = 64 << 10
_END_OF_TRANSMISSION = b"\x04"
"""Ends input on a terminal: ^D."""

_SIGNALS = {
    pb.RunSignal.SIG_TERM: signal.SIGTERM,
    pb.RunSignal.SIG_KILL: signal.SIGKILL,
    pb.RunSignal.SIG_INT: signal.SIGINT,
    pb.RunSignal.SIG_HUP: signal.SIGHUP,
    pb.RunSignal.SIG_USR1: signal.SIGUSR1,
    pb.RunSignal.SIG_USR2: signal.SIGUSR2,
}
_SIGNALLED = 128
"""Exit code of what a signal has ended: this and its number, as a shell says."""
_NAMES = {
    signal.SIGHUP: "hangup", signal.SIGINT: "interrupt", signal.SIGQUIT: "quit",
    signal.SIGILL: "illegal instruction", signal.SIGTRAP: "trace/breakpoint trap",
    signal.SIGABRT: "aborted", signal.SIGBUS: "bus error",
    signal.SIGFPE: "floating point exception", signal.SIGKILL: "killed",
    signal.SIGUSR1: "user defined signal 1", signal.SIGSEGV: "segmentation fault",
    signal.SIGUSR2: "user defined signal 2", signal.SIGPIPE: "broken pipe",
    signal.SIGALRM: "alarm clock", signal.SIGTERM: "terminated",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs commands for `data_plane`."""

    commands: Commands
    accounts: Accounts

    async def run(
        self, start: pb.RunStart, requests: AsyncIterator[pb.RunRequest]
    ) -> AsyncGenerator[pb.RunResponse, None]:
        """What a command has to say, from `started` to `exit`.

        :param requests: what comes behind `start`.
        :raise StrataboxError: as `Commands.run`; InvalidArgumentError for a frame that cannot be.
        """
        wanted = _wanted(start)
        try:
            async with AsyncExitStack() as stack:
                begun = await self._begin(stack, start.session_id, wanted)
                if isinstance(begun.first, NotStarted):
                    for frame in _not_started(begun.first, wanted.command):
                        yield frame
                    return
                talk = _Talk(begun.stream, wanted.command.asked)
                frames = talk.frames(begun, requests)
                try:
                    async for frame in frames:
                        yield frame
                finally:
                    await frames.aclose()
        except LostError:
            if (cause := await self._cause(start.session_id)) is None:
                raise
            yield pb.RunResponse(
                exit=pb.RunExit(
                    exit_code=_SIGNALLED + signal.SIGKILL,
                    signal=_NAMES[signal.SIGKILL],
                    reason=f"session_terminated:{cause}",
                )
            )

    async def _begin(self, stack: AsyncExitStack, session: str, wanted: Wanted) -> _Begun:
        """Start it; where its guest has not the user or home that it is to have, they are made."""
        for last in (False, True):
            async with AsyncExitStack() as attempt:
                stream = await attempt.enter_async_context(self.commands.run(session, wanted))
                heard = aiter(stream)
                first = await anext(heard)
                if last or not _misses_home(first, wanted.command):
                    await stack.enter_async_context(attempt.pop_all())
                    return _Begun(stream, heard, first)
            await self.accounts.ensure(session, anew=True)
        raise AssertionError("the last attempt is what it is")

    async def _cause(self, session: str) -> str | None:
        """Why a session has no guest any more; None: that is not why the guest was lost."""
        try:
            _, record = await self.commands.guests.find(session)
        except NotFoundError:
            return "deleted"
        if record.state in (SandboxState.TERMINATING, SandboxState.TERMINATED):
            return "terminated"
        return None


@dataclass(frozen=True)
class _Begun:
    stream: ExecStream
    heard: AsyncIterator[Heard]
    first: Heard


@dataclass
class _Talk:
    """Both directions of one command that runs."""

    stream: ExecStream
    asked: Asked
    _granted: int = 0
    _grants: asyncio.Event = field(default_factory=asyncio.Event)
    _room: Room | None = None

    async def frames(
        self, begun: _Begun, requests: AsyncIterator[pb.RunRequest]
    ) -> AsyncGenerator[pb.RunResponse, None]:
        """All that is to be sent, in order."""
        window = WINDOW if self._reads else 0
        pid = begun.first.pid if isinstance(begun.first, Started) else 0
        yield pb.RunResponse(started=pb.RunStarted(pid=pid, stdin_window_bytes=window))
        feeding: asyncio.Future[None] = asyncio.ensure_future(self._feed(requests))
        granting: asyncio.Future[bool] = asyncio.ensure_future(self._grants.wait())
        coming: asyncio.Future[Heard] = asyncio.ensure_future(_next(begun.heard))
        try:
            while True:
                waited: set[asyncio.Future[object]] = {coming, granting}  # type: ignore[arg-type]
                if not feeding.done():
                    waited.add(feeding)  # type: ignore[arg-type]
                done, _ = await asyncio.wait(
                    waited, timeout=KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if feeding.done():
                    feeding.result()  # what was wrong with what the caller has sent
                if coming.done():
                    heard = coming.result()
                    if (frame := self._frame(heard)) is not None:
                        yield frame
                    if isinstance(heard, Ended):
                        return
                    coming = asyncio.ensure_future(_next(begun.heard))
                if granting.done():
                    yield self._grant()
                    granting = asyncio.ensure_future(self._grants.wait())
                if not done:
                    yield pb.RunResponse(keepalive=True)
        finally:
            tasks = (feeding, granting, coming)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _frame(self, heard: Heard) -> pb.RunResponse | None:
        match heard:
            case Output(stream=Stream.STDOUT):
                return pb.RunResponse(stdout=heard.data)
            case Output():
                return pb.RunResponse(stderr=heard.data)
            case Room():
                self._room = heard
            case Ended():
                return pb.RunResponse(exit=exited(heard, self._room))
        return None

    def _grant(self) -> pb.RunResponse:
        self._grants.clear()
        granted, self._granted = self._granted, 0
        return pb.RunResponse(flow=pb.RunFlowControl(stdin_grant_bytes=granted))

    async def _feed(self, requests: AsyncIterator[pb.RunRequest]) -> None:
        """Pass on what the caller sends, as fast as the command takes it."""
        async for request in requests:
            match request.WhichOneof("payload"):
                case "stdin" if self._reads:
                    await self._write(request.stdin)
                case "stdin_close":
                    await self._end_of_input()
                case "signal":
                    await self._signal(request.signal.signal)
                case what:
                    raise InvalidArgumentError(
                        f"a command that was started so takes no {what or 'empty frame'}",
                        field=what or "payload",
                    )
        await self._end_of_input()

    @property
    def _reads(self) -> bool:
        return Asked.INPUT in self.asked

    async def _end_of_input(self) -> None:
        if Asked.TERMINAL in self.asked:
            await self.stream.write(_END_OF_TRANSMISSION)
        elif self._reads:
            self.stream.end_of_input()

    async def _write(self, data: bytes) -> None:
        for at in range(0, len(data), _SLICE):
            await self.stream.write(data[at : at + _SLICE])
        # Told together: a flow frame for each key that is typed would be as much again.
        self._granted += len(data)
        if self._granted >= WINDOW // 4:
            self._grants.set()

    async def _signal(self, number: pb.RunSignal.Sig.ValueType) -> None:
        if number == pb.RunSignal.SIG_UNSPECIFIED:
            return  # no signal at all, by Tenki's contract
        if number not in _SIGNALS:
            raise InvalidArgumentError(f"there is no signal {number}", field="signal")
        await self.stream.signal(_SIGNALS[number])


def exited(how: Ended, room: Room | None) -> pb.RunExit:
    """How a command ended, as a message."""
    timed_out = Flag.TIMED_OUT in how.flags
    if timed_out:
        reason = "timeout"
    elif Flag.OUT_OF_MEMORY in how.flags:
        reason = "out_of_memory"
    else:
        reason = "signaled" if how.signal else "exit"
    least = room.least if room else 0
    return pb.RunExit(
        exit_code=_SIGNALLED + how.signal if how.signal else how.code,
        signal=signal_name(how.signal),
        timed_out=timed_out,
        duration_ms=int(min(how.duration, 1e9) * 1000),
        reason=reason,
        disk_total_bytes=room.total if room else 0,
        disk_available_bytes=room.available if room else 0,
        disk_min_available_bytes=0 if Flag.DISK_FULL in how.flags else least,
        disk_free_bytes=room.free if room else 0,
    )


def signal_name(number: int) -> str:
    """A signal as Tenki's guests say it; empty for none."""
    if not number:
        return ""
    return _NAMES.get(number, f"signal {number}")  # type: ignore[call-overload, no-any-return]


def _wanted(start: pb.RunStart) -> Wanted:
    asked = Asked.TOLD_FIRST | Asked.TELL_ROOM
    if start.stream_stdin or start.pty:
        asked |= Asked.INPUT
    if start.pty:
        asked |= Asked.TERMINAL
    command = Command(
        argv=[word.encode() for word in start.cmd],
        env={name: text.encode() for name, text in start.env.items()},
        cwd=absolute(start.cwd),
        user="root" if start.privileged else USER,
        timeout=start.timeout_ms / 1000 or None,
        asked=asked,
    )
    return Wanted(command, Terminal() if start.pty else None)


async def _next(heard: AsyncIterator[Heard]) -> Heard:
    return await anext(heard)


def _misses_home(first: Heard, command: Command) -> bool:
    match first:
        case NotStarted(where=Where.USER, error=errno.ENOENT):
            return command.user == USER
        case NotStarted(where=Where.FOLDER, error=errno.ENOENT):
            return command.cwd == HOME or command.cwd.startswith(f"{HOME}/")
    return False


def _not_started(failed: NotStarted, command: Command) -> list[pb.RunResponse]:
    """What is told of a command that could not be started: a line, and its end.

    :raise StrataboxError: as `explain`.
    """
    line, ended = explain(failed, command)
    words = line.data.decode(errors="replace").removeprefix("stratabox: ").strip()
    exit_ = exited(ended, None)
    exit_.reason = f"start_failed: {words}"
    exit_.errno = failed.error
    return [pb.RunResponse(stderr=line.data), pb.RunResponse(exit=exit_)]
