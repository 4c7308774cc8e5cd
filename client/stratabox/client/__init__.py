"""Stratabox's Python SDK.

```
from stratabox.client import Client

with Client() as client, client.sandboxes.create(name="debugbox") as sandbox:
    print(sandbox.execute("uname -a").stdout_text)
```

`AsyncClient` has the same names, to be awaited. Records and errors are in `records` and `errors`
and exported here too. The clients, and gRPC with them, are imported when they are first asked for,
so that `stratabox --help` need not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stratabox.client.errors import (
    AgentUnavailableError,
    AlreadyExistsError,
    AmbiguousNameError,
    CommandFailedError,
    ConflictError,
    CorruptError,
    DaemonUnavailableError,
    DeadlineExceededError,
    DeniedError,
    FailedError,
    GuestBootingError,
    IdempotencyMismatchError,
    ImageAlreadyExistsError,
    ImageBuildFailedError,
    ImageInUseError,
    ImageNotFoundError,
    InternalError,
    InterruptedOperationError,
    InvalidAddressError,
    InvalidArgumentError,
    InvalidImageError,
    InvalidResourcesError,
    InvalidStateError,
    KvmUnusableError,
    LibvirtUnavailableError,
    MachineMismatchError,
    MonitorUnavailableError,
    NoSpaceError,
    NotFoundError,
    QemuFailedError,
    ResourcesFixedError,
    SandboxNotFoundError,
    SnapshotFailedError,
    SnapshotNotFoundError,
    SnapshotNotReadyError,
    StrataboxError,
    ToolMissingError,
    UnavailableError,
    UnsupportedError,
)
from stratabox.client.records import (
    BootMethod,
    BuildProgress,
    CloneResult,
    Disk,
    DiskFormat,
    EventType,
    ExecuteResult,
    Host,
    Image,
    ImageDeletion,
    ImageState,
    Machine,
    Page,
    PageTracking,
    RevertResult,
    SandboxEvent,
    SandboxRecord,
    SandboxState,
    Setting,
    Snapshot,
    SnapshotDeletion,
    SnapshotEvent,
    SnapshotLevel,
    SnapshotState,
)

if TYPE_CHECKING:
    from stratabox.client.aio import AsyncClient, AsyncSandbox
    from stratabox.client.sync import Client, Sandbox

_LATE = {
    "AsyncClient": "stratabox.client.aio",
    "AsyncSandbox": "stratabox.client.aio",
    "Client": "stratabox.client.sync",
    "Sandbox": "stratabox.client.sync",
}

__all__ = [
    "AgentUnavailableError",
    "AlreadyExistsError",
    "AmbiguousNameError",
    "AsyncClient",
    "AsyncSandbox",
    "BootMethod",
    "BuildProgress",
    "Client",
    "CloneResult",
    "CommandFailedError",
    "ConflictError",
    "CorruptError",
    "DaemonUnavailableError",
    "DeadlineExceededError",
    "DeniedError",
    "Disk",
    "DiskFormat",
    "EventType",
    "ExecuteResult",
    "FailedError",
    "GuestBootingError",
    "Host",
    "IdempotencyMismatchError",
    "Image",
    "ImageAlreadyExistsError",
    "ImageBuildFailedError",
    "ImageDeletion",
    "ImageInUseError",
    "ImageNotFoundError",
    "ImageState",
    "InternalError",
    "InterruptedOperationError",
    "InvalidAddressError",
    "InvalidArgumentError",
    "InvalidImageError",
    "InvalidResourcesError",
    "InvalidStateError",
    "KvmUnusableError",
    "LibvirtUnavailableError",
    "Machine",
    "MachineMismatchError",
    "MonitorUnavailableError",
    "NoSpaceError",
    "NotFoundError",
    "Page",
    "PageTracking",
    "QemuFailedError",
    "ResourcesFixedError",
    "RevertResult",
    "Sandbox",
    "SandboxEvent",
    "SandboxNotFoundError",
    "SandboxRecord",
    "SandboxState",
    "Setting",
    "Snapshot",
    "SnapshotDeletion",
    "SnapshotEvent",
    "SnapshotFailedError",
    "SnapshotLevel",
    "SnapshotNotFoundError",
    "SnapshotNotReadyError",
    "SnapshotState",
    "StrataboxError",
    "ToolMissingError",
    "UnavailableError",
    "UnsupportedError",
]


def __getattr__(name: str) -> Any:
    """Import a client when it is first asked for."""
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_LATE[name]), name)
    globals()[name] = value
    return value
