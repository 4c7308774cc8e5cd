"""Asks the daemon of this host what it is: for the doctor, who cannot look into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from stratabox.storage.model.errors import UnavailableError
from stratabox.v1 import host_pb2, host_pb2_grpc

_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class RunningDaemon:
    """What a daemon says of itself; the fields are those of ``Host``."""

    version: str
    pid: int
    launcher: str
    limits: tuple[str, ...]
    limits_by: str
    limits_reason: str


def ask(path: Path) -> RunningDaemon:
    """Ask the daemon at a Unix socket. Blocks for 5 s at most.

    :raise UnavailableError: when none answers there.
    """
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            found = host_pb2_grpc.HostServiceStub(channel).GetHost(
                host_pb2.GetHostRequest(), timeout=_SECONDS
            )
        except grpc.RpcError as error:
            why = error.code().name if isinstance(error, grpc.Call) else str(error)
            raise UnavailableError(f"nobody answers at {path} ({why})") from error
    return RunningDaemon(
        version=found.version,
        pid=found.pid,
        launcher=found.launcher,
        limits=tuple(found.limits),
        limits_by=found.limits_by,
        limits_reason=found.limits_reason,
    )
