"""Workspaces: whose things are whose, and how much each may have.

A **workspace** is a tenant. Sandboxes, snapshots, volumes and their snapshots, jobs and ports are
one's own, and nothing of another's can be seen or named; images are everybody's. Who calls acts in
one workspace, for the whole of the call (`acting`).
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, fields
from datetime import datetime

from stratabox.storage.model.errors import (
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
)

DEFAULT_WORKSPACE = "default"
"""The one that there always is; it can be given a quota, and cannot be deleted."""

acting: ContextVar[str | None] = ContextVar("workspace", default=None)
"""The workspace that this task works in. None: the daemon works for itself, and sees them all.

Set in one place, ``access.gate.Gate.call``. Threads have none: who works in one has it from the
transaction.
"""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)


def check_name(name: str) -> str:
    """:raise InvalidArgumentError: INVALID_ARGUMENT, for what no workspace can be called."""
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"a workspace's name has 1 to 63 characters of a-z, 0-9 and -, the first and the last"
            f" not -; not {name!r:.100}",
            field="workspace",
        )
    return name


def not_found(name: str) -> NotFoundError:
    """The error for a workspace that there is not, or that is none of the caller's business."""
    return NotFoundError(
        f"there is no workspace {name[:100]!r}: stratabox workspace list shows an admin those that"
        " there are",
        reason="WORKSPACE_NOT_FOUND",
        workspace=name[:100],
    )


class QuotaExceededError(NoSpaceError):
    """The workspace may not have that much. QUOTA_EXCEEDED, with the figures."""

    default_reason = "QUOTA_EXCEEDED"


@dataclass(frozen=True, kw_only=True)
class Quota:
    """The most that a workspace may have. None: as much as the host has."""

    sandboxes: int | None = None
    """That are not terminated, whatever their state."""
    cpus: int | None = None
    """Of those together."""
    memory: int | None = None
    """Of those together, MiB."""
    disk: int | None = None
    """Bytes: what disks and volumes may grow to, and what snapshots keep."""
    snapshots: int | None = None
    """Of sandboxes and of volumes."""

    def limits(self) -> dict[str, int]:
        """Those that there are."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: limit for name, limit in found.items() if limit is not None}


RESOURCES = tuple(each.name for each in fields(Quota))
"""What a quota is of."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a workspace has; in the units of a quota."""

    sandboxes: int = 0
    cpus: int = 0
    memory: int = 0
    disk: int = 0
    snapshots: int = 0


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """One tenant."""

    name: str
    created_at: datetime
    quota: Quota = Quota()
