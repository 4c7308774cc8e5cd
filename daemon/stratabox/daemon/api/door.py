"""gRPC's door to the API: who calls is known before a message is read.

An interceptor around every service, health and reflection among them. What is refused never
reaches the method, nor is its message parsed. What is let in runs as one task that the gate may
cancel, with `gate.current` telling who it works for.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from stratabox.daemon.access import request_ids, roles
from stratabox.daemon.access.ending import not_begun
from stratabox.daemon.access.gate import WORKSPACE_HEADER, Call, Gate, Principal
from stratabox.daemon.lifecycle.common.threads import Tasks
from stratabox.daemon.rpc.errors import leaving, status_of
from stratabox.storage.model.errors import StrataboxError

if TYPE_CHECKING:
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]

_NAMING = {
    "sandbox", "snapshot", "image", "volume", "job", "id", "name", "since", "path", "source",
    "target", "sandbox_id", "snapshot_id", "image_id", "volume_id", "session_id", "from_snapshot",
}  # fmt: skip
"""Fields of requests that name what a call is about; all others stay out of the audit log."""


class Door(grpc.aio.ServerInterceptor):
    """What stands before the services of one server.

    :param local: the server listens on the Unix socket alone, whose mode is the key.
    """

    def __init__(self, gate: Gate, *, local: bool) -> None:
        self._gate = gate
        self._local = local
        self._closed = False
        self._telling = Tasks()

    def close(self) -> None:
        """Let nobody in any more, as the daemon ends: DAEMON_ENDING. Who is in goes on."""
        self._closed = True

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Let a call in, or answer it here."""
        method = handler_call_details.method.removeprefix("/")
        metadata = dict(handler_call_details.invocation_metadata or ())
        # This task is the call's own, from here to its end.
        request_ids.current.set(request_ids.chosen(metadata.get(request_ids.HEADER)))
        principal: Principal | None = None
        if self._closed and method not in roles.OPEN:
            return self._refusal(not_begun(), principal, method)
        try:
            workspace = _text(metadata.get(WORKSPACE_HEADER))
            if self._local:
                principal = self._gate.authenticate(None, "unix:", workspace)
            elif method not in roles.OPEN:
                if roles.takes_session(method):
                    principal = self._gate.authenticate_session(_credential(metadata))
                else:
                    token = _token(metadata)
                    principal = self._gate.authenticate(token, "tcp", workspace)
                self._gate.admit(principal, method)
        except StrataboxError as error:
            return self._refusal(error, principal, method)
        handler = await continuation(handler_call_details)
        if handler is None or principal is None:
            return handler
        return self._admitted(handler, principal, roles.written(method))

    def _refusal(self, error: StrataboxError, principal: Principal | None, method: str) -> _Handler:
        """A method that answers whatever is asked of it with the error."""

        async def refuse(requests: object, context: _Context) -> None:
            self._gate.refuse(error, principal, method, context.peer())
            await context.abort_with_status(leaving(status_of(error)))

        # On the wire there is no difference between kinds of methods; this one reads nothing.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _admitted(self, handler: _Handler, principal: Principal, method: str) -> _Handler:
        """The same method, counted, written down, and such that the gate can end it."""
        kind: Any = handler
        behaviour: Callable[[Any, Any], Any] = (
            (kind.stream_stream if kind.response_streaming else kind.stream_unary)
            if kind.request_streaming
            else (kind.unary_stream if kind.response_streaming else kind.unary_unary)
        )
        long = kind.request_streaming or kind.response_streaming

        async def answer(request: Any, context: _Context) -> Any:
            context.set_trailing_metadata(((request_ids.HEADER, request_ids.current.get()),))
            try:
                with self._gate.call(principal, method, context.peer(), long=long) as call:
                    request_id = request_ids.current.get()
                    call.tell = lambda why: self._tell(context, why, request_id)
                    if kind.request_streaming:
                        request = _noting(request, call)
                    else:
                        call.names.update(_names(request))
                    return await _run(behaviour, request, context, call)
            except StrataboxError as error:  # of the gate: methods' own leave as gRPC's
                self._gate.refuse(error, principal, method, context.peer())
                await context.abort_with_status(leaving(status_of(error)))

        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[kind.request_streaming, kind.response_streaming]
        made: _Handler = make(
            answer,
            request_deserializer=kind.request_deserializer,
            response_serializer=kind.response_serializer,
        )
        return made

    def _tell(self, context: _Context, why: StrataboxError, request_id: str) -> None:
        async def tell() -> None:
            request_ids.current.set(request_id)
            with suppress(grpc.aio.AbortError, grpc.aio.UsageError):  # or it was answered just now
                await context.abort_with_status(leaving(status_of(why)))

        self._telling.spawn(tell(), "tell why")


async def _run(
    behaviour: Callable[[Any, Any], Any], request: Any, context: _Context, call: Call
) -> Any:
    try:
        if inspect.isasyncgenfunction(behaviour):
            # Written from here, so that this task is in here whenever it is cancelled.
            async with aclosing(behaviour(request, context)) as messages:
                async for message in messages:
                    await context.write(message)
            return None
        return await behaviour(request, context)
    except grpc.aio.AbortError:
        call.result = _code(context)
        raise


def _code(context: _Context) -> str:
    code: Any = context.code()
    if isinstance(code, int):
        code = next((each for each in grpc.StatusCode if each.value[0] == code), None)
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _token(metadata: Mapping[str, Any]) -> str | None:
    """The API key in a call's metadata: `authorization: Bearer …`, or `x-api-key`."""
    authorization = metadata.get("authorization")
    if isinstance(authorization, str):
        scheme, _, token = authorization.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else authorization
    key = metadata.get("x-api-key")
    return key if isinstance(key, str) else None


def _credential(metadata: Mapping[str, Any]) -> str | None:
    """The session's credential in the metadata of a call of Tenki's data plane."""
    credential = metadata.get("x-tenki-session-cert")
    return credential if isinstance(credential, str) else None


async def _noting(requests: Any, call: Call) -> AsyncIterator[Any]:
    """The same messages; the first says what the call is about."""
    first = True
    async for request in requests:
        if first:
            call.names.update(_names(request))
            first = False
        yield request


def _names(request: object) -> dict[str, str]:
    return dict(_naming(request, 1)) if isinstance(request, Message) else {}


def _naming(message: Message, depth: int) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth and isinstance(value, Message):
                yield from _naming(value, depth - 1)
        elif field.name not in _NAMING:
            continue
        elif isinstance(value, str):
            yield field.name, value
        elif isinstance(value, bytes):
            yield field.name, value[:1024].decode("utf-8", "replace")
