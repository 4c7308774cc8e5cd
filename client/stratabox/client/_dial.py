"""Connections into guests, for both faces: what callers hold, and how it is carried by gRPC.

Each direction ends by itself: `write_eof` tells the guest that no more comes, and b"" from `read`
that the guest sends no more.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc
import grpc.aio

from stratabox.client import _requests, _wire
from stratabox.client._ports import Target, endpoint_of
from stratabox.client.errors import InternalError, StrataboxError
from stratabox.client.port_errors import ConnectionLostError
from stratabox.v1 import ports_pb2 as pb

PIECE = 64 << 10
_AHEAD = 8
"""Messages that wait to be sent before `write` waits."""


def to_target(sandbox: str, target: Target) -> pb.DialRequest:
    """Ask for what listens in a guest. :raise InvalidArgumentError: when it cannot be."""
    with _requests.checked():
        start = pb.DialStart(sandbox=sandbox, endpoint=endpoint_of(target))
    return pb.DialRequest(start=start)


def to_ssh(sandbox: str, user: str, public_key: str) -> pb.DialRequest:
    """Ask for a session of sshd. :raise InvalidArgumentError: when it cannot be."""
    with _requests.checked():
        ssh = pb.SshTarget(user=user, public_key=public_key)
        start = pb.DialStart(sandbox=sandbox, ssh=ssh)
    return pb.DialRequest(start=start)


def _pieces(data: bytes) -> Iterator[pb.DialRequest]:
    view = memoryview(data)
    for at in range(0, len(view), PIECE):
        yield pb.DialRequest(data=bytes(view[at : at + PIECE]))


class _Buffer:
    """What has come and was not asked for yet."""

    def __init__(self) -> None:
        self._data = b""
        self.ended = False

    def take(self, limit: int) -> bytes:
        taken, self._data = self._data[:limit], self._data[limit:]
        return taken

    def put(self, message: pb.DialResponse | None) -> None:
        if message is None or message.WhichOneof("message") == "end":
            self.ended = True
        else:
            self._data = message.data

    def __bool__(self) -> bool:
        return bool(self._data)


class Connection:
    """A connection into a guest. One thread may read while another writes.

    Close it, or use it with `with`. Made by `client.ports.dial` and `sandbox.dial`.
    """

    def __init__(self, rpc: Callable[[Iterator[Any]], Any], first: pb.DialRequest, at: str) -> None:
        self._address = at
        self._outgoing = _Outgoing(first)
        self._call = rpc(self._outgoing)
        if not self._call.add_callback(self._outgoing.give_up):  # it is over already
            self._outgoing.give_up()
        self._coming = _Buffer()
        started = self._next()
        if started is None or started.WhichOneof("message") != "started":
            self.close()
            raise InternalError("the daemon did not say that it is connected")
        #: Id of the sandbox.
        self.sandbox_id: str = started.started.sandbox_id
        #: Of a session of sshd: the guest's host keys.
        self.host_keys: tuple[str, ...] = tuple(started.started.host_keys)

    def read(self, limit: int = PIECE) -> bytes:
        """Return what has come, `limit` bytes at most; b"" when the guest sends no more.

        :raise ConnectionLostError: when the guest, or the daemon's way to it, is gone.
        """
        while not self._coming and not self._coming.ended:
            self._coming.put(self._next())
        return self._coming.take(limit)

    def write(self, data: bytes) -> None:
        """Send all of it; waits while the guest takes none.

        :raise ConnectionLostError: when the connection is closed.
        """
        for piece in _pieces(data):
            if not self._outgoing.put(piece):
                raise _closed()

    def write_eof(self) -> None:
        """Send no more, and let the guest know; it may go on sending."""
        self._outgoing.end()

    def wait_closed(self) -> None:
        """Return when the guest neither sends nor takes any more."""
        self._call.code()

    def close(self) -> None:
        """Close it, whatever is under way."""
        self._outgoing.give_up()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        """All that comes, in pieces."""
        while piece := self.read():
            yield piece

    def _next(self) -> Any:
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            raise _unpacked(error, self._address) from error


class _Outgoing:
    """What waits to be sent: gRPC takes it in a thread of its own."""

    def __init__(self, first: pb.DialRequest) -> None:
        self._waiting: deque[pb.DialRequest] = deque([first])
        self._changed = threading.Condition()
        self._ended = False
        self._given_up = False

    def put(self, message: pb.DialRequest) -> bool:
        """Add one, once there is room; False when nobody takes it any more."""
        with self._changed:
            while len(self._waiting) >= _AHEAD and not (self._given_up or self._ended):
                self._changed.wait()
            if self._given_up or self._ended:
                return False
            self._waiting.append(message)
            self._changed.notify_all()
            return True

    def end(self) -> None:
        """Let it end after what waits."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Nobody takes anything any more."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[pb.DialRequest]:
        return self

    def __next__(self) -> pb.DialRequest:
        with self._changed:
            while not (self._waiting or self._ended or self._given_up):
                self._changed.wait()
            if self._given_up or not self._waiting:
                raise StopIteration
            message = self._waiting.popleft()
            self._changed.notify_all()
            return message


