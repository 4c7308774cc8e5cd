"""Guests on launchers by themselves, without a daemon: a folder, an image, and specs on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from stratabox.daemon.hypervisor import accelerator, confinement, qemu_host
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.events import AgentPort, Event
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.exec import execute
from stratabox.daemon.hypervisor.machine import (
    ChainLayer,
    DomainDisk,
    DomainSpec,
    Launcher,
    SavedMemory,
)
from stratabox.daemon.hypervisor.memory.load import load_devices
from stratabox.daemon.hypervisor.qemu import QemuLauncher
from stratabox.daemon.hypervisor.qemu_host import QemuHost
from stratabox.daemon.images.artifact import BuiltImage, no_progress
from stratabox.daemon.images.cache import cached
from stratabox.daemon.images.tiny import build_tiny
from stratabox.storage.model.ids import LayerId, SandboxId, Sha256, mint
from stratabox.storage.model.records import KernelBoot
from support.daemon import CACHE

QEMU_UID = 60123 if os.getuid() == 0 else None
NOTHING = Sha256("0" * 64)


async def make_bench(root: Path) -> Bench:
    """A bench with the tiny image, which is built where the cache has none."""
    work = root / "image"
    work.mkdir()
    image = await cached(
        CACHE,
        work,
        recipe="tiny",
        arguments={},
        build=lambda: build_tiny(work, progress=no_progress),
        progress=no_progress,
    )
    return Bench(root / "bench", image, await qemu_host.probe())


class Bench:
    """A private folder with an image, and specs of guests on it."""

    def __init__(self, root: Path, image: BuiltImage, host: QemuHost) -> None:
        self.root, self.host, self._image = root, host, image
        root.mkdir(mode=0o700)
        self.launcher = QemuLauncher(
            host, f"test{os.getpid()}", self.folder, confinement.examine(host.path)
        )
        self._firmware = root / "firmware"
        self._firmware.mkdir(mode=0o755)
        for name, path in host.firmware_sources.items():
            shutil.copyfile(path, self._firmware / name)
            (self._firmware / name).chmod(0o444)
        for given in (image.kernel, image.initrd):
            assert given is not None
            given.chmod(0o444)
        image.disk.chmod(0o400)
        self._base = ChainLayer(id=LayerId(mint()), path=image.disk)

    def folder(self, sandbox: SandboxId) -> Path:
        return self.root / "sandboxes" / sandbox

    def overlay(self, below: Path) -> ChainLayer:
        layer = LayerId(mint())
        path = self.root / f"{layer}.qcow2"
        options = ["-q", "-f", "qcow2", "-F", "qcow2", "-b", str(below)]
        command = ["qemu-img", "create", *options, str(path)]
        subprocess.run(command, check=True)
        path.chmod(0o600)
        return ChainLayer(id=layer, path=path)

    def restored(
        self, spec: DomainSpec, saved: SavedMemory, disks: Sequence[ChainLayer]
    ) -> DomainSpec:
        """Another sandbox with the same machine, that goes on from saved memory.

        :param disks: what its root disk stands on, newest first; sealed.
        """
        sandbox = SandboxId(mint())
        self.folder(sandbox).mkdir(mode=0o700, parents=True)
        chain = [self.overlay(disks[0].path), *disks]
        return replace(
            spec,
            sandbox=sandbox,
            vmgenid=mint(),
            disks=[replace(spec.disks[0], chain=chain)],
            folder=self.folder(sandbox),
            saved=saved,
        )

    async def spec(self, uid: int | None = QEMU_UID, *, memory: int = 256) -> DomainSpec:
        sandbox = SandboxId(mint())
        self.folder(sandbox).mkdir(mode=0o700, parents=True)
        firmware = dict.fromkeys(self.host.firmware_sources, NOTHING)
        boot = KernelBoot(kernel=NOTHING, initrd=NOTHING, command_line=self._image.command_line)
        chosen = await accelerator.choose()
        chain = [self.overlay(self._base.path), self._base]
        return DomainSpec(
            sandbox=sandbox,
            machine=qemu_host.new_machine(self.host, chosen, firmware, boot),
            cpus=2,
            memory=memory,
            vmgenid=mint(),
            disks=[DomainDisk(index=0, serial="root", chain=chain)],
            firmware_dir=self._firmware,
            kernel=self._image.kernel,
            initrd=self._image.initrd,
            folder=self.folder(sandbox),
            uid=uid,
        )


class Running:
    """A guest that runs, and what it told."""

    def __init__(self, spec: DomainSpec, domain: Domain, agent: GuestAgent) -> None:
        self.spec, self.domain, self.agent = spec, domain, agent
        self.pid = domain.handle.pid

    async def sh(self, line: str) -> str:
        result = await execute(self.agent, ["sh", "-c", line], timeout=300)
        assert result.exit_code == 0, result
        return result.stdout.decode().strip()


@asynccontextmanager
async def running(launcher: Launcher, spec: DomainSpec) -> AsyncIterator[Running]:
    """A guest that runs, from the beginning or from saved memory, until the context ends."""
    handle = await launcher.start(spec)
    agent = GuestAgent(spec.folder)

    def hear(event: Event) -> None:
        if isinstance(event, AgentPort):
            agent.port_changed(is_open=event.open)

    try:
        domain = await Domain.attach(handle, hear, fresh=True)
        try:
            if spec.saved is not None:
                await load_devices(domain, wired=spec.machine.uplink)
            # Nobody is at the other end of its network: see Domain.wired.
            await domain.set_link(up=False)
            await domain.cont()
            await agent.wait_ready(120)
            yield Running(spec, domain, agent)
        finally:
            await domain.detach()
            await agent.close()
    finally:
        await launcher.stop(handle)
