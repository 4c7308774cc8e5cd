"""Quotas: asked in the transaction that makes something, once it is there, so that of two who make
the last one that may be, one is refused.
"""

from __future__ import annotations

from stratabox.storage.catalog import workspaces
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.workspaces import QuotaExceededError

_NOUNS = {
    "sandboxes": "sandboxes",
    "cpus": "vCPUs",
    "memory": "MiB of memory",
    "disk": "bytes of disk",
    "snapshots": "snapshots",
}


def require(tx: Transaction, workspace: str, *resources: str) -> None:
    """See that what was made here is within the quota; else the transaction must not go on.

    :param resources: those of which it takes some.
    :raise NotFoundError: WORKSPACE_NOT_FOUND, when it was deleted meanwhile.
    :raise QuotaExceededError: QUOTA_EXCEEDED, with what there would be, and what may be.
    """
    limits = workspaces.get(tx, workspace).quota.limits()
    asked = [each for each in resources if each in limits]
    for name, would_be in workspaces.counted(tx, workspace, *asked).items():
        if would_be > limits[name]:
            raise QuotaExceededError(
                f"workspace {workspace!r} may have {limits[name]} {_NOUNS[name]}, and would have"
                f" {would_be}: free some, or have an admin raise its quota (stratabox workspace"
                " set-quota)",
                workspace=workspace,
                resource=name,
                limit=limits[name],
                would_be=would_be,
            )
