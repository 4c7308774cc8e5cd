"""ConsoleService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.lifecycle.observing import consoles
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.v1 import console_pb2, console_pb2_grpc

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class ConsoleServicer(console_pb2_grpc.ConsoleServiceServicer):
    """Message in, one call, message out."""

    world: World
    guests: Guests

    @unary
    async def GetConsoleLog(
        self, request: console_pb2.GetConsoleLogRequest, context: Context
    ) -> console_pb2.ConsoleLog:
        """Return what is kept of a console."""
        guest, _ = await self.guests.find(request.sandbox)
        return console_pb2.ConsoleLog(data=await consoles.kept(self.world, guest))

    @streaming
    async def WatchConsole(
        self, request: console_pb2.WatchConsoleRequest, context: Context
    ) -> AsyncIterator[console_pb2.ConsoleOutput]:
        """Stream what the guest writes."""
        guest, _ = await self.guests.find(request.sandbox)
        async for heard in consoles.follow(self.world, guest, from_log=request.from_log):
            yield console_pb2.ConsoleOutput(data=heard.data, lost_bytes=heard.lost)

    @unary
    async def WriteConsole(
        self, request: console_pb2.WriteConsoleRequest, context: Context
    ) -> console_pb2.WriteConsoleResponse:
        """Type something."""
        guest, _ = await self.guests.find(request.sandbox)
        await consoles.write(guest, request.data)
        return console_pb2.WriteConsoleResponse()
