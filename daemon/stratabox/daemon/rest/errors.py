"""The one map from our errors to HTTP's statuses, and the body that carries them.

Each error leaves as ``{"error": {"code", "message", "details"}}``: the stable reason, a sentence
for people, and strings for programs. What is not ours is logged with its traceback and says only
"internal error".
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping

from starlette.responses import Response

from stratabox.daemon.access.gate import note_failure
from stratabox.storage.files.durable import host_error
from stratabox.storage.model import errors

log = logging.getLogger(__name__)

STATUSES: dict[type[errors.StrataboxError], int] = {
    errors.NotFoundError: 404,
    errors.AlreadyExistsError: 409,
    errors.InvalidArgumentError: 422,
    errors.DeniedError: 409,
    errors.FailedError: 422,
    errors.ConflictError: 409,
    errors.NoSpaceError: 429,
    errors.UnavailableError: 503,
    errors.UnauthenticatedError: 401,
    errors.ForbiddenError: 403,
    errors.RateLimitedError: 429,
    errors.CorruptError: 500,
    errors.InternalError: 500,
}
"""400 is a request that the OpenAPI document rules out; 422 fits it and cannot be done."""

_REASONS = {"IDEMPOTENCY_MISMATCH": 409}

MEANINGS: dict[int, str] = {
    400: "The request is not as this document says.",
    401: "No valid API key.",
    403: "The key's role does not allow this.",
    404: "There is no such thing.",
    408: "The body was not there in time.",
    409: "Not in this state of things.",
    413: "The body is too large.",
    422: "It cannot be done as asked; the message says why.",
    429: "A limit is reached: of room on the host, or of the key's requests.",
    500: "An error of the daemon's own.",
    503: "Something does not answer; try again.",
}
"""What the statuses of errors mean, for the OpenAPI document."""

_MESSAGE_BYTES = 8192


class RefusedError(errors.InvalidArgumentError):
    """A request that is wrong as HTTP, before anything is looked at."""

    def __init__(self, status: int, message: str, *, reason: str, **metadata: object) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.status = status


def status_of(error: errors.StrataboxError) -> int:
    """The HTTP status of an error: its reason's, its class's, or its nearest ancestor's."""
    if isinstance(error, RefusedError):
        return error.status
    if error.reason in _REASONS:
        return _REASONS[error.reason]
    for kind in type(error).__mro__:
        if kind in STATUSES:
            return STATUSES[kind]
    return 500


def reply(error: errors.StrataboxError) -> Response:
    """An error as it goes over the wire; one of our own is logged and hidden."""
    status = status_of(error)
    message, metadata = error.message, error.metadata
    if status == 500 and not isinstance(error, errors.CorruptError):
        log.error("internal error", exc_info=error)
        message, metadata = "internal error", {}
    note_failure(error.reason)
    response = _response(status, error.reason, message, metadata)
    if isinstance(error, errors.RateLimitedError) and error.retry_after is not None:
        response.headers["retry-after"] = str(math.ceil(error.retry_after))
    return response


def reply_to_any(error: BaseException) -> Response:
    """As `reply`, for whatever was raised."""
    if isinstance(error, errors.StrataboxError):
        return reply(error)
    if isinstance(error, OSError) and error.errno is not None:
        log.error("the host failed", exc_info=error)
        return reply(host_error(error))
    log.error("internal error", exc_info=error)
    note_failure(errors.InternalError.default_reason)
    return _response(500, errors.InternalError.default_reason, "internal error", {})


def _response(status: int, code: str, message: str, details: Mapping[str, str]) -> Response:
    body = {"error": {"code": code, "message": message[:_MESSAGE_BYTES], "details": {**details}}}
    headers = {"www-authenticate": 'ApiKey header="x-api-key"'} if status == 401 else None
    # As ASCII: a name that was sent as half of a surrogate pair has no UTF-8.
    return Response(
        json.dumps(body), status_code=status, headers=headers, media_type="application/json"
    )
