"""What each call takes: one table, from a service and its method to the least role.

What is not in here takes an admin, and a test tells of it; but for Tenki's services, where it is
not served at all. The line between *read-only* and *user*:
the first sees what the catalog says and what is measured, the second also what is inside guests
(files, consoles, archives) and whatever changes something. Images are every workspace's: only an
admin makes and removes them.
"""

from __future__ import annotations

from collections.abc import Mapping

from stratabox.storage.model.access import Role
from stratabox.storage.model.errors import ForbiddenError

_READ = Role.READ_ONLY
_USER = Role.USER
_ADMIN = Role.ADMIN

OPEN = frozenset({"grpc.health.v1.Health/Check"})
"""Answered without a key: whether the daemon serves, for whoever watches over it."""

BY_SESSION = "tenki.sandbox.v1.SandboxSessionDataPlaneService"
"""Its methods take a session's credential instead of a key."""

LEAST: Mapping[str, Mapping[str, Role]] = {
    "stratabox.v1.SandboxesService": {
        "CreateSandbox": _USER,
        "GetSandbox": _READ,
        "ListSandboxes": _READ,
        "UpdateSandbox": _USER,
        "PauseSandbox": _USER,
        "ResumeSandbox": _USER,
        "StopSandbox": _USER,
        "StartSandbox": _USER,
        "TerminateSandbox": _USER,
        "DeleteSandbox": _USER,
        "ExecuteCommand": _USER,
        "CloneSandbox": _USER,
        "RevertSandbox": _USER,
        "WatchSandboxes": _READ,
    },
    "stratabox.v1.SnapshotsService": {
        "CreateSnapshot": _USER,
        "GetSnapshot": _READ,
        "ListSnapshots": _READ,
        "UpdateSnapshot": _USER,
        "DeleteSnapshot": _USER,
        "RestoreSnapshot": _USER,
        "CompactSnapshot": _USER,
        "WatchSnapshots": _READ,
    },
    "stratabox.v1.EventsService": {"WatchEvents": _READ},
    "stratabox.v1.VolumesService": {
        "CreateVolume": _USER,
        "GetVolume": _READ,
        "ListVolumes": _READ,
        "UpdateVolume": _USER,
        "ResizeVolume": _USER,
        "DeleteVolume": _USER,
        "AttachVolume": _USER,
        "DetachVolume": _USER,
        "SnapshotVolume": _USER,
        "GetVolumeSnapshot": _READ,
        "ListVolumeSnapshots": _READ,
        "DeleteVolumeSnapshot": _USER,
    },
    "stratabox.v1.ImagesService": {
        "BuildImage": _ADMIN,
        "ImportImage": _ADMIN,
        "GetImage": _READ,
        "ListImages": _READ,
        "DeleteImage": _ADMIN,
    },
    "stratabox.v1.TransfersService": {
        "ExportSnapshot": _USER,
        "ImportSnapshot": _USER,
        "ExportImage": _USER,
        "ImportImageArchive": _ADMIN,
    },
    "stratabox.v1.JobsService": {
        "ListJobs": _READ,
        "GetJob": _READ,
        "PauseJob": _USER,
        "ResumeJob": _USER,
        "CancelJob": _USER,
    },
    "stratabox.v1.ExecService": {
        "Exec": _USER,
        "AttachProcess": _USER,
        "ListProcesses": _USER,
        "SignalProcess": _USER,
        "WaitProcess": _USER,
    },
    "stratabox.v1.FilesService": {
        "ReadFile": _USER,
        "WriteFile": _USER,
        "StatFile": _USER,
        "ListFiles": _USER,
        "MakeDirectory": _USER,
        "RemoveFile": _USER,
        "MoveFile": _USER,
        "ChangeFile": _USER,
        "MakeSymlink": _USER,
        "ReadLink": _USER,
        "ReadArchive": _USER,
        "WriteArchive": _USER,
        "WatchFiles": _USER,
    },
    "stratabox.v1.PortsService": {
        "AddPort": _USER,
        "ListPorts": _READ,
        "RemovePort": _USER,
        "Dial": _USER,
    },
    "stratabox.v1.SshService": {
        "SetAuthorizedKeys": _USER,
        "ListAuthorizedKeys": _READ,
        "GetHostKeys": _READ,
    },
    "stratabox.v1.ConsoleService": {
        "GetConsoleLog": _USER,
        "WatchConsole": _USER,
        "WriteConsole": _USER,
    },
    "stratabox.v1.MetricsService": {
        "GetMetrics": _READ,
        "WatchMetrics": _READ,
    },
    "stratabox.v1.WorkspacesService": {
        "CreateWorkspace": _ADMIN,
        "GetWorkspace": _READ,
        "ListWorkspaces": _ADMIN,
        "SetWorkspaceQuota": _ADMIN,
        "DeleteWorkspace": _ADMIN,
    },
    "stratabox.v1.HostService": {
        "GetHost": _ADMIN,
        "GetDiskUsage": _ADMIN,
        "CheckStore": _ADMIN,
    },
    "tenki.sandbox.v1.SandboxService": {
        "CreateSession": _USER,
        "CreateSessionCredential": _USER,
        "GetSession": _READ,
        "GetSessionMetrics": _READ,
        "WaitSession": _USER,
        "ListSessions": _READ,
        "ListWorkspaceSandboxes": _READ,
        "UpdateSession": _USER,
        "CreateVolume": _USER,
        "GetVolume": _READ,
        "ListVolumes": _READ,
        "UpdateVolume": _USER,
        "DeleteVolume": _USER,
        "ResizeVolume": _USER,
        "AttachVolume": _USER,
        "DetachVolume": _USER,
        "GitOperation": _USER,
        "PauseSession": _USER,
        "ResumeSession": _USER,
        "TerminateSession": _USER,
        "TerminateSessions": _USER,
        "ExtendSession": _USER,
        "ExposePort": _USER,
        "UnexposePort": _USER,
        "ListExposedPorts": _READ,
        "CreatePreviewUrl": _USER,
        "DeletePreviewUrl": _USER,
        "BindPreviewUrl": _USER,
        "UnbindPreviewUrl": _USER,
        "ListPreviewUrls": _USER,
        "GetPreviewUrl": _USER,
        "UpdateSSHAuthorizedKeys": _USER,
        "CreateSnapshot": _USER,
        "GetSnapshot": _READ,
        "GetSnapshotDownloadURL": _USER,
        "ListSnapshots": _READ,
        "ListSessionSnapshots": _READ,
        "ListDanglingSnapshots": _READ,
        "ListWorkspaceSnapshots": _READ,
        "GetWorkspaceSandboxUsage": _READ,
        "UpdateSnapshot": _USER,
        "DeleteSnapshot": _USER,
        "WhoAmI": _READ,
    },
    BY_SESSION: {
        "Run": _USER,
        "Dial": _USER,
        "HostPortTunnel": _USER,
        "ReadFile": _USER,
        "WriteFile": _USER,
        "ReadFileStream": _USER,
        "WriteFileStream": _USER,
        "Stat": _USER,
        "Mkdir": _USER,
        "Remove": _USER,
        "List": _USER,
    },
    "grpc.health.v1.Health": {"Check": _READ, "Watch": _READ, "List": _READ},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _READ},
}


_UNSERVED = "tenki.sandbox.v1."
"""What Tenki's clients ask for and is not in the table is not served, which they may learn."""


def least_role(method: str) -> Role:
    """The least role for `package.Service/Method`; for one that is not in the table: admin."""
    service, _, name = method.partition("/")
    other = _READ if service.startswith(_UNSERVED) else _ADMIN
    return LEAST.get(service, {}).get(name, other)


def written(method: str) -> str:
    """The method as it is counted and written down; whatever is in no table is one and the same."""
    service, _, name = method.partition("/")
    return method if name in LEAST.get(service, {}) else f"{_UNSERVED}*"


def takes_session(method: str) -> bool:
    """Whether a call comes in by a session's credential."""
    return method.partition("/")[0] == BY_SESSION


def require(role: Role, method: str) -> None:
    """Let a role do this.

    :raise ForbiddenError: FORBIDDEN.
    """
    least = least_role(method)
    if not role.covers(least):
        raise ForbiddenError(
            f"this takes the role {least.value!r}; the key has the role {role.value!r}",
            role=role.value,
            least=least.value,
        )
