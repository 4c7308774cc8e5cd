"""What the SDK returns of workspaces, and what it raises about them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from stratabox.client import errors


@dataclass(frozen=True, kw_only=True)
class Quota:
    """The most that a workspace may have. None: as much as the host has."""

    #: Sandboxes that are not terminated, whatever their state.
    sandboxes: int | None = None
    #: Virtual CPUs of those together.
    cpus: int | None = None
    #: Their RAM together, MiB.
    memory: int | None = None
    #: What disks and volumes may grow to, and what snapshots keep.
    disk_bytes: int | None = None
    #: Snapshots of sandboxes and of volumes.
    snapshots: int | None = None


@dataclass(frozen=True, kw_only=True)
class WorkspaceUsage:
    """What a workspace has, as a quota counts it."""

    sandboxes: int
    cpus: int
    memory: int
    disk_bytes: int
    snapshots: int


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """One tenant: what is in it sees and names only what is in it."""

    name: str
    created_at: datetime
    quota: Quota
    usage: WorkspaceUsage


@dataclass(frozen=True, kw_only=True)
class WorkspaceDeletion:
    """What went with a workspace."""

    name: str
    #: Ids of the API keys that were its own, and open nothing any more.
    revoked_keys: tuple[str, ...]


class WorkspaceNotFoundError(errors.NotFoundError):
    """There is no such workspace, or the API key is not of it."""

    default_reason = "WORKSPACE_NOT_FOUND"


class WorkspaceNotEmptyError(errors.DeniedError):
    """The workspace has sandboxes, snapshots or volumes: delete those first."""

    default_reason = "WORKSPACE_NOT_EMPTY"


class QuotaExceededError(errors.NoSpaceError):
    """The workspace may not have that much: free some, or have an admin raise its quota."""

    default_reason = "QUOTA_EXCEEDED"


errors.learn(WorkspaceNotFoundError, WorkspaceNotEmptyError, QuotaExceededError)
