"""HostService."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api.errors import unary
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.upkeep.checking import check_store
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import space
from stratabox.storage.files import usage
from stratabox.storage.model.records import MIB
from stratabox.v1 import host_pb2, host_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class HostServicer(host_pb2_grpc.HostServiceServicer):
    """What the daemon is and uses."""

    world: World
    guests: Guests

    @unary
    async def GetHost(
        self, request: host_pb2.GetHostRequest, context: ServicerContext[Any, Any]
    ) -> host_pb2.Host:
        """Return what runs here."""
        world = self.world
        account = await self._account()
        return host_pb2.Host(
            version=version("stratabox"),
            state_dir=str(world.store.layout.root),
            launcher=world.launcher.name,
            accelerator=world.accelerator.name,
            accelerator_reason=world.accelerator.reason,
            qemu_version=world.qemu.version_text,
            settings=[
                host_pb2.Setting(key=setting.key, value=setting.value, source=setting.source)
                for setting in world.config.settings()
            ],
            pid=os.getpid(),
            warm_spares=len(world.spares),
            memory_in_use=account.memory_granted,
            account=account,
            limits_by=world.housing.by,
            limits=sorted(world.housing.held),
            limits_reason=world.housing.why,
        )

    async def _account(self) -> host_pb2.HostAccount:
        world = self.world
        config, layout = world.config, world.store.layout
        account, growth = await world.read(
            lambda tx: (world.admission.account(tx), usage.growth(tx, layout) // MIB)
        )
        disk = await in_thread(usage.file_system, layout)
        free = max(0, disk.free - config.admission_disk_reserve) // MIB
        limits = account.limits
        return host_pb2.HostAccount(
            memory_total=account.room.total,
            memory_available=max(0, account.room.memory(swap=limits.swap) - limits.memory_reserve),
            memory_granted=account.memory,
            memory_limit=limits.memory,
            memory_own=account.own,
            memory_growth=account.growth,
            memory_growth_limit=account.growth_limit,
            cpus_total=account.room.cpus,
            cpus_granted=account.cpus,
            cpus_limit=account.cpu_limit,
            sandboxes=len(account.shares),
            sandboxes_limit=limits.sandboxes,
            disk_free=free,
            disk_growth=growth,
            disk_growth_limit=int(free * config.admission_disk_overcommit),
        )

    @unary
    async def GetDiskUsage(
        self, request: host_pb2.GetDiskUsageRequest, context: ServicerContext[Any, Any]
    ) -> host_pb2.DiskUsage:
        """Look at every file of the state folder."""
        world = self.world
        layout = world.store.layout

        def look() -> dict[str, usage.Part]:
            with world.catalog.looking() as tx:
                kinds = space.kinds(tx)
            return usage.survey(layout, kinds)

        parts = await in_thread(look)
        disk = await in_thread(usage.file_system, layout)
        return host_pb2.DiskUsage(
            parts=[
                host_pb2.DiskUsagePart(name=name, bytes=part.bytes, files=part.files)
                for name, part in parts.items()
            ],
            total_bytes=sum(part.bytes for part in parts.values()),
            budget_used_bytes=await world.read(lambda tx: usage.counted(tx, layout)),
            budget_bytes=world.config.store_budget,
            filesystem_bytes=disk.bytes,
            filesystem_free_bytes=disk.free,
            high_water_percent=world.config.store_high_water,
        )

    @unary
    async def CheckStore(
        self, request: host_pb2.CheckStoreRequest, context: ServicerContext[Any, Any]
    ) -> host_pb2.CheckStoreResponse:
        """Compare all that is kept with what the catalog says."""
        checked = await check_store(
            self.world, self.guests, repair=request.repair, deep=request.deep
        )
        return host_pb2.CheckStoreResponse(
            findings=[
                host_pb2.Finding(
                    reason=finding.reason,
                    kind=finding.kind,
                    subject=finding.subject,
                    message=finding.message,
                    cure=finding.cure,
                    repaired=finding.repaired,
                )
                for finding in checked.findings
            ],
            files=checked.files,
            bytes=checked.bytes,
            quarantined_files=checked.held.files,
            quarantined_bytes=checked.held.bytes,
        )
