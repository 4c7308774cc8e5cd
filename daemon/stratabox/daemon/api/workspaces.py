"""WorkspacesService."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.access import gate
from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import unary
from stratabox.daemon.lifecycle.workspaces import Workspaces
from stratabox.storage.model.access import Role
from stratabox.storage.model.workspaces import Quota, Usage, Workspace, not_found
from stratabox.v1 import workspaces_pb2, workspaces_pb2_grpc

Context = ServicerContext[Any, Any]

_FIELDS = {
    "sandboxes": "sandboxes",
    "cpus": "cpus",
    "memory": "memory",
    "disk": "disk_bytes",
    "snapshots": "snapshots",
}
"""Of a quota → of its message."""


@dataclass(frozen=True, kw_only=True)
class WorkspacesServicer(workspaces_pb2_grpc.WorkspacesServiceServicer):
    """Message in, one call, message out."""

    workspaces: Workspaces

    @unary
    async def CreateWorkspace(
        self, request: workspaces_pb2.CreateWorkspaceRequest, context: Context
    ) -> workspaces_pb2.Workspace:
        """Make a workspace."""
        return _message(*await self.workspaces.create(request.workspace, _quota(request.quota)))

    @unary
    async def GetWorkspace(
        self, request: workspaces_pb2.GetWorkspaceRequest, context: Context
    ) -> workspaces_pb2.Workspace:
        """Return one, to whoever is in it or an admin."""
        caller = gate.current.get()
        name = request.workspace or caller.workspace
        if name != caller.workspace and caller.role is not Role.ADMIN:
            raise not_found(name)
        return _message(*await self.workspaces.get(name))

    @unary
    async def ListWorkspaces(
        self, request: workspaces_pb2.ListWorkspacesRequest, context: Context
    ) -> workspaces_pb2.ListWorkspacesResponse:
        """List all of them."""
        found = await self.workspaces.list()
        return workspaces_pb2.ListWorkspacesResponse(workspaces=[_message(*each) for each in found])

    @unary
    async def SetWorkspaceQuota(
        self, request: workspaces_pb2.SetWorkspaceQuotaRequest, context: Context
    ) -> workspaces_pb2.Workspace:
        """Replace the quota of one."""
        return _message(*await self.workspaces.set_quota(request.workspace, _quota(request.quota)))

    @unary
    async def DeleteWorkspace(
        self, request: workspaces_pb2.DeleteWorkspaceRequest, context: Context
    ) -> workspaces_pb2.DeleteWorkspaceResponse:
        """Remove one that has nothing any more."""
        keys = await self.workspaces.delete(request.workspace)
        return workspaces_pb2.DeleteWorkspaceResponse(
            workspace=request.workspace, revoked_keys=keys
        )


def _quota(message: workspaces_pb2.Quota) -> Quota:
    return Quota(
        **{
            name: getattr(message, field)
            for name, field in _FIELDS.items()
            if message.HasField(field)  # type: ignore[arg-type]  # one of a literal's words
        }
    )


def _message(workspace: Workspace, usage: Usage) -> workspaces_pb2.Workspace:
    limits = workspace.quota.limits()
    return workspaces_pb2.Workspace(
        name=workspace.name,
        created_at=convert.timestamp(workspace.created_at),
        quota=workspaces_pb2.Quota(**{_FIELDS[name]: limit for name, limit in limits.items()}),
        usage=workspaces_pb2.WorkspaceUsage(
            **{field: getattr(usage, name) for name, field in _FIELDS.items()}
        ),
    )
