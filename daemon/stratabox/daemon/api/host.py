"""HostService."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api.errors import unary
from stratabox.daemon.lifecycle.world import World
from stratabox.v1 import host_pb2, host_pb2_grpc


@dataclass(frozen=True, kw_only=True)
class HostServicer(host_pb2_grpc.HostServiceServicer):
    """What the daemon is and uses."""

    world: World

    @unary
    async def GetHost(
        self, request: host_pb2.GetHostRequest, context: ServicerContext[Any, Any]
    ) -> host_pb2.Host:
        """Return what runs here."""
        world = self.world
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
        )
