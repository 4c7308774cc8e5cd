"""The virtual hardware, as QEMU's arguments. Pure: nothing here opens, starts or asks.

All that a guest can see (addresses, serials, ids) is spelled out, because a later start must give
it the same machine; QEMU's own choices may change with its version. PCI bus of every guest:

```
00.0 host bridge   02.0 random numbers   03.0 virtio-serial (4 ports)    04.0 network card
05.0 panic         06.0 volumes (SCSI)   08.0+N disk N               18.0 seed
1f.x ICH9
```

Volumes come and go while a guest runs, which the root bus does not know; so they have a bus of
their own, where volume N is target N.

Options whose values are not fixed words are passed as JSON, so that no text can break out of its
value. Files are named by a `Files` that the launcher gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stratabox.daemon.hypervisor.events import AGENT_PORT, CHANNEL_PORTS, EXEC_PORT
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainDisk, DomainSpec, DomainVolume
from stratabox.storage.model.errors import InvalidArgumentError

MAX_DISKS = 16
MAX_VOLUMES = 16
VOLUMES_SLOT = 6
"""PCI slot of the bus of volumes."""
HUGE_PAGE = 2 << 20
"""RAM begins at a multiple of it, so that the kernel can use huge pages."""

MACHINE_PROPERTIES = ",".join(
    [
        "memory-backend=ram",
        "pflash0=fw",  # as flash the BIOS is the same after a restore of memory; as ROM not
        "suppress-vmdesc=on",
        "dump-guest-core=off",
        "mem-merge=off",  # pages merged across sandboxes can be told by timing
        # What q35 brings along and our guests do not need:
        "graphics=off",
        "usb=off",
        "sata=off",
        "vmport=off",
        "smm=off",
    ]
)
CHANNEL_NAMES = ("org.stratabox.ssh.0", "org.stratabox.ssh.1")
"""What the guest finds the channel's ports by."""
EXEC_NAME = "org.stratabox.exec.0"
"""And the one that commands go by while there is no channel."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

STAND_IN_BYTES = 16 << 40
SEED_NODE = "seed"
_FIRST_DISK_SLOT = 8
_SEED_SLOT = _FIRST_DISK_SLOT + MAX_DISKS
"""Behind all disks, as guests number them by their slots."""
_SERIAL_MAX = 20
_KERNEL_WORDS = {"tcg": " no_timer_check"}
"""By accelerator. Linux counts ticks while it boots, and panics when the emulated CPU was not run
meanwhile ("IO-APIC + timer doesn't work!", seen on a busy host); under KVM it does not do that."""

_SOUND_THREADS = (8, 2)
"""The first QEMU whose emulated CPUs can run at once. In those before, one that touches a device
while another one maps some may find nothing there, and QEMU ends by SIGSEGV: seen once, in a guest
that booted (mended by QEMU's commit "softmmu: Use async_run_on_cpu in tcg_commit")."""


class Files(Protocol):
    """How the QEMU that is started gets at files and sockets."""

    def firmware_dir(self) -> str:
        """A folder that QEMU can look into, for -L."""

    def ram(self) -> str:
        """File that the guest's RAM is a private mapping of."""

    def bios(self) -> str:
        """File name of the BIOS, for a block node."""

    def kernel(self) -> str:
        """File name of the kernel, for -kernel (opened by plain fopen)."""

    def initrd(self) -> str:
        """File name of the initrd."""

    def seed(self) -> str:
        """File name of the seed, for a block node."""

    def layer(self, layer: ChainLayer, *, active: bool) -> str:
        """File name of a layer, for a block node; active ones can be reopened both ways."""

    def listener(self, name: str) -> str:
        """Where a server chardev listens, as "fd=7" or "path=/…", without commas inside."""

    def network(self, name: str) -> Mapping[str, str]:
        """Where the card's wire listens, as a socket address of QEMU's."""

    def extra(self) -> Sequence[str]:
        """Arguments that hand over descriptors. Asked after everything else."""


def _accelerator(spec: DomainSpec) -> str:
    machine = spec.machine
    if machine.accelerator != "tcg" or spec.cpus == 1:
        return machine.accelerator
    version = tuple(int(number) for number in machine.qemu_version.split(".")[:2])
    return "tcg" if version >= _SOUND_THREADS else "tcg,thread=single"


def build(spec: DomainSpec, name: str, files: Files) -> list[str]:
    """QEMU's arguments, without the program itself.

    :param name: the domain's name, of letters, digits and dashes.
    :raise InvalidArgumentError: for more than `MAX_DISKS` disks or a serial above 20 bytes.
    """
    machine = spec.machine
    return [
        *("-name", f"guest={name}"),
        *("-uuid", str(spec.sandbox)),
        "-S",
        "-nodefaults",
        "-no-user-config",
        *("-display", "none"),
        *("-msg", "timestamp=on"),
        *("-machine", f"{machine.machine_type},{MACHINE_PROPERTIES}"),
        *("-accel", _accelerator(spec)),
        *("-cpu", machine.cpu_model),
        *("-smp", f"cpus={spec.cpus},sockets=1,cores={spec.cpus},threads=1"),
        *("-m", f"size={spec.memory}M"),
        *("-rtc", "base=utc"),
        *_boot(spec, files),
        *_incoming(spec),
        *hardware(spec, files),
        *("-sandbox", SANDBOX),
        *files.extra(),
    ]


def hardware(spec: DomainSpec, files: Files) -> list[str]:
    """What every launcher passes in the same words: RAM, firmware, disks, devices, control."""
    ram = {
        "qom-type": "memory-backend-file",
        "id": "ram",
        "size": spec.memory << 20,
        "mem-path": files.ram(),
        "share": False,
        "align": HUGE_PAGE,
    }
    arguments = [
        *("-object", _json(ram)),
        # A panicked guest stays for a look at its console. Everything else is QEMU's default.
        *("-action", "panic=pause"),
        *("-L", files.firmware_dir()),
        *("-blockdev", _json(bios_node(files.bios()))),
    ]
    known: set[str] = set()
    for disk in spec.disks:
        arguments += disk_arguments(disk, files, known)
    if spec.machine.seed:
        arguments += seed_arguments(files.seed())
    if spec.machine.volumes:
        arguments += ["-device", _pci("virtio-scsi-pci", "volumes", VOLUMES_SLOT, num_queues=1)]
    for volume in spec.volumes:
        arguments += volume_arguments(volume, files, known)
    arguments += [*_devices(spec, files), *control_arguments(files)]
    if spec.machine.channel:
        arguments += channel_arguments(files)
    if spec.machine.exec_port:
        arguments += exec_arguments(files)
    return arguments


def bios_node(filename: str) -> dict[str, object]:
    """The BIOS as a read-only node for the flash."""
    return {"driver": "file", "node-name": "fw", "filename": filename, "read-only": True}


def layer_node(
    layer: ChainLayer, filename: str, *, read_only: bool, backing: str | None
) -> dict[str, object]:
    """A layer's node for -blockdev or blockdev-add.

    The file is defined inside and says nothing about read-only itself: so it follows its parent,
    also when QEMU reopens the parent read-only after a switch of overlays.

    Only active layers are locked. Sealed ones need it not, and a source that was switched while
    paused keeps its writing descriptor, and with it its lock on the layer below, until it runs.
    """
    return {
        "driver": "qcow2",
        "node-name": layer.node,
        "read-only": read_only,
        "discard": "ignore",  # QEMU 7.2 can corrupt a qcow2 when discards meet copy-on-write
        "detect-zeroes": "off",
        "cache": {"direct": False, "no-flush": False},
        "file": {
            "driver": "file",
            "node-name": layer.file_node,
            "filename": filename,
            "aio": "threads",
            # A layer that was sealed under a paused guest stays locked until that runs again (QEMU
            # keeps the writing descriptor so long), and its readers must not wait for that.
            "locking": "off" if read_only else "on",
            "discard": "ignore",
            "cache": {"direct": False, "no-flush": False},
        },
        "backing": backing,
    }


def disk_arguments(disk: DomainDisk, files: Files, known: set[str]) -> list[str]:
    """A disk's whole chain from the image up, spelled out, and its device.

    :param known: nodes that other disks' chains brought along; those of this one are added.
    """
    if not 0 <= disk.index < MAX_DISKS:
        raise InvalidArgumentError(f"A sandbox has at most {MAX_DISKS} disks.")
    if len(disk.serial.encode()) > _SERIAL_MAX:
        raise InvalidArgumentError(f"A disk's serial is at most {_SERIAL_MAX} bytes long.")
    active = disk.chain[0]
    arguments = _chain_arguments(disk.chain, files, known, writable=active)
    device: dict[str, object] = {
        "driver": "virtio-blk-pci",
        "id": disk.device,
        "drive": active.node,
        "bus": "pcie.0",
        "addr": f"{_FIRST_DISK_SLOT + disk.index:#x}",
        "disable-legacy": "on",
        "serial": disk.serial,
        "write-cache": "on",
        "werror": "enospc",  # a full host stops the guest, and it goes on when there is room
        "rerror": "report",
    }
    if disk.index == 0:
        device["bootindex"] = 1  # 0 is the kernel's, where QEMU loads one
    return [*arguments, "-device", _json(device)]


def seed_arguments(filename: str) -> list[str]:
    """The disk by which cloud-init sets the guest up, which nobody writes."""
    node = {"driver": "file", "node-name": SEED_NODE, "filename": filename, "read-only": True}
    return [
        *("-blockdev", _json(node)),
        *("-device", _pci("virtio-blk-pci", "seed", _SEED_SLOT, drive=SEED_NODE, serial="seed")),
    ]


def volume_arguments(volume: DomainVolume, files: Files, known: set[str]) -> list[str]:
    """A volume's whole chain, or its stand-in, and its device. `known` as in `disk_arguments`."""
    if volume.chain:
        writable = None if volume.read_only else volume.chain[0]
        arguments = _chain_arguments(volume.chain, files, known, writable=writable)
    else:
        arguments = ["-blockdev", _json(stand_in_node(volume))]
    return [*arguments, "-device", _json(volume_device(volume))]


def stand_in_node(volume: DomainVolume) -> dict[str, object]:
    """A node that reads as zeros, as large as any volume, and keeps nothing."""
    return {
        "driver": "null-co",
        "node-name": volume.node,
        "size": STAND_IN_BYTES,
        "read-zeroes": True,
    }


def volume_device(volume: DomainVolume) -> dict[str, object]:
    """A volume's device, for -device or device_add.

    :raise InvalidArgumentError: for a slot or a serial that cannot be.
    """
    if not 0 <= volume.slot < MAX_VOLUMES:
        raise InvalidArgumentError(f"A sandbox has at most {MAX_VOLUMES} volumes.")
    if len(volume.serial.encode()) > _SERIAL_MAX:
        raise InvalidArgumentError(f"A volume's serial is at most {_SERIAL_MAX} bytes long.")
    return {
        "driver": "scsi-hd",
        "id": volume.device,
        "drive": volume.node,
        "bus": "volumes.0",
        "channel": 0,
        "scsi-id": volume.slot,
        "lun": 0,
        "serial": volume.serial,
        "write-cache": "on",
        "werror": "enospc",
        "rerror": "report",
    }


def _chain_arguments(
    chain: Sequence[ChainLayer], files: Files, known: set[str], *, writable: ChainLayer | None
) -> list[str]:
    arguments: list[str] = []
    backing: str | None = None
    for layer in reversed(chain):
        if layer.node not in known:
            known.add(layer.node)
            filename = files.layer(layer, active=layer is writable)
            node = layer_node(layer, filename, read_only=layer is not writable, backing=backing)
            arguments += ["-blockdev", _json(node)]
        backing = layer.node
    return arguments


def control_arguments(files: Files) -> list[str]:
    """Two monitors, the agent's channel and the console."""
    port = {
        "driver": "virtserialport",
        "id": AGENT_PORT,
        "bus": "serial0.0",
        "nr": 1,
        "chardev": "agent",
        "name": "org.qemu.guest_agent.0",
    }
    return [
        *("-chardev", f"socket,id=qmp,{files.listener('qmp.sock')},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"socket,id=rescue,{files.listener('rescue.sock')},server=on,wait=off"),
        *("-mon", "chardev=rescue,mode=control"),
        *("-device", _pci("virtio-serial-pci", "serial0", 3, max_ports=16)),
        *("-chardev", f"socket,id=agent,{files.listener('agent.sock')},server=on,wait=off"),
        *("-device", _json(port)),
        *("-chardev", f"socket,id=console,{files.listener('console.sock')},server=on,wait=off"),
        *("-serial", "chardev:console"),
    ]


def channel_arguments(files: Files) -> list[str]:
    """The ports that the guest's sshd is spoken to through; see `guest.channel`."""
    arguments = []
    for number, name in enumerate(CHANNEL_NAMES):
        port = {
            "driver": "virtserialport",
            "id": CHANNEL_PORTS[number],
            "bus": "serial0.0",
            "nr": 2 + number,
            "chardev": f"channel{number}",
            "name": name,
        }
        listener = files.listener(f"ssh{number}.sock")
        chardev = f"socket,id=channel{number},{listener},server=on,wait=off"
        arguments += ["-chardev", chardev, "-device", _json(port)]
    return arguments


def exec_arguments(files: Files) -> list[str]:
    """The port that a first command goes by; see `guest.exec_port`."""
    port = {
        "driver": "virtserialport",
        "id": EXEC_PORT,
        "bus": "serial0.0",
        "nr": 2 + len(CHANNEL_NAMES),
        "chardev": "exec",
        "name": EXEC_NAME,
    }
    return [
        *("-chardev", f"socket,id=exec,{files.listener('exec.sock')},server=on,wait=off"),
        *("-device", _json(port)),
    ]


def _boot(spec: DomainSpec, files: Files) -> list[str]:
    arguments = ["-boot", "menu=off,strict=on"]
    boot = spec.machine.kernel_boot
    if boot is None:
        return arguments
    return [
        *arguments,
        *("-kernel", files.kernel()),
        *("-initrd", files.initrd()),
        *("-append", f"{boot.command_line}{_KERNEL_WORDS.get(spec.machine.accelerator, '')}"),
    ]


def _incoming(spec: DomainSpec) -> list[str]:
    if spec.saved is None:
        return []
    # Loaded when it is told to: `memory.load`. The state was saved without the section in which a
    # stream describes its machine.
    return ["-incoming", "defer", "-global", "migration.send-configuration=off"]


def _devices(spec: DomainSpec, files: Files) -> list[str]:
    return [
        *("-object", _json({"qom-type": "rng-builtin", "id": "rng"})),
        *("-device", _pci("virtio-rng-pci", "rng0", 2, rng="rng")),
        *_network(spec, files),
        # Without romfile the PXE ROM would be guest ABI, and one more file from /usr/share.
        *(
            "-device",
            _pci("virtio-net-pci", "net0", 4, netdev="net", mac=spec.machine.mac, romfile=""),
        ),
        *(
            "-device",
            _json({"driver": "pvpanic-pci", "id": "panic", "bus": "pcie.0", "addr": "0x5"}),
        ),
        *("-device", _json({"driver": "vmgenid", "id": "genid", "guid": spec.vmgenid})),
    ]


def _network(spec: DomainSpec, files: Files) -> list[str]:
    """What the card is wired to: a socket that a helper connects to, where there is egress.

    Machines of before there was any have QEMU's own network, closed, whose state is part of theirs.
    """
    if not spec.machine.uplink:
        return ["-netdev", "user,id=net,restrict=on"]
    wire: dict[str, object] = {
        "type": "stream",
        "id": "net",
        "server": True,
        "addr": dict(files.network("net.sock")),
    }
    return ["-netdev", _json(wire)]


def _pci(driver: str, name: str, slot: int, **properties: object) -> str:
    """A modern virtio device on the root bus."""
    return _json(
        {
            "driver": driver,
            "id": name,
            "bus": "pcie.0",
            "addr": f"{slot:#x}",
            "disable-legacy": "on",
            **properties,
        }
    )


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"))


def as_text(path: Path) -> str:
    """A path as QEMU takes it where an option's value may not hold a comma unescaped."""
    return str(path).replace(",", ",,")
