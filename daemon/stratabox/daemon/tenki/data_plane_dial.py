"""Dial: one connection to a Unix socket in a session's guest.

What the session itself is refused for leaves as an error; what becomes of the connection, as the
frame `closed`. When the guest sends no more the connection is over: the protocol has no half of it
in that direction.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

from stratabox.daemon.lifecycle.inside.callers import Callers, Dialed
from stratabox.daemon.lifecycle.inside.carrying import BROKEN, OPEN_SECONDS, Far, finish, send
from stratabox.daemon.tenki.guest_paths import absolute
from stratabox.storage.model.errors import FailedError, InvalidArgumentError
from stratabox.storage.model.ports import Endpoint
from stratabox.tenki.v1 import data_plane_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class Dials:
    """Connects for `data_plane`."""

    callers: Callers

    async def dial(
        self, request: pb.DialOpen, requests: AsyncIterator[pb.DialRequest]
    ) -> AsyncGenerator[pb.DialResponse, None]:
        """What is to be sent of a connection, from `opened` to `closed`.

        :raise StrataboxError: as `Callers.dial`, but for CONNECTION_REFUSED and paths that cannot
            be; InvalidArgumentError for a frame that cannot be.
        """
        if not request.unix_socket_path:
            yield _closed(pb.DialClosed.REASON_PATH_DENIED, "there is no path to connect to")
            return
        path = absolute(request.unix_socket_path)
        seconds = min((request.connect_timeout_ms or 1 << 31) / 1000, OPEN_SECONDS)
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(seconds):
                    dialed = await self._open(stack, request.session_id, path)
            except TimeoutError:
                yield _closed(pb.DialClosed.REASON_TIMEOUT, f"no answer within {seconds:g} s")
                return
            except FailedError as error:
                if error.reason != "CONNECTION_REFUSED":
                    raise
                yield _closed(pb.DialClosed.REASON_REFUSED, error.message)
                return
            except InvalidArgumentError as error:
                yield _closed(pb.DialClosed.REASON_PATH_DENIED, error.message)
                return
            yield pb.DialResponse(opened=pb.DialOpened(sandbox_address=path))
            frames = _carried(dialed.far, requests)
            try:
                async for frame in frames:
                    yield frame
            finally:
                await frames.aclose()

    async def _open(self, stack: AsyncExitStack, session: str, path: str) -> Dialed:
        return await stack.enter_async_context(self.callers.dial(session, Endpoint(path=path)))


async def _carried(
    far: Far, requests: AsyncIterator[pb.DialRequest]
) -> AsyncGenerator[pb.DialResponse, None]:
    sending = asyncio.create_task(_send(requests, far), name="tenki dial")
    try:
        while True:
            try:
                data = await far.read()
            except BROKEN as error:
                if sending.done():
                    sending.result()  # what was wrong with what the caller has sent
                yield _closed(pb.DialClosed.REASON_PEER_RESET, str(error))
                return
            if not data:
                break
            yield pb.DialResponse(data=data)
        if sending.done():
            sending.result()
        yield _closed(pb.DialClosed.REASON_CLEAN, "")
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def _send(requests: AsyncIterator[pb.DialRequest], far: Far) -> None:
    """Carry what the caller sends until it sends no more, or the guest takes no more."""
    try:
        async for request in requests:
            match request.WhichOneof("payload"):
                case "data":
                    if not await send(far, request.data):
                        return
                case "half_close":
                    break
                case _:
                    raise InvalidArgumentError(
                        "after the first frame come data and half_close", field="payload"
                    )
    except InvalidArgumentError:
        far.writer.channel.abort()  # or whoever reads would wait on
        raise
    finish(far)


def _closed(reason: pb.DialClosed.Reason.ValueType, detail: str) -> pb.DialResponse:
    return pb.DialResponse(closed=pb.DialClosed(reason=reason, detail=detail))
