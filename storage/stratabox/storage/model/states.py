"""States, levels, and the only changes of state that are legal.

```
sandbox    CREATING → RUNNING ⇄ PAUSED        snapshot   CREATING → READY → DELETING
              │          ⇅        │                         │     ⇅       │
              │          │        │                         └→ FAILED ────┘
              │       STOPPED ←───┘
              └→ FAILED (from anywhere alive) → RUNNING      image      CREATING → READY → DELETING
           any → TERMINATING → TERMINATED
```
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from stratabox.storage.model.errors import InternalError


class SandboxState(StrEnum):
    """What a sandbox does."""

    CREATING = "creating"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    TERMINATING = "terminating"
    TERMINATED = "terminated"
    FAILED = "failed"

    @property
    def has_process(self) -> bool:
        """A QEMU belongs to it, unless it is paused to disk (`Sandbox.has_process`)."""
        return self in (SandboxState.RUNNING, SandboxState.PAUSED)

    @property
    def is_over(self) -> bool:
        """It is gone or going."""
        return self in (SandboxState.TERMINATING, SandboxState.TERMINATED)


class SnapshotState(StrEnum):
    """Where a snapshot is in its life."""

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"


class ImageState(StrEnum):
    """Where an image is in its life."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class LayerState(StrEnum):
    """Where a layer is in its life.

    An *active* layer is written by exactly one domain; a *sealed* one never changes again; a
    *garbage* one is tombstoned and its file may be gone already.
    """

    ACTIVE = "active"
    SEALED = "sealed"
    GARBAGE = "garbage"


class Level(StrEnum):
    """How consistent a snapshot is, weakest first."""

    CRASH = "crash"
    APPLICATION = "application"
    MEMORY = "memory"


class Identity(StrEnum):
    """Who a guest that goes on from saved memory is."""

    KEEP = "keep"
    """Who it was."""
    RENEW = "renew"
    """Somebody new: host name, machine-id, SSH host keys, MAC address."""


class TimeoutAction(StrEnum):
    """What is done to a sandbox whose time is up."""

    TERMINATE = "terminate"
    PAUSE = "pause"
    """To disk."""
    SNAPSHOT = "snapshot"
    """A snapshot is taken, and then it is terminated."""


class VolumeState(StrEnum):
    """Where a volume is in its life."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class AttachmentState(StrEnum):
    """Where an attachment of a volume is in its life."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    """Mounted in the guest, or claimed by a sandbox that does not run."""
    DETACHING = "detaching"


class JobKind(StrEnum):
    """Why a layer is written anew."""

    MERGE = "merge"
    """Layers below it are needed by nothing else: they go with it into one."""
    FLATTEN = "flatten"
    """It stands too high: it is put down onto the lowest layer of its chain."""
    COMPACT = "compact"
    """By request: its data is compressed."""


class JobState(StrEnum):
    """Where a job in the background is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    """By request."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Nothing more comes of it."""
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


class Boot(StrEnum):
    """How a guest boots: kernel and initrd given by QEMU, or by itself from its disk."""

    KERNEL = "kernel"
    DISK = "disk"


_SANDBOX = SandboxState
NEXT_SANDBOX: dict[SandboxState, frozenset[SandboxState]] = {
    _SANDBOX.CREATING: frozenset(
        {_SANDBOX.RUNNING, _SANDBOX.PAUSED, _SANDBOX.FAILED, _SANDBOX.TERMINATING}
    ),
    _SANDBOX.RUNNING: frozenset(
        {_SANDBOX.PAUSED, _SANDBOX.STOPPED, _SANDBOX.FAILED, _SANDBOX.TERMINATING}
    ),
    _SANDBOX.PAUSED: frozenset(
        {_SANDBOX.RUNNING, _SANDBOX.STOPPED, _SANDBOX.FAILED, _SANDBOX.TERMINATING}
    ),
    _SANDBOX.STOPPED: frozenset({_SANDBOX.RUNNING, _SANDBOX.FAILED, _SANDBOX.TERMINATING}),
    _SANDBOX.FAILED: frozenset({_SANDBOX.RUNNING, _SANDBOX.STOPPED, _SANDBOX.TERMINATING}),
    _SANDBOX.TERMINATING: frozenset({_SANDBOX.TERMINATED}),
    _SANDBOX.TERMINATED: frozenset(),
}

NEXT_SNAPSHOT: dict[SnapshotState, frozenset[SnapshotState]] = {
    SnapshotState.CREATING: frozenset({SnapshotState.READY, SnapshotState.FAILED}),
    # Lost, when a file of it is gone; found again, when that was put back.
    SnapshotState.READY: frozenset({SnapshotState.DELETING, SnapshotState.FAILED}),
    SnapshotState.FAILED: frozenset({SnapshotState.DELETING, SnapshotState.READY}),
    SnapshotState.DELETING: frozenset(),
}

NEXT_IMAGE: dict[ImageState, frozenset[ImageState]] = {
    ImageState.CREATING: frozenset({ImageState.READY, ImageState.DELETING}),
    ImageState.READY: frozenset({ImageState.DELETING}),
    ImageState.DELETING: frozenset(),
}

NEXT_VOLUME: dict[VolumeState, frozenset[VolumeState]] = {
    VolumeState.CREATING: frozenset({VolumeState.READY, VolumeState.DELETING}),
    VolumeState.READY: frozenset({VolumeState.DELETING}),
    VolumeState.DELETING: frozenset(),
}

_State = TypeVar("_State", SandboxState, SnapshotState, ImageState, VolumeState)


def check_step(table: dict[_State, frozenset[_State]], old: _State, new: _State) -> None:
    """Let `old` → `new` pass, or raise.

    :raise InternalError: when that change of state is not legal. Staying is always legal.
    """
    if new is not old and new not in table[old]:
        raise InternalError(f"illegal change of state: {old} to {new}")
