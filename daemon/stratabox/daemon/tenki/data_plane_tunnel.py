"""HostPortTunnel: a port of a session's guest whose connections the caller leads on.

```
 open ─▶ opened ─▶ accept, data, half_close, close of each sub-stream; ping, pong ─▶ terminated
```

All sub-streams share one stream of frames each way, which has no window for each of them: one that
takes nothing holds up the others once a MiB of it waits.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from stratabox.daemon.lifecycle.inside.callers import Callers
from stratabox.daemon.lifecycle.inside.carrying import BROKEN, Far, carry, finish, send
from stratabox.daemon.lifecycle.inside.crowd import Crowd
from stratabox.daemon.lifecycle.inside.tunnels import Listening
from stratabox.storage.model.errors import FailedError, InvalidArgumentError
from stratabox.storage.model.ports import Endpoint
from stratabox.tenki.v1 import data_plane_pb2 as pb

LOOPBACK = "127.0.0.1"
PING_SECONDS = 15.0
SILENT_SECONDS = 120.0
"""A caller who has said nothing for that long, and answered no ping, is gone."""
_WAITING_BYTES = 1 << 20
_FRAMES = 32
_LINGER_SECONDS = 10.0

_Frame = pb.HostPortTunnelResponse
_Ended = pb.HostPortTunnelTerminated


@dataclass(frozen=True, kw_only=True)
class Tunnels:
    """Makes tunnels for `data_plane`."""

    callers: Callers

    async def tunnel(
        self, request: pb.HostPortTunnelOpen, requests: AsyncIterator[pb.HostPortTunnelRequest]
    ) -> AsyncGenerator[_Frame, None]:
        """What is to be sent of a tunnel, from `opened` to its end.

        :raise StrataboxError: as `Callers.listen`, but for LISTEN_FAILED and endpoints that cannot
            be; InvalidArgumentError for a frame that cannot be.
        """
        address = request.sandbox_bind_address or LOOPBACK
        endpoint = Endpoint(
            address=LOOPBACK if address == "localhost" else address, port=request.sandbox_port
        )
        tunnel = _Tunnel()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(tunnel.crowd.disperse)
            try:
                listening = await stack.enter_async_context(
                    self.callers.listen(request.session_id, endpoint, tunnel.take)
                )
            except FailedError as error:
                if error.reason != "LISTEN_FAILED":
                    raise
                yield _terminated(_Ended.REASON_BIND_FAILED, error.message)
                return
            except InvalidArgumentError as error:
                yield _terminated(_Ended.REASON_BIND_FAILED, error.message)
                return
            opened = pb.HostPortTunnelOpened(
                sandbox_port=listening.port, sandbox_address=endpoint.address
            )
            yield _Frame(opened=opened)
            frames = tunnel.frames(listening, requests)
            try:
                async for frame in frames:
                    yield frame
            finally:
                await frames.aclose()


@dataclass
class _Tunnel:
    """Its sub-streams, and the frames that wait to be sent."""

    crowd: Crowd = field(default_factory=Crowd)
    _subs: dict[int, _Sub] = field(default_factory=dict)
    _ids: Any = field(default_factory=lambda: itertools.count(1))
    _out: asyncio.Queue[_Frame] = field(default_factory=lambda: asyncio.Queue(_FRAMES))
    _heard_at: float = 0.0
    _is_held_up: bool = False

    def take(self, far: Far, source: str) -> None:
        """Have a connection that was made in the guest led on."""
        if self.crowd.is_full:
            far.writer.channel.abort()
            return
        self.crowd.enter(self._lead(next(self._ids), far, source), "tenki tunnel's connection")

    async def frames(
        self, listening: Listening, requests: AsyncIterator[pb.HostPortTunnelRequest]
    ) -> AsyncGenerator[_Frame, None]:
        """All frames, until the caller ends the tunnel, or the guest or the caller is gone."""
        self._heard_at = asyncio.get_running_loop().time()
        taking = asyncio.ensure_future(self._take_frames(requests))
        lost = asyncio.ensure_future(listening.over())
        silent = asyncio.ensure_future(self._ping())
        coming = asyncio.ensure_future(self._out.get())
        try:
            while True:
                waits: set[asyncio.Future[Any]] = {taking, lost, silent, coming}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    yield coming.result()
                    coming = asyncio.ensure_future(self._out.get())
                if taking.done():
                    taking.result()
                    return
                if lost.done():
                    yield _terminated(_Ended.REASON_SESSION_LOST, "the guest is gone")
                    return
                if silent.done():
                    silent.result()
                    yield _terminated(
                        _Ended.REASON_KEEPALIVE_TIMEOUT,
                        f"nothing was heard of the caller for {SILENT_SECONDS:g} s",
                    )
                    return
        finally:
            tasks = (taking, lost, silent, coming)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take_frames(self, requests: AsyncIterator[pb.HostPortTunnelRequest]) -> None:
        """Pass on what the caller sends, until it ends the tunnel."""
        async for request in requests:
            self._heard_at = asyncio.get_running_loop().time()
            match request.WhichOneof("payload"):
                case "data":
                    if sub := self._subs.get(request.data.sub_stream_id):
                        self._is_held_up = True
                        await sub.put(request.data.payload)
                        self._is_held_up = False
                case "half_close":
                    if sub := self._subs.get(request.half_close.sub_stream_id):
                        sub.end()
                case "close" if request.close.sub_stream_id == 0:
                    return
                case "close":
                    if sub := self._subs.get(request.close.sub_stream_id):
                        sub.end(closes=True)
                case "pong":
                    pass
                case what:
                    raise InvalidArgumentError(
                        f"a tunnel that is open takes no {what or 'empty frame'}",
                        field=what or "payload",
                    )

    async def _ping(self) -> None:
        """Return when the caller has been silent for too long."""
        loop = asyncio.get_running_loop()
        for number in itertools.count(1):
            await asyncio.sleep(PING_SECONDS)
            if not self._is_held_up and loop.time() - self._heard_at > SILENT_SECONDS:
                return
            if not self._out.full():  # or the caller takes nothing, a ping no more than the rest
                self._out.put_nowait(_Frame(ping=pb.HostPortTunnelKeepalivePing(ping_id=number)))

    async def _lead(self, number: int, far: Far, source: str) -> None:
        """Carry one connection from the guest, and close it."""
        reason = ""
        sub = self._subs[number] = _Sub()
        try:
            async with far:
                accept = pb.HostPortTunnelAccept(sub_stream_id=number, source_address=source)
                await self._out.put(_Frame(accept=accept))
                await carry(sub.pump_in(far), self._pump_out(number, far), far)
        except BROKEN as error:
            reason = str(error)[:200] or "it has broken"
        finally:
            del self._subs[number]
        close = pb.HostPortTunnelClose(sub_stream_id=number, reason=reason)
        await self._out.put(_Frame(close=close))

    async def _pump_out(self, number: int, far: Far) -> None:
        while data := await far.read():
            piece = pb.HostPortTunnelData(sub_stream_id=number, payload=data)
            await self._out.put(_Frame(data=piece))
        half = pb.HostPortTunnelHalfClose(sub_stream_id=number, client_to_server=False)
        await self._out.put(_Frame(half_close=half))


class _Sub:
    """What waits to go into the guest on one sub-stream."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._ended = self._closes = self._broken = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, data: bytes) -> None:
        """Have some sent; waits while too much does. Nothing happens once it takes no more."""
        await self._room.wait()
        if self._ended or self._broken or not data:
            return
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _WAITING_BYTES:
            self._room.clear()
        self._changed.set()

    def end(self, *, closes: bool = False) -> None:
        """No more comes.

        :param closes: nothing is wanted of the other direction either.
        """
        self._ended = True
        self._closes = self._closes or closes
        self._changed.set()

    async def pump_in(self, far: Far) -> None:
        """Send all that comes into the guest, until it ends or the guest takes no more."""
        try:
            while True:
                while self._pieces:
                    data = self._pieces.popleft()
                    self._size -= len(data)
                    if self._size < _WAITING_BYTES:
                        self._room.set()
                    if not await send(far, data):
                        return
                if self._ended:
                    break
                self._changed.clear()
                await self._changed.wait()
            finish(far)
            while not self._closes:
                self._changed.clear()
                await self._changed.wait()
            # What was sent before must arrive; who goes on sending then has nobody to hear it.
            async with asyncio.timeout(_LINGER_SECONDS):
                await far.closed()
        except TimeoutError:
            far.writer.channel.abort()
        finally:
            self._broken = True
            self._room.set()


def _terminated(reason: _Ended.Reason.ValueType, detail: str) -> _Frame:
    return _Frame(terminated=_Ended(reason=reason, detail=detail))
