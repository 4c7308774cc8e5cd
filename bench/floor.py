"""The floor: what raw QEMU can do on this host, driven by hand, with no daemon in the way.

The method is the daemon's: RAM is a private mapping, its pages are found by the kernel and read by
process_vm_readv, the devices' state goes in and out beside them. It is made as fast as that method
can be, so that a slow floor flatters nobody:

- sockets, empty overlays and a restore's first commands are ready before a clock starts;
- QEMU gets no seccomp filter, no uid of its own, and nothing that tracks what is written;
- a saved RAM is copied once, into the very file that the copies map, and nothing is made durable.

The guest is the daemon's: the same image, kernel, firmware, devices and disks.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import socket
import subprocess
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.rounds import Stopwatch
from bench.scene import Frozen, Scene
from bench.wire import Agent, Monitor
from stratabox.daemon.hypervisor import command_line
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainDisk, DomainSpec
from stratabox.daemon.hypervisor.memory import mapping
from stratabox.daemon.hypervisor.memory.pages import PageMap, Runs
from stratabox.daemon.hypervisor.qemu_host import BIOS, QemuHost
from stratabox.daemon.hypervisor.sockets import AGENT, ALL, MONITOR
from stratabox.storage.model.ids import LayerId, SandboxId, mint

PAGE = mapping.PAGE
FRESH = "/dev/zero"
_VECTORS = 1024
_AT_ONCE_PER_CPU = 2
"""The quickest that was found; 1 or 8 take 5 % more."""
_POPULATE_WRITE = 23
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK

_readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
_readv.restype = ctypes.c_ssize_t
_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Restored:
    """When each step of a restore was over, in ms since QEMU's process was made."""

    greeted: float
    running: float
    agent: float
    first_exec: float


class Guest:
    """A QEMU and both its sockets; a context manager that ends it."""

    def __init__(self, folder: Path, scene: Scene, overlay: ChainLayer, ram: str, host: QemuHost):
        self.folder, self.scene, self.overlay, self._ram = folder, scene, overlay, ram
        self._program = str(host.path)
        self._listening = {name: _listen(folder / name) for name in ALL}
        self.monitor = Monitor(str(folder / MONITOR))
        self.agent = Agent(str(folder / AGENT))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.monitor.close()
        self.agent.close()
        for listening in self._listening.values():
            listening.close()
        shutil.rmtree(self.folder)

    @property
    def pid(self) -> int:
        """Of the QEMU."""
        assert self._process is not None
        return self._process.pid

    def spawn(self, state: int | None = None) -> None:
        """Start QEMU with its vCPUs stopped."""
        scene = self.scene
        chain = (self.overlay, *scene.chain)
        spec = DomainSpec(
            sandbox=SandboxId(mint()),
            # Nobody is at the other end of an uplink here, and QEMU 7.2 can crash by that.
            machine=replace(scene.machine, uplink=False),
            cpus=scene.cpus,
            memory=scene.memory,
            vmgenid=mint(),
            disks=[DomainDisk(index=0, serial="disk0", chain=chain)],
            firmware_dir=scene.firmware,
            kernel=scene.kernel,
            initrd=scene.initrd,
            folder=self.folder,
            uid=None,
        )
        files = _Files(spec, self._ram, self._listening)
        arguments = command_line.build(spec, "floor", files)
        confined = arguments.index("-sandbox")
        del arguments[confined : confined + 2]
        given = [listening.fileno() for listening in self._listening.values()]
        if state is not None:
            # Loaded as QEMU starts, and so sooner than by our daemon, whose guests have an uplink.
            arguments += ["-incoming", f"fd:{state}"]
            arguments += ["-global", "migration.send-configuration=off"]
            given += [state, int(self._ram.rpartition("/")[2])]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=given,
                start_new_session=True,  # as the daemon's: Linux shares CPUs out by session
            )

    def anonymous_bytes(self) -> int:
        """Memory that this process alone has."""
        return anonymous_bytes(self.pid)


