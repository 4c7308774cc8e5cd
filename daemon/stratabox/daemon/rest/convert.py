"""Records to what goes over the wire."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel

from stratabox.daemon.lifecycle.common.once import Key
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.rest import models
from stratabox.daemon.rest.models import SandboxStatus
from stratabox.storage.model import records
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.states import SandboxState

_STATUSES = {
    SandboxState.CREATING: SandboxStatus.CREATING,
    SandboxState.RUNNING: SandboxStatus.READY,
    SandboxState.PAUSED: SandboxStatus.PAUSED,
    SandboxState.STOPPED: SandboxStatus.STOPPED,
    SandboxState.FAILED: SandboxStatus.FAILED,
    SandboxState.TERMINATING: SandboxStatus.DELETING,
}


def sandbox(record: records.Sandbox) -> models.Sandbox:
    """A sandbox.

    :raise NotFoundError: SANDBOX_NOT_FOUND, for one that is over: only its record is kept.
    """
    if record.state is SandboxState.TERMINATED:
        raise NotFoundError(
            f"sandbox {record.name!r} was terminated",
            reason="SANDBOX_NOT_FOUND",
            sandbox=record.id,
        )
    status = _STATUSES[record.state]
    if status is SandboxStatus.READY and not record.ready:
        status = SandboxStatus.CREATING
    return models.Sandbox(
        id=record.id,
        name=record.name,
        created_at=record.created_at,
        cpu=record.cpus,
        memory=record.memory,
        storage=record.storage,
        status=status,
    )


def snapshot(record: records.Snapshot) -> models.Snapshot:
    """A snapshot."""
    return models.Snapshot(
        id=record.id,
        name=record.name,
        source_sandbox_id=record.source_sandbox,
        source_sandbox_name=record.source_sandbox_name,
        status=models.SnapshotStatus(record.state),
        created_at=record.created_at,
        consistency=models.Consistency(record.consistency) if record.consistency else None,
    )


def resources(wanted: models.Resources | None) -> Resources:
    """The size of a guest."""
    if wanted is None:
        return Resources()
    return Resources(
        cpus=wanted.cpus,
        memory=wanted.memory,
        storage=wanted.storage if isinstance(wanted, models.DiskResources) else None,
    )


def key(text: str | None, operation: str, about: str, body: BaseModel) -> Key | None:
    """A request's idempotency key; None where there is none.

    :param about: what the path names.
    """
    if not text:
        return None
    digest = hashlib.sha256(f"{about}\n{body.model_dump_json()}".encode()).hexdigest()
    return Key(key=text, method=f"REST {operation}", request=digest)
