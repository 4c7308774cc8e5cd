"""In front of every request: who is it, may they, how large is it, and is the caller still there.

```
authenticate ─▶ find the call ─▶ admit ─▶ read the body, bounded ─▶ the application, in a task
                                                                      │ the caller goes: cancelled
                                                                      │ its key is revoked: likewise
```

A call that is cancelled undoes itself, as with gRPC (``lifecycle.common.once``). The body is read
whole before the application sees any of it: the largest has 1 MiB.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stratabox.daemon.access import request_ids
from stratabox.daemon.access.ending import broken_off
from stratabox.daemon.access.gate import WORKSPACE_HEADER, Gate, Principal
from stratabox.daemon.access.gate import Call as GateCall
from stratabox.daemon.lifecycle.common.threads import settle
from stratabox.daemon.rest import errors
from stratabox.daemon.rest.app import KEY_HEADER, OPEN_PATHS, Application
from stratabox.daemon.rest.errors import RefusedError
from stratabox.storage.model.errors import ConflictError, StrataboxError

LARGEST_BODY = 1 << 20
"""Bytes. The largest command and environment that Linux takes fit in it several times."""
_BODY_SECONDS = 30.0
_DRAIN_SECONDS = 2.0


class Guard:
    """The ASGI application that the server runs.

    :param local: requests come by a Unix socket, whose mode is the key.
    """

    def __init__(self, application: Application, gate: Gate, *, local: bool) -> None:
        self._application = application
        self._gate = gate
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Cancelled, it has answered why, where it could: nobody waits for its task, and the server
        would only log it.
        """
        if scope["type"] == "http":
            with suppress(asyncio.CancelledError):
                await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # This task is the request's own.
        request_ids.current.set(request_ids.chosen(_header(scope, request_ids.HEADER)))
        answer = _Answer(scope, send)
        incoming = _Incoming(receive)
        peer = self._peer(scope)
        call, names = self._application.find(scope)
        method = call.rpc if call else f"{scope['method']} {scope['path']}"
        principal: Principal | None = None
        try:
            if scope["path"] not in OPEN_PATHS:
                principal = self._gate.authenticate(_token(scope), peer, _workspace(scope))
            if call is None or principal is None:
                await self._run(scope, incoming, answer)
                return
            self._gate.admit(principal, method)
            admitted = self._gate.call(principal, method, peer)
            with admitted as noted:
                noted.names |= names
                await self._answer_noted(scope, incoming, answer, noted)
        except StrataboxError as error:
            if answer.status is not None:
                raise
            if not isinstance(error, RefusedError):
                self._gate.refuse(error, principal, method, peer)
            await incoming.drain()
            await answer.fail(error)

    async def _answer_noted(
        self, scope: Scope, incoming: _Incoming, answer: _Answer, noted: GateCall
    ) -> None:
        """Answer a call that is let in; its record says what came of it."""
        try:
            await self._run(scope, incoming, answer, noted)
        except RefusedError as error:
            await incoming.drain()
            await answer.fail(error)
        except asyncio.CancelledError:
            await _tell(answer, noted)
            raise
        finally:
            noted.result = answer.result

    async def _run(
        self, scope: Scope, incoming: _Incoming, answer: _Answer, noted: GateCall | None = None
    ) -> None:
        """Have the application answer, for as long as the caller is there.

        :raise StrataboxError: as ``_Incoming.body``.
        """
        body = await incoming.body()
        gone = asyncio.create_task(incoming.gone())
        replay = _Replay(body, gone)
        work = asyncio.create_task(
            _quietly(self._application.asgi, scope, replay, answer), name=f"rest {scope['path']}"
        )
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
        except asyncio.CancelledError:
            work.cancel()
            await _tell(answer, noted)  # now: to undo what was begun may take long
            raise
        finally:
            work.cancel()
            gone.cancel()
            await settle(asyncio.wait((work, gone)))
        if not work.cancelled():
            work.result()

    def _peer(self, scope: Scope) -> str:
        """Where a request comes from, as gRPC writes it."""
        if self._local:
            return "unix:"
        host, port = scope["client"] or ("unknown", 0)
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


