"""SandboxSessionDataPlaneService: what is done inside of a session.

Every call has shown a credential at the door, and may be about that credential's session alone:
`_enter` sees to that before anything is done. Envelopes are taken off here and put on again; what
is in them is the business of `data_plane_run`, `data_plane_files`, `data_plane_dial` and
`data_plane_tunnel`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.access import gate
from stratabox.daemon.tenki import finding
from stratabox.daemon.tenki.data_plane_dial import Dials
from stratabox.daemon.tenki.data_plane_files import SessionFiles
from stratabox.daemon.tenki.data_plane_run import Runs
from stratabox.daemon.tenki.data_plane_tunnel import Tunnels
from stratabox.daemon.tenki.errors import streaming, unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.tenki.v1 import data_plane_pb2 as pb

Context = ServicerContext[Any, Any]

FIRST_SECONDS = 30.0
"""How long a caller may take to say what a stream is for."""


@dataclass(frozen=True, kw_only=True)
class DataPlaneCalls:
    """Envelopes off, one call, envelopes on."""

    parts: Parts
    runs: Runs
    files: SessionFiles
    dials: Dials
    tunnels: Tunnels

    @streaming
    async def Run(
        self,
        requests: AsyncIterator[pb.SandboxSessionDataPlaneServiceRunRequest],
        context: Context,
    ) -> AsyncIterator[pb.SandboxSessionDataPlaneServiceRunResponse]:
        """Run a command."""
        frames = _frames(requests)
        start = (await _first(frames, "start")).start
        await self._enter(start.session_id)
        async with aclosing(self.runs.run(start, frames)) as answers:
            async for frame in answers:
                yield pb.SandboxSessionDataPlaneServiceRunResponse(frame=frame)

    @streaming
    async def Dial(
        self,
        requests: AsyncIterator[pb.SandboxSessionDataPlaneServiceDialRequest],
        context: Context,
    ) -> AsyncIterator[pb.SandboxSessionDataPlaneServiceDialResponse]:
        """Connect to a Unix socket in the guest."""
        frames = _frames(requests)
        request = (await _first(frames, "open")).open
        await self._enter(request.session_id)
        async with aclosing(self.dials.dial(request, frames)) as answers:
            async for frame in answers:
                yield pb.SandboxSessionDataPlaneServiceDialResponse(frame=frame)

    @streaming
    async def HostPortTunnel(
        self,
        requests: AsyncIterator[pb.SandboxSessionDataPlaneServiceHostPortTunnelRequest],
        context: Context,
    ) -> AsyncIterator[pb.SandboxSessionDataPlaneServiceHostPortTunnelResponse]:
        """Have the guest listen for the caller."""
        frames = _frames(requests)
        request = (await _first(frames, "open")).open
        await self._enter(request.session_id)
        async with aclosing(self.tunnels.tunnel(request, frames)) as answers:
            async for frame in answers:
                yield pb.SandboxSessionDataPlaneServiceHostPortTunnelResponse(frame=frame)

    @unary
    async def ReadFile(
        self, request: pb.SandboxSessionDataPlaneServiceReadFileRequest, context: Context
    ) -> pb.SandboxSessionDataPlaneServiceReadFileResponse:
        """A whole file."""
        await self._enter(request.request.session_id)
        response = await self.files.read(request.request)
        return pb.SandboxSessionDataPlaneServiceReadFileResponse(response=response)

    @unary
    async def WriteFile(
        self, request: pb.SandboxSessionDataPlaneServiceWriteFileRequest, context: Context
    ) -> pb.SandboxSessionDataPlaneServiceWriteFileResponse:
        """Write a whole file."""
        given = request.request
        await self._enter(given.session_id)
        start = pb.WriteFileStreamStart(session_id=given.session_id, path=given.path, truncate=True)
        info = await self.files.write(start, _once(given.content))
        return pb.SandboxSessionDataPlaneServiceWriteFileResponse(
            response=pb.WriteFileResponse(path=info.path.decode(), size_bytes=info.size)
        )

    @streaming
    async def ReadFileStream(
        self, request: pb.SandboxSessionDataPlaneServiceReadFileStreamRequest, context: Context
    ) -> AsyncIterator[pb.SandboxSessionDataPlaneServiceReadFileStreamResponse]:
        """Part of a file, as a stream."""
        await self._enter(request.request.session_id)
        async with aclosing(self.files.read_stream(request.request)) as answers:
            async for response in answers:
                yield pb.SandboxSessionDataPlaneServiceReadFileStreamResponse(response=response)

    @unary
    async def WriteFileStream(
        self,
        requests: AsyncIterator[pb.SandboxSessionDataPlaneServiceWriteFileStreamRequest],
        context: Context,
    ) -> pb.SandboxSessionDataPlaneServiceWriteFileStreamResponse:
        """Write a file from a stream."""
        frames = _frames(requests)
        start = (await _first(frames, "start")).start
        await self._enter(start.session_id)
        pieces = _Pieces(frames, context)
        info = await self.files.write(start, pieces.all())
        return pb.SandboxSessionDataPlaneServiceWriteFileStreamResponse(
            response=pb.WriteFileStreamResponse(bytes_written=pieces.bytes, path=info.path.decode())
        )

    @unary
    async def Stat(
        self, request: pb.SandboxSessionDataPlaneServiceStatRequest, context: Context
    ) -> pb.SandboxSessionDataPlaneServiceStatResponse:
        """What a file is."""
        await self._enter(request.request.session_id)
        response = await self.files.stat(request.request)
        return pb.SandboxSessionDataPlaneServiceStatResponse(response=response)

    @unary
    async def Mkdir(
        self, request: pb.SandboxSessionDataPlaneServiceMkdirRequest, context: Context
    ) -> pb.SandboxSessionDataPlaneServiceMkdirResponse:
        """Make a directory."""
        await self._enter(request.request.session_id)
        response = await self.files.make_directory(request.request)
        return pb.SandboxSessionDataPlaneServiceMkdirResponse(response=response)

    @unary
    async def Remove(
        self, request: pb.SandboxSessionDataPlaneServiceRemoveRequest, context: Context
    ) -> pb.SandboxSessionDataPlaneServiceRemoveResponse:
        """Remove a file."""
        await self._enter(request.request.session_id)
        response = await self.files.remove(request.request)
        return pb.SandboxSessionDataPlaneServiceRemoveResponse(response=response)

    @unary
    async def List(
        self, request: pb.SandboxSessionDataPlaneServiceListRequest, context: Context
    ) -> pb.SandboxSessionDataPlaneServiceListResponse:
        """List a directory."""
        await self._enter(request.request.session_id)
        response = await self.files.list(request.request)
        return pb.SandboxSessionDataPlaneServiceListResponse(response=response)

    async def _enter(self, session_id: str) -> None:
        """Let a call into its session, once that is ready.

        :raise UnauthenticatedError: INVALID_CREDENTIAL, for one of another session.
        :raise StrataboxError: as `finding.running`.
        """
        gate.require_session(session_id)
        await finding.running(self.parts, session_id)


class _Pieces:
    """The bytes of a file that a caller sends."""

    def __init__(self, frames: AsyncIterator[pb.WriteFileStreamRequest], context: Context) -> None:
        self.bytes = 0
        self._frames = frames
        self._context = context

    async def all(self) -> AsyncGenerator[bytes, None]:
        """All of them, to the end of the stream.

        :raise InvalidArgumentError: for a frame that cannot be.
        """
        async for frame in self._frames:
            if frame.WhichOneof("payload") != "data":
                raise InvalidArgumentError("after the first frame comes data", field="payload")
            self.bytes += len(frame.data)
            yield frame.data
        # A caller who breaks off ends the stream just as well. To such a one nothing can be sent
        # any more: this is cancelled here, and nothing comes of the file.
        await self._context.send_initial_metadata(())


async def _frames(requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
    async for request in requests:
        yield request.frame


async def _first(frames: AsyncIterator[Any], wanted: str) -> Any:
    """The first frame, which must be the one that is wanted.

    :raise InvalidArgumentError: when it is another, or does not come.
    """
    try:
        async with asyncio.timeout(FIRST_SECONDS):
            first = await anext(frames, None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("payload") != wanted:
        raise InvalidArgumentError(f"the first frame must be {wanted}", field=wanted)
    return first


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content