class Floor:
    """Starts, freezes and restores guests by hand, in a folder of its own."""

    def __init__(self, host: QemuHost, folder: Path) -> None:
        self._host, self._folder = host, folder
        folder.mkdir()

    @contextmanager
    def booted(self, scene: Scene) -> Iterator[Guest]:
        """A guest that was booted and whose agent has answered."""
        with self._new(scene, FRESH) as guest:
            guest.spawn()
            guest.monitor.begin("cont")
            guest.monitor.greeted()
            guest.monitor.answer()
            guest.agent.begin()
            guest.agent.synced()
            yield guest

    @contextmanager
    def prepared(self, frozen: Frozen, scene: Scene | None = None) -> Iterator[Guest]:
        """All that a restore needs but the QEMU, which `restore` starts."""
        with self._new(scene or frozen.scene, f"/proc/self/fd/{frozen.ram}") as guest:
            yield guest

    @contextmanager
    def frozen(self, guest: Guest) -> Iterator[Frozen]:
        """Freeze a running guest's memory, devices and disk, and let it go on."""
        overlay = self._overlay(guest.scene.disk_bytes)
        node = command_line.layer_node(overlay, str(overlay.path), read_only=False, backing=None)
        guest.monitor.execute("blockdev-add", **_underscored(node))
        with _Ram(guest) as ram:
            state = os.memfd_create("floor-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                ram.expect_private()
                guest.monitor.execute("stop")
                guest.monitor.execute(
                    "blockdev-snapshot", node=guest.overlay.node, overlay=overlay.node
                )
                guest.monitor.execute(
                    "xen-save-devices-state",
                    filename=f"/proc/{os.getpid()}/fd/{state}",
                    live=False,
                )
                ram.copy_private()
                guest.monitor.execute("cont")
            except BaseException:
                os.close(state)
                raise
            guest.scene = replace(guest.scene, chain=(guest.overlay, *guest.scene.chain))
            guest.overlay = overlay
            frozen = Frozen(scene=guest.scene, ram=ram.sealed(), state=state)
        try:
            yield frozen
        finally:
            frozen.close()

    def fan_out(
        self, guest: Guest, count: int, stack: ExitStack, *, execs: int = 1
    ) -> tuple[list[Guest], float]:
        """Freeze a guest and start copies: them, and ms until each has run so many commands."""

        def start(copy: Guest) -> None:
            restore(copy, frozen.state)
            for _ in range(execs - 1):
                copy.agent.sh("true")

        overlays = [self._overlay(guest.scene.disk_bytes) for _ in range(count)]
        watch = Stopwatch()
        frozen = stack.enter_context(self.frozen(guest))
        ram = f"/proc/self/fd/{frozen.ram}"
        copies = [
            stack.enter_context(Guest(self._place(), frozen.scene, each, ram, self._host))
            for each in overlays
        ]
        for copy in copies:
            copy.agent.poll_seconds *= _AT_ONCE_PER_CPU
        with ThreadPoolExecutor(_AT_ONCE_PER_CPU * (os.cpu_count() or 1)) as threads:
            list(threads.map(start, copies))
        return copies, watch.ms

    def _new(self, scene: Scene, ram: str) -> Guest:
        return Guest(self._place(), scene, self._overlay(scene.disk_bytes), ram, self._host)

    def _place(self) -> Path:
        place = self._folder / mint()[:8]
        place.mkdir()
        return place

    def _overlay(self, size: int) -> ChainLayer:
        """An empty layer. What it stands on is spelled out to QEMU, not written in it."""
        template = self._folder / f"{size}.qcow2"
        if not template.exists():
            command = ["qemu-img", "create", "-q", "-f", "qcow2", str(template), str(size)]
            subprocess.run(command, check=True)
        layer = LayerId(mint())
        path = self._folder / f"{layer}.qcow2"
        shutil.copyfile(template, path)
        return ChainLayer(id=layer, path=path)


def restore(guest: Guest, state: int) -> Restored:
    """Start QEMU on a frozen guest and run a first command in it."""
    own_state = os.open(f"/proc/self/fd/{state}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        watch = Stopwatch()
        guest.monitor.begin("cont")  # QEMU keeps it until the state is loaded
        guest.agent.begin("true")
        guest.spawn(own_state)
        guest.monitor.greeted()
        greeted = watch.ms
        guest.monitor.wait_event("RESUME")
        running = watch.ms
        guest.agent.synced()
        agent = watch.ms
        guest.agent.ended()
        return Restored(greeted=greeted, running=running, agent=agent, first_exec=watch.ms)
    finally:
        os.close(own_state)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs and nobody shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise LookupError(f"process {pid} has no Anonymous")


class _Files:
    """Names of what QEMU opens; implements `command_line.Files`."""

    def __init__(self, spec: DomainSpec, ram: str, listening: dict[str, socket.socket]) -> None:
        self._spec, self._ram, self._listening = spec, ram, listening

    def firmware_dir(self) -> str:
        """A plain path, as all others."""
        return str(self._spec.firmware_dir)

    def ram(self) -> str:
        """Zeros, or a sealed file."""
        return self._ram

    def bios(self) -> str:
        """The flash's file."""
        return str(self._spec.firmware_dir / BIOS)

    def kernel(self) -> str:
        """-kernel."""
        return str(self._spec.kernel)

    def initrd(self) -> str:
        """-initrd."""
        return str(self._spec.initrd)

    def seed(self) -> str:
        raise AssertionError("these guests have none")

    def layer(self, layer: ChainLayer, *, active: bool) -> str:
        """A layer's own file."""
        return str(layer.path)

    def listener(self, name: str) -> str:
        """A socket that listens already."""
        return f"fd={self._listening[name].fileno()}"

    def network(self, name: str) -> dict[str, str]:
        """The same, as JSON has it."""
        return {"type": "fd", "str": str(self._listening[name].fileno())}

    def extra(self) -> Sequence[str]:
        """Nothing."""
        return ()


class _Ram:
    """A file in memory that a guest's private pages are copied into; a context manager."""

    def __init__(self, guest: Guest) -> None:
        path = str(guest.monitor.execute("qom-get", path="/objects/ram", property="mem-path"))
        self._from = mapping.find(guest.pid, path, guest.scene.memory << 20)
        self._file = os.memfd_create("floor-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._file, self._from.size)
        self._map = mmap.mmap(self._file, self._from.size)
        self._pin: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)
        self._given = False

    def __enter__(self) -> _Ram:
        return self

    def __exit__(self, *_: object) -> None:
        self._pin = None
        self._map.close()
        if not self._given:
            os.close(self._file)

    def expect_private(self) -> None:
        """Have pages ready for what the guest has written by now."""
        with PageMap(self._from) as pages:
            for first, count in pages.private():
                self._map.madvise(_POPULATE_WRITE, first * PAGE, count * PAGE)

    def copy_private(self) -> None:
        """Copy every private page."""
        with PageMap(self._from) as pages:
            runs = pages.private()
        assert self._pin is not None
        base = ctypes.addressof(self._pin)
        for begin in range(0, len(runs), _VECTORS):
            _copy(self._from, base, runs[begin : begin + _VECTORS])

    def sealed(self) -> int:
        """The file, which nobody can change from now on; the caller closes it."""
        self._pin = None
        self._map.close()
        fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, _SEALS)
        self._given = True
        return self._file


def _copy(where: mapping.RamMapping, base: int, runs: Runs) -> None:
    remote, local = array("Q"), array("Q")
    for first, count in runs:
        remote.extend((where.start + first * PAGE, count * PAGE))
        local.extend((base + first * PAGE, count * PAGE))
    expected = sum(count for _, count in runs) * PAGE
    got = _readv(
        where.pid,
        local.buffer_info()[0],
        len(runs),
        remote.buffer_info()[0],
        len(runs),
        0,
    )
    if got != expected:
        raise OSError(ctypes.get_errno(), f"read {got} of {expected} bytes of a guest's memory")


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    return listening


def _underscored(node: dict[str, object]) -> dict[str, object]:
    return {key.replace("-", "_"): value for key, value in node.items()}
