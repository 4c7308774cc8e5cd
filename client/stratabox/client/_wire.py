"""What both faces need of gRPC: the channel's options, the stubs, and errors made ours."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from stratabox.client import errors
from stratabox.client._access import Access, WithMetadata
from stratabox.client.access_errors import (
    ForbiddenError,
    RateLimitedError,
    UnauthenticatedError,
)
from stratabox.client.errors import StrataboxError
from stratabox.v1.console_pb2_grpc import ConsoleServiceStub
from stratabox.v1.events_pb2_grpc import EventsServiceStub
from stratabox.v1.exec_pb2_grpc import ExecServiceStub
from stratabox.v1.files_pb2_grpc import FilesServiceStub
from stratabox.v1.host_pb2_grpc import HostServiceStub
from stratabox.v1.images_pb2_grpc import ImagesServiceStub
from stratabox.v1.jobs_pb2_grpc import JobsServiceStub
from stratabox.v1.metrics_pb2_grpc import MetricsServiceStub
from stratabox.v1.ports_pb2_grpc import PortsServiceStub
from stratabox.v1.sandboxes_pb2_grpc import SandboxesServiceStub
from stratabox.v1.snapshots_pb2_grpc import SnapshotsServiceStub
from stratabox.v1.ssh_pb2_grpc import SshServiceStub
from stratabox.v1.transfers_pb2_grpc import TransfersServiceStub
from stratabox.v1.volumes_pb2_grpc import VolumesServiceStub
from stratabox.v1.workspaces_pb2_grpc import WorkspacesServiceStub

# An answer of `execute` may hold twice 16 MiB of output.
_LARGEST_MESSAGE = 64 << 20  # bytes

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    ("grpc.max_send_message_length", _LARGEST_MESSAGE),
    # The daemon is near: look for a restarted one soon, and never through a proxy.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_http_proxy", 0),
]

_OWN_ENDS = ("Locally cancelled", "Channel closed")
"""What gRPC says of calls that this side has cancelled."""
_BREAKS = ("Socket closed", "reset by peer", "Cancelling all calls", "CANCELLED")
"""What gRPC says of calls that were under way."""

_BY_CODE: dict[grpc.StatusCode, type[StrataboxError]] = {
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExistsError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidArgumentError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.DeniedError,
    grpc.StatusCode.ABORTED: errors.ConflictError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.NoSpaceError,
    grpc.StatusCode.UNAVAILABLE: errors.UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    grpc.StatusCode.DATA_LOSS: errors.CorruptError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
    grpc.StatusCode.INTERNAL: errors.InternalError,
}


def stubs(channel: Any, access: Access) -> dict[str, Any]:
    """Make the stubs of every service, by the names that plans use."""
    if access.metadata:
        channel = WithMetadata(channel, access.metadata)
    return {
        "sandboxes": SandboxesServiceStub(channel),
        "snapshots": SnapshotsServiceStub(channel),
        "volumes": VolumesServiceStub(channel),
        "images": ImagesServiceStub(channel),
        "files": FilesServiceStub(channel),
        "events": EventsServiceStub(channel),
        "exec": ExecServiceStub(channel),
        "host": HostServiceStub(channel),
        "jobs": JobsServiceStub(channel),
        "transfers": TransfersServiceStub(channel),
        "console": ConsoleServiceStub(channel),
        "metrics": MetricsServiceStub(channel),
        "ports": PortsServiceStub(channel),
        "ssh": SshServiceStub(channel),
        "workspaces": WorkspacesServiceStub(channel),
    }


def deadline(timeout: float | None, waits: float) -> float | None:
    """Add the client's own time-out and what the daemon was told that it may take."""
    return None if timeout is None else timeout + waits


def unpack(error: grpc.RpcError, address: str) -> StrataboxError:
    """Turn gRPC's error into ours: the only place that reads google.rpc.Status.

    :param address: Of the daemon, for the error that says that it does not answer.
    """
    call: Any = error  # every RpcError that a call raises is a call, too
    code: grpc.StatusCode = call.code()
    details: str = call.details() or ""
    info, wait = ErrorInfo(), RetryInfo()
    if _find_details(call, info, wait):
        otherwise = RateLimitedError if wait.ListFields() else _BY_CODE.get(code, StrataboxError)
        made = errors.from_reason(info.reason, details, dict(info.metadata), otherwise=otherwise)
        if isinstance(made, RateLimitedError) and wait.ListFields():
            made.retry_after = wait.retry_delay.ToMilliseconds() / 1000
        return made
    if code is grpc.StatusCode.UNAVAILABLE or is_dropped(call):
        return errors.DaemonUnavailableError(_unreachable(details, address), address=address)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceededError("the time for this call was up")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.UnsupportedError(f"the daemon at {address} does not know this call")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Without ErrorInfo it is gRPC itself that speaks: a message is larger than the limit.
        return StrataboxError(details, reason=code.name)
    return _BY_CODE.get(code, StrataboxError)(details, reason=code.name)


def is_dropped(call: Any) -> bool:
    """Whether the daemon's gRPC has let go of the call without a word, as at its end.

    What this side cancels has the same code, and a text that says so.
    """
    details: str = call.details() or ""
    own = any(words in details for words in _OWN_ENDS)
    return call.code() is grpc.StatusCode.CANCELLED and not own


def _find_details(call: Any, info: ErrorInfo, wait: RetryInfo) -> bool:
    """Fill in what the status says beside its text; whether there is an ErrorInfo."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the trailer contradicts the call: somebody else's doing
        return False
    found = False
    for detail in status.details if status is not None else ():
        found = detail.Unpack(info) or found
        detail.Unpack(wait)
    return found


def _unreachable(details: str, address: str) -> str:
    if "Permission denied" in details:
        return f"no permission to speak to the daemon at {address}"
    if any(word in details for word in _BREAKS):
        return f"the daemon at {address} went away in the middle of the call"
    return f"no daemon answers at {address}; start one with: stratabox daemon"