class AsyncConnection:
    """A connection into a guest. One task may read while another writes.

    Close it, or use it with `async with`. Made by `client.ports.dial` and `sandbox.dial`.
    """

    def __init__(self, call: Any, at: str) -> None:
        self._call = call
        self._address = at
        self._coming = _Buffer()
        self._sends = True
        #: Id of the sandbox.
        self.sandbox_id = ""
        #: Of a session of sshd: the guest's host keys.
        self.host_keys: tuple[str, ...] = ()

    @classmethod
    async def open(cls, rpc: Callable[[], Any], first: pb.DialRequest, at: str) -> Self:
        """Connect.

        :raise StrataboxError: what `client.ports.dial` tells.
        """
        self = cls(rpc(), at)
        try:
            await self._send(first)
            started = await self._next()
            if started is None or started.WhichOneof("message") != "started":
                raise InternalError("the daemon did not say that it is connected")
        except BaseException:
            self._call.cancel()
            raise
        self.sandbox_id = started.started.sandbox_id
        self.host_keys = tuple(started.started.host_keys)
        return self

    async def read(self, limit: int = PIECE) -> bytes:
        """Return what has come, `limit` bytes at most; b"" when the guest sends no more.

        :raise ConnectionLostError: when the guest, or the daemon's way to it, is gone.
        """
        while not self._coming and not self._coming.ended:
            self._coming.put(await self._next())
        return self._coming.take(limit)

    async def write(self, data: bytes) -> None:
        """Send all of it; waits while the guest takes none.

        :raise ConnectionLostError: when the connection is closed.
        """
        for piece in _pieces(data):
            if not self._sends:
                raise _closed()
            await self._send(piece)

    async def write_eof(self) -> None:
        """Send no more, and let the guest know; it may go on sending."""
        if self._sends and not self._call.done():
            self._sends = False
            await self._call.done_writing()

    async def wait_closed(self) -> None:
        """Return when the guest neither sends nor takes any more."""
        await self._call.code()

    async def close(self) -> None:
        """Close it, whatever is under way."""
        self._sends = False
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """All that comes, in pieces."""
        while piece := await self.read():
            yield piece

    async def _send(self, message: pb.DialRequest) -> None:
        try:
            await self._call.write(message)
        except asyncio.InvalidStateError as error:  # the call is over; `read` knows why
            raise _closed() from error
        except grpc.RpcError as error:
            raise _unpacked(error, self._address) from error

    async def _next(self) -> Any:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise _unpacked(error, self._address) from error
        return None if message is grpc.aio.EOF else message


def _closed() -> StrataboxError:
    return ConnectionLostError("the connection into the guest is closed")


def _unpacked(error: grpc.RpcError, address: str) -> StrataboxError:
    call: Any = error
    if call.code() is grpc.StatusCode.CANCELLED and not _wire.is_dropped(call):
        return _closed()
    return _wire.unpack(error, address)