class _Answer:
    """Sends a response; knows what it says, and what every one of ours says besides."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self.status: int | None = None
        """None: it has not begun."""

    @property
    def result(self) -> str:
        """For the audit log."""
        if self.status is None:
            return "CANCELLED"
        return "OK" if self.status < 400 else HTTPStatus(self.status).name

    async def send(self, message: Message) -> None:
        """Send a piece."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["date"] = formatdate(usegmt=True)
            headers["cache-control"] = "no-store"
            headers[request_ids.HEADER] = request_ids.current.get()
            headers["x-content-type-options"] = "nosniff"
        await self._send(message)

    async def fail(self, error: StrataboxError) -> None:
        """Send an error, and end the connection: its body may not have been read to the end."""
        response = errors.reply(error)
        response.headers["connection"] = "close"
        await response(self._scope, _nothing, self.send)


class _Incoming:
    """What the caller sends."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._over = False

    async def body(self) -> bytes:
        """The whole body.

        :raise RefusedError: when it is too large, or takes too long.
        :raise ConflictError: INTERRUPTED, when its caller goes first.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while not self._over:
                    body += await self._piece()
                    if len(body) > LARGEST_BODY:
                        raise RefusedError(
                            413,
                            f"the body has more than {LARGEST_BODY} bytes",
                            reason="BODY_TOO_LARGE",
                        )
        except TimeoutError:
            raise RefusedError(
                408, f"the body was not there within {_BODY_SECONDS:g} s", reason="BODY_TIMEOUT"
            ) from None
        return bytes(body)

    async def drain(self) -> None:
        """Let a refused request come to its end, if that is near: else its caller, who still
        writes, would hear of a broken connection and not of why.
        """
        size = 0
        with suppress(TimeoutError, ConflictError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._over and size < LARGEST_BODY:
                    size += len(await self._piece())

    async def gone(self) -> None:
        """Return when the caller has gone, or has the answer. Not before the body has come."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _piece(self) -> bytes:
        message = await self._receive()
        self._over = not message.get("more_body", False)
        if message["type"] == "http.disconnect":
            raise ConflictError("the caller has gone", reason="INTERRUPTED")
        piece: bytes = message.get("body", b"")
        return piece


class _Replay:
    """What the application receives: the body, and later that its caller has gone."""

    def __init__(self, body: bytes, gone: asyncio.Task[None]) -> None:
        self._body: bytes | None = body
        self._gone = gone

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.wait((self._gone,))
        return {"type": "http.disconnect"}


async def _tell(answer: _Answer, noted: GateCall | None) -> None:
    """Say why a call is ended by this side, where its answer has not begun."""
    if answer.status is None:
        await answer.fail((noted and noted.ended) or broken_off())


async def _quietly(app: ASGIApp, scope: Scope, receive: Receive, answer: _Answer) -> None:
    """Run it; what it does not expect is logged and answered, where that can still be."""
    try:
        await app(scope, receive, answer.send)
    except Exception as error:  # the edge: whatever this is, it is a bug, and ends as one answer
        response = errors.reply_to_any(error)
        if answer.status is None:
            await response(scope, receive, answer.send)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _header(scope: Scope, wanted: str) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == wanted.encode()), None)


def _workspace(scope: Scope) -> str | None:
    """The workspace that a request names; the last one, where it names several."""
    found = [value for name, value in scope["headers"] if name == WORKSPACE_HEADER.encode()]
    return found[-1].decode("latin-1") if found else None


def _token(scope: Scope) -> str | None:
    """The API key of a request: in `x-api-key`, or as a bearer's."""
    shown = [value for name, value in scope["headers"] if name == KEY_HEADER.encode()]
    if not shown:
        bearers = [value for name, value in scope["headers"] if name == b"authorization"]
        shown = [value[7:] for value in bearers if value[:7].lower() == b"bearer "]
    return shown[0].decode("latin-1") if len(shown) == 1 else None
