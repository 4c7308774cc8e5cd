"""PortsService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.lifecycle.inside.callers import Callers, Dialed
from stratabox.daemon.lifecycle.inside.carrying import BROKEN, Far, finish, lost, send
from stratabox.daemon.lifecycle.inside.ports import NewPort, Ports, PortStatus
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ports import Direction, Endpoint
from stratabox.v1 import ports_pb2, ports_pb2_grpc

Context = ServicerContext[Any, Any]

DATA_BYTES = 1 << 20
"""Of one message."""

_FIRST_SECONDS = 30.0
_DIRECTIONS = {
    ports_pb2.PORT_DIRECTION_UNSPECIFIED: Direction.TO_GUEST,
    ports_pb2.PORT_DIRECTION_TO_GUEST: Direction.TO_GUEST,
    ports_pb2.PORT_DIRECTION_TO_HOST: Direction.TO_HOST,
}
_NUMBERS = {
    Direction.TO_GUEST: ports_pb2.PORT_DIRECTION_TO_GUEST,
    Direction.TO_HOST: ports_pb2.PORT_DIRECTION_TO_HOST,
}


@dataclass(frozen=True, kw_only=True)
class PortsServicer(ports_pb2_grpc.PortsServiceServicer):
    """Message in, one call, message out."""

    ports: Ports
    callers: Callers

    @unary
    async def AddPort(self, request: ports_pb2.AddPortRequest, context: Context) -> ports_pb2.Port:
        """Forward a port."""
        if request.direction not in _DIRECTIONS:
            raise InvalidArgumentError(
                f"there is no direction {request.direction}", field="direction"
            )
        wanted = NewPort(
            direction=_DIRECTIONS[request.direction],
            host=_endpoint_from(request.host),
            guest=_endpoint_from(request.guest),
            mode=request.mode,
        )
        return _port(await self.ports.add(request.sandbox, wanted))

    @unary
    async def ListPorts(
        self, request: ports_pb2.ListPortsRequest, context: Context
    ) -> ports_pb2.ListPortsResponse:
        """List ports, oldest first."""
        found = await self.ports.list(request.sandbox)
        return ports_pb2.ListPortsResponse(ports=map(_port, found))

    @unary
    async def RemovePort(
        self, request: ports_pb2.RemovePortRequest, context: Context
    ) -> ports_pb2.RemovePortResponse:
        """Stop forwarding."""
        await self.ports.remove(request.id)
        return ports_pb2.RemovePortResponse()

    @streaming
    async def Dial(
        self, requests: AsyncIterator[ports_pb2.DialRequest], context: Context
    ) -> AsyncIterator[ports_pb2.DialResponse]:
        """Connect to something in a guest, and carry what is sent and what comes."""
        incoming = aiter(requests)
        async with self._dialed(await _start(incoming)) as dialed:
            yield ports_pb2.DialResponse(
                started=ports_pb2.DialStarted(sandbox_id=dialed.sandbox, host_keys=dialed.host_keys)
            )
            sending = asyncio.create_task(_send(incoming, dialed.far), name="dial")
            try:
                async for data in _received(dialed.far):
                    yield ports_pb2.DialResponse(data=data)
                if sending.done():
                    sending.result()
                yield ports_pb2.DialResponse(end=ports_pb2.DialEnd())
                gone = asyncio.create_task(dialed.far.closed(), name="dial closed")
                try:
                    await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    gone.cancel()
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    def _dialed(self, start: ports_pb2.DialStart) -> AbstractAsyncContextManager[Dialed]:
        match start.WhichOneof("target"):
            case "endpoint":
                return self.callers.dial(start.sandbox, _endpoint_from(start.endpoint))
            case "ssh":
                ssh = start.ssh
                return self.callers.dial_ssh(start.sandbox, ssh.user, ssh.public_key)
            case _:
                raise InvalidArgumentError("there is nothing to connect to", field="target")


async def _start(incoming: AsyncIterator[ports_pb2.DialRequest]) -> ports_pb2.DialStart:
    try:
        async with asyncio.timeout(_FIRST_SECONDS):
            first = await anext(incoming, None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("message") != "start":
        raise InvalidArgumentError("the first message must say what to connect to", field="start")
    return first.start


async def _send(incoming: AsyncIterator[ports_pb2.DialRequest], far: Far) -> None:
    """Carry what the caller sends until it sends no more, or the guest takes no more."""
    try:
        async for message in incoming:
            if message.WhichOneof("message") != "data" or len(message.data) > DATA_BYTES:
                raise InvalidArgumentError(
                    f"after the first message come data, {DATA_BYTES} bytes in each at most",
                    field="data",
                )
            if not await send(far, message.data):
                return
    except InvalidArgumentError:
        far.writer.channel.abort()  # or whoever reads would wait on
        raise
    finish(far)


async def _received(far: Far) -> AsyncIterator[bytes]:
    """What the guest sends, until it sends no more."""
    while True:
        try:
            data = await far.read()
        except BROKEN as error:
            raise lost(error) from error
        if not data:
            return
        yield data


def _endpoint_from(message: ports_pb2.Endpoint) -> Endpoint:
    return Endpoint(address=message.address, port=message.port, path=message.path)


def _endpoint(endpoint: Endpoint) -> ports_pb2.Endpoint:
    return ports_pb2.Endpoint(address=endpoint.address, port=endpoint.port, path=endpoint.path)


def _port(status: PortStatus) -> ports_pb2.Port:
    port = status.port
    return ports_pb2.Port(
        id=port.id,
        sandbox_id=port.sandbox,
        direction=_NUMBERS[port.direction],
        host=_endpoint(port.host),
        guest=_endpoint(port.guest),
        mode=port.mode,
        listening=status.listening,
        problem=status.problem,
        connections=status.connections,
        created_at=convert.timestamp(port.created_at),
    )
