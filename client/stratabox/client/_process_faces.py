"""Commands as streams, for both faces: what callers hold while one runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from stratabox.client import _processes, _wire
from stratabox.client._dial import _Outgoing
from stratabox.client._processes import heard
from stratabox.client.errors import InternalError, StrataboxError
from stratabox.client.port_errors import ConnectionLostError
from stratabox.client.process_records import Printed, ProcessEnd, ProcessSignal
from stratabox.v1 import exec_pb2 as pb

PIECE = 64 << 10


def _pieces(data: bytes) -> Iterator[pb.ExecInput]:
    view = memoryview(data)
    for at in range(0, len(view), PIECE):
        yield pb.ExecInput(stdin=bytes(view[at : at + PIECE]))


class Process:
    """A command that runs in a guest. One thread may iterate while another writes.

    Iterating gives what it prints as it comes. Where nobody does, the command waits as soon as some
    hundred KiB are on the way. Closing it kills the command, if it still runs. Made by
    `sandbox.spawn`.
    """

    def __init__(self, rpc: Callable[[Iterator[Any]], Any], first: pb.ExecInput, at: str) -> None:
        self._address = at
        outgoing: Any = first
        self._outgoing = _Outgoing(outgoing)
        self._call = rpc(self._outgoing)
        self._call.add_callback(self._outgoing.give_up)
        self._ahead: list[Printed] = []
        #: How it ended; None until that was heard.
        self.end: ProcessEnd | None = None
        #: Its process id in the guest; 0 for one that could not be started.
        self.pid = 0
        try:
            while self.end is None:
                got = self._next()
                if isinstance(got, pb.ExecStarted):
                    self.pid = got.pid
                    break
                if isinstance(got, Printed):
                    self._ahead.append(got)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Printed]:
        """What it prints, until its end.

        :raise ConnectionLostError: when the guest, or the daemon, is gone; and the command with it.
        """
        while self._ahead:
            yield self._ahead.pop(0)
        while self.end is None:
            got = self._next()
            if isinstance(got, Printed):
                yield got

    def write(self, data: bytes) -> None:
        """Give it input, all of it; waits while it takes none. After its end nothing happens."""
        for piece in _pieces(data):
            self._send(piece)

    def close_stdin(self) -> None:
        """Let its standard input end here."""
        self._send(pb.ExecInput(end_of_input=pb.EndOfInput()))

    def send_signal(self, signal: ProcessSignal | str) -> None:
        """Send a signal, as "TERM", to its process group; KILL to all that it has started."""
        self._send(pb.ExecInput(signal=_processes.signal(signal)))

    def kill(self) -> None:
        """Kill it, and all that it has started."""
        self.send_signal(ProcessSignal.KILL)

    def resize(self, columns: int, rows: int) -> None:
        """Tell it that its terminal has another size."""
        self._send(_processes.resize(columns, rows))

    def wait(self) -> ProcessEnd:
        """Return how it ended. What it prints meanwhile, and has not been iterated, is dropped."""
        for _ in self:
            pass
        assert self.end is not None
        return self.end

    def communicate(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """Give it all of its input, and return all that it prints on stdout and on stderr."""
        if data:
            self.write(data)
        self._outgoing.end()
        printed: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        for piece in self:
            printed[piece.stream].append(piece.data)
        return b"".join(printed["stdout"]), b"".join(printed["stderr"])

    def close(self) -> None:
        """Let go of it; if it still runs, it is killed."""
        self._outgoing.give_up()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, message: Any) -> None:
        self._outgoing.put(message)

    def _next(self) -> Printed | ProcessEnd | pb.ExecStarted:
        try:
            message = next(self._call, None)
        except grpc.RpcError as error:
            raise _unpacked(error, self._address) from error
        got = _understood(message)
        if isinstance(got, ProcessEnd):
            self.end = got
            self._outgoing.give_up()
        return got


class AsyncProcess:
    """A command that runs in a guest. One task may iterate while another writes. See `Process`."""

    def __init__(self, call: Any, at: str) -> None:
        self._call = call
        self._address = at
        self._sends = True
        self._ahead: list[Printed] = []
        #: How it ended; None until that was heard.
        self.end: ProcessEnd | None = None
        #: Its process id in the guest; 0 for one that could not be started.
        self.pid = 0

    @classmethod
    async def open(cls, rpc: Callable[[], Any], first: pb.ExecInput, at: str) -> Self:
        """Start it.

        :raise StrataboxError: what `sandbox.spawn` tells.
        """
        self = cls(rpc(), at)
        try:
            await self._send(first)
            while self.end is None:
                got = await self._next()
                if isinstance(got, pb.ExecStarted):
                    self.pid = got.pid
                    break
                if isinstance(got, Printed):
                    self._ahead.append(got)
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aiter__(self) -> AsyncIterator[Printed]:
        """What it prints, until its end.

        :raise ConnectionLostError: when the guest, or the daemon, is gone; and the command with it.
        """
        while self._ahead:
            yield self._ahead.pop(0)
        while self.end is None:
            got = await self._next()
            if isinstance(got, Printed):
                yield got

    async def write(self, data: bytes) -> None:
        """Give it input, all of it; waits while it takes none. After its end nothing happens."""
        for piece in _pieces(data):
            await self._send(piece)

    async def close_stdin(self) -> None:
        """Let its standard input end here."""
        await self._send(pb.ExecInput(end_of_input=pb.EndOfInput()))

    async def send_signal(self, signal: ProcessSignal | str) -> None:
        """Send a signal, as "TERM", to its process group; KILL to all that it has started."""
        await self._send(pb.ExecInput(signal=_processes.signal(signal)))

    async def kill(self) -> None:
        """Kill it, and all that it has started."""
        await self.send_signal(ProcessSignal.KILL)

    async def resize(self, columns: int, rows: int) -> None:
        """Tell it that its terminal has another size."""
        await self._send(_processes.resize(columns, rows))

    async def wait(self) -> ProcessEnd:
        """Return how it ended. What it prints meanwhile, and has not been iterated, is dropped."""
        async for _ in self:
            pass
        assert self.end is not None
        return self.end

    async def communicate(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """Give it all of its input, and return all that it prints on stdout and on stderr."""
        feeding = asyncio.create_task(self._feed(data))
        printed: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        try:
            async for piece in self:
                printed[piece.stream].append(piece.data)
        finally:
            feeding.cancel()
            await asyncio.wait((feeding,))
        return b"".join(printed["stdout"]), b"".join(printed["stderr"])

    async def close(self) -> None:
        """Let go of it; if it still runs, it is killed."""
        self._sends = False
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _feed(self, data: bytes) -> None:
        await self.write(data)
        if self._sends and not self._call.done():
            self._sends = False
            await self._call.done_writing()

    async def _send(self, message: pb.ExecInput) -> None:
        if not self._sends or self.end is not None:
            return
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError:  # the call is over; iterating tells why
            self._sends = False
        except grpc.RpcError as error:
            raise _unpacked(error, self._address) from error

    async def _next(self) -> Printed | ProcessEnd | pb.ExecStarted:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise _unpacked(error, self._address) from error
        got = _understood(None if message is grpc.aio.EOF else message)
        if isinstance(got, ProcessEnd):
            self.end = got
        return got


def _understood(message: pb.ExecOutput | None) -> Printed | ProcessEnd | pb.ExecStarted:
    if message is None:
        raise InternalError("the daemon did not say how the command ended")
    return heard(message)


def _unpacked(error: grpc.RpcError, address: str) -> StrataboxError:
    call: Any = error
    if call.code() is grpc.StatusCode.CANCELLED and not _wire.is_dropped(call):
        return ConnectionLostError("the command was closed")
    return _wire.unpack(error, address)
