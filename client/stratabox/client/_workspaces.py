"""The plans of `client.workspaces`."""

from __future__ import annotations

import builtins

from stratabox.client import _convert, _requests
from stratabox.client._plans import Call, Plan
from stratabox.client.workspace_records import (
    Quota,
    Workspace,
    WorkspaceDeletion,
    WorkspaceUsage,
)
from stratabox.v1 import workspaces_pb2 as pb

SERVICE = "workspaces"


class WorkspacePlans:
    """Tenants, and how much each may have. For admins, but for `get`.

    Which one a client works in is said to the client itself.
    """

    def create(self, name: str, quota: Quota | None = None) -> Plan[Workspace]:
        """Make a workspace.

        :raise AlreadyExistsError: when there is one.
        :raise InvalidArgumentError: for a name that is not of a-z, 0-9 and -.
        """
        with _requests.checked():
            request = pb.CreateWorkspaceRequest(workspace=name, quota=_quota(quota))
        return Call(SERVICE, "CreateWorkspace", request, _workspace)

    def get(self, name: str = "") -> Plan[Workspace]:
        """Return a workspace, with what it has; without a name: the one that the client works in.

        :raise WorkspaceNotFoundError: also for one that the API key is not of.
        """
        with _requests.checked():
            request = pb.GetWorkspaceRequest(workspace=name)
        return Call(SERVICE, "GetWorkspace", request, _workspace)

    def list(self) -> Plan[builtins.list[Workspace]]:
        """Return all of them, by name."""
        return Call(SERVICE, "ListWorkspaces", pb.ListWorkspacesRequest(), _workspaces)

    def set_quota(self, name: str, quota: Quota) -> Plan[Workspace]:
        """Replace a workspace's quota. What it has stays, also where that is more.

        :raise WorkspaceNotFoundError: when there is none.
        """
        with _requests.checked():
            request = pb.SetWorkspaceQuotaRequest(workspace=name, quota=_quota(quota))
        return Call(SERVICE, "SetWorkspaceQuota", request, _workspace)

    def delete(self, name: str) -> Plan[WorkspaceDeletion]:
        """Remove a workspace, and revoke its keys.

        :raise WorkspaceNotFoundError: when there is none.
        :raise WorkspaceNotEmptyError: while it has sandboxes, snapshots or volumes.
        """
        with _requests.checked():
            request = pb.DeleteWorkspaceRequest(workspace=name)
        return Call(SERVICE, "DeleteWorkspace", request, _deletion)


def _quota(quota: Quota | None) -> pb.Quota:
    wanted = quota or Quota()
    return pb.Quota(
        sandboxes=wanted.sandboxes,
        cpus=wanted.cpus,
        memory=wanted.memory,
        disk_bytes=wanted.disk_bytes,
        snapshots=wanted.snapshots,
    )


def _workspace(message: pb.Workspace) -> Workspace:
    quota, usage = message.quota, message.usage
    return Workspace(
        name=message.name,
        created_at=_convert.moment(message.created_at),
        quota=Quota(
            sandboxes=quota.sandboxes if quota.HasField("sandboxes") else None,
            cpus=quota.cpus if quota.HasField("cpus") else None,
            memory=quota.memory if quota.HasField("memory") else None,
            disk_bytes=quota.disk_bytes if quota.HasField("disk_bytes") else None,
            snapshots=quota.snapshots if quota.HasField("snapshots") else None,
        ),
        usage=WorkspaceUsage(
            sandboxes=usage.sandboxes,
            cpus=usage.cpus,
            memory=usage.memory,
            disk_bytes=usage.disk_bytes,
            snapshots=usage.snapshots,
        ),
    )


def _workspaces(message: pb.ListWorkspacesResponse) -> builtins.list[Workspace]:
    return [_workspace(one) for one in message.workspaces]


def _deletion(message: pb.DeleteWorkspaceResponse) -> WorkspaceDeletion:
    return WorkspaceDeletion(name=message.workspace, revoked_keys=tuple(message.revoked_keys))
