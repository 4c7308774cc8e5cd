"""The one map from our errors to gRPC's codes, and what applies it to a service's methods.

Each error leaves as a google.rpc.Status with an ErrorInfo: the stable reason, the domain
"stratabox", and the metadata. What is not ours is logged with its traceback and says only
"internal error".
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from stratabox.daemon.access import request_ids
from stratabox.daemon.access.gate import note_failure
from stratabox.storage.files.durable import host_error
from stratabox.storage.model import errors

log = logging.getLogger(__name__)

DOMAIN = "stratabox"

CODES: dict[type[errors.StrataboxError], grpc.StatusCode] = {
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.DeniedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FailedError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConflictError: grpc.StatusCode.ABORTED,
    errors.NoSpaceError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    errors.RateLimitedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.CorruptError: grpc.StatusCode.DATA_LOSS,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

_MESSAGE_BYTES = 2048
"""Of the message, counted as it travels: percent-encoded, and once more inside the status."""
_METADATA_BYTES = 1024
"""Of all metadata together. gRPC refuses trailers of more than 8 KiB, so all of it must fit."""

Context = grpc.aio.ServicerContext[Any, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


def code_of(error: errors.StrataboxError) -> grpc.StatusCode:
    """The gRPC code of an error: its class's, or its nearest ancestor's."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def status_of(error: errors.StrataboxError) -> status_pb2.Status:
    """An error as it goes over the wire."""
    code = code_of(error)
    message, metadata = error.message, error.metadata
    if code is grpc.StatusCode.INTERNAL:
        message, metadata = "internal error", {}
    share = _METADATA_BYTES // max(len(metadata), 1)
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: _cut(value, share) for key, value in metadata.items()},
    )
    details = [_packed(info)]
    if isinstance(error, errors.RateLimitedError) and error.retry_after is not None:
        wait = error_details_pb2.RetryInfo()
        wait.retry_delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        details.append(_packed(wait))
    return status_pb2.Status(code=code.value[0], message=_shorten(message), details=details)


def leaving(status: status_pb2.Status) -> grpc.Status:
    """A status as a call is ended with, which says whose request it was, too."""
    made: Any = rpc_status.to_status(status)  # a named tuple
    request = request_ids.current.get()
    if request:
        made = made._replace(
            trailing_metadata=(*made.trailing_metadata, (request_ids.HEADER, request))
        )
    left: grpc.Status = made
    return left


class Answering:
    """Has methods of a service answer: every error leaves by one map.

    :param status_of: that map.
    """

    def __init__(self, status_of: Callable[[errors.StrataboxError], status_pb2.Status]) -> None:
        self._status_of = status_of

    def unary(self, method: Method) -> Method:
        """Answer one message."""

        @functools.wraps(method)
        async def answer(servicer: Any, request: Any, context: Context) -> Any:
            return await self._guarded(method(servicer, request, context), context)

        return answer  # type: ignore[return-value]

    def streaming(self, method: Method) -> Method:
        """Answer a stream of messages."""

        @functools.wraps(method)
        async def answer(servicer: Any, request: Any, context: Context) -> AsyncIterator[Any]:
            messages = method(servicer, request, context)
            try:
                while True:
                    try:
                        message = await self._guarded(anext(messages), context)
                    except StopAsyncIteration:
                        return
                    yield message
            finally:
                await messages.aclose()

        return answer  # type: ignore[return-value]

    async def _guarded(self, work: Awaitable[Any], context: Context) -> Any:
        try:
            return await work
        except errors.StrataboxError as error:
            if code_of(error) is grpc.StatusCode.INTERNAL:
                log.exception("internal error")
            status = self._status_of(error)
        except (asyncio.CancelledError, StopAsyncIteration, grpc.aio.AbortError):
            raise
        except OSError as error:
            if error.errno is None:  # a time-out that nobody expected
                log.exception("internal error")
                status = self._status_of(errors.InternalError("internal error"))
            else:
                log.exception("the host failed")
                status = self._status_of(host_error(error))
        except Exception:  # the edge: whatever this is, it is a bug, and ends as one answer
            log.exception("internal error")
            status = self._status_of(errors.InternalError("internal error"))
        note_failure(_reason(status))
        await context.abort_with_status(leaving(status))
        raise AssertionError("abort_with_status returned")


def _reason(status: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    reason: str = info.reason
    return reason


def _packed(message: Message) -> any_pb2.Any:
    detail = any_pb2.Any()
    detail.Pack(message)
    return detail


def _shorten(message: str) -> str:
    """The longest beginning of a message that fits once it is percent-encoded."""
    shorter = _cut(message, _MESSAGE_BYTES)
    while len(quote(shorter)) > _MESSAGE_BYTES:
        shorter = _cut(message, len(shorter.encode()) * 3 // 4)
    return shorter


def _cut(text: str, limit: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) <= limit:
        return encoded.decode()
    return encoded[: limit - 4].decode("utf-8", "ignore") + " ..."
