"""Who calls, and what is used."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.access import gate
from stratabox.daemon.lifecycle.observing.history import Average
from stratabox.daemon.tenki import convert, finding, reading
from stratabox.daemon.tenki.errors import unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import workspaces
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.records import MIB
from stratabox.storage.model.workspaces import Quota, Usage
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]

_WINDOW = timedelta(minutes=5)
"""Where the client names none."""
_COUNT = records_pb2.SANDBOX_USAGE_UNIT_COUNT
_BYTES = records_pb2.SANDBOX_USAGE_UNIT_BYTES
_ROWS = (
    ("sandboxes", "sandboxes", "Sandboxes", _COUNT, 1, "that are not terminated"),
    ("cpus", "cpu_cores", "CPU cores", _COUNT, 1, "of those together"),
    ("memory", "memory_bytes", "Memory", _BYTES, MIB, "of those together"),
    ("disk", "storage_bytes", "Storage", _BYTES, 1, "that disks may grow to, and snapshots keep"),
    ("snapshots", "snapshots", "Snapshots", _COUNT, 1, "of sandboxes and of volumes"),
)
"""The name in a quota, Tenki's key, label and unit, how many of that unit one is, and help."""


@dataclass(frozen=True, kw_only=True)
class AccountCalls:
    """Message in, one call, message out."""

    parts: Parts

    @unary
    async def WhoAmI(
        self, request: sandbox_pb2.WhoAmIRequest, context: Context
    ) -> sandbox_pb2.WhoAmIResponse:
        """Say who calls: the key's id, and its workspace."""
        principal = gate.current.get()
        return sandbox_pb2.WhoAmIResponse(
            owner_type="SERVICE",
            owner_id=principal.key or "socket",
            workspaces=[
                records_pb2.WhoAmIWorkspace(
                    workspace_id=principal.workspace, name=principal.workspace
                )
            ],
        )

    @unary
    async def GetWorkspaceSandboxUsage(
        self, request: sandbox_pb2.GetWorkspaceSandboxUsageRequest, context: Context
    ) -> sandbox_pb2.GetWorkspaceSandboxUsageResponse:
        """Say what a workspace uses, and of what it may use only so much."""
        reading.require_workspace(request.workspace_id)

        def look(tx: Transaction) -> tuple[Usage, Quota]:
            return workspaces.usage(tx, tx.home), workspaces.get(tx, tx.home).quota

        used, quota = await self.parts.world.read(look)
        return sandbox_pb2.GetWorkspaceSandboxUsageResponse(limits=_limits(used, quota))

    @unary
    async def GetSessionMetrics(
        self, request: sandbox_pb2.GetSessionMetricsRequest, context: Context
    ) -> sandbox_pb2.GetSessionMetricsResponse:
        """Say what a session has used of its CPUs and of the host's memory, on average."""
        guest, record = await finding.living(self.parts, request.session_id)
        window = _WINDOW
        if request.HasField("window"):
            window = reading.span(request.window, "window")
        end = datetime.now(UTC)
        found = await self.parts.history.average(guest.id, window)
        cpu = _observed(records_pb2.SessionCPUUsageAverage(limit_cores=record.cpus), found, window)
        memory = _observed(
            records_pb2.SessionMemoryUsageAverage(limit_bytes=record.memory * MIB), found, window
        )
        if found.cores is not None:
            cpu.average_cores = found.cores
            cpu.average_percent = 100 * found.cores / record.cpus
        if found.bytes is not None:
            memory.average_bytes = found.bytes
            memory.average_percent = 100 * found.bytes / (record.memory * MIB)
        return sandbox_pb2.GetSessionMetricsResponse(
            session_id=record.id,
            requested_window=convert.duration(window),
            window_start=convert.timestamp(end - window),
            window_end=convert.timestamp(end),
            cpu=cpu,
            memory=memory,
        )


def _observed(message: Any, found: Average, window: timedelta) -> Any:
    message.sample_count = found.samples
    message.observed_duration.CopyFrom(convert.duration(found.observed))
    message.coverage_percent = min(100.0, 100 * (found.observed / window))
    if found.first is not None and found.last is not None:
        message.first_sample_at.CopyFrom(convert.moment(found.first))
        message.last_sample_at.CopyFrom(convert.moment(found.last))
    return message


def _limits(used: Usage, quota: Quota) -> list[records_pb2.WorkspaceSandboxUsageLimit]:
    found = []
    for name, key, label, unit, each, help_text in _ROWS:
        most = getattr(quota, name)
        limit = records_pb2.WorkspaceSandboxUsageLimit(
            key=key,
            label=label,
            unit=unit,
            current=getattr(used, name) * each,
            help_text=help_text,
        )
        if most is not None:
            limit.max = most * each
        found.append(limit)
    return found
