"""A spec as libvirt's domain XML. Pure, and built as a tree: no text becomes markup.

libvirt is told what it has to know to start and account for the domain (name, size, kernel, user).
The hardware, RAM and our sockets are passed through in the words that the plain launcher uses, so
that a guest sees the same machine under both; see `command_line`.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from stratabox.daemon.hypervisor import command_line
from stratabox.daemon.hypervisor.machine import ChainLayer, DomainSpec
from stratabox.daemon.hypervisor.memory import tracking
from stratabox.daemon.hypervisor.qemu_host import BIOS

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


class PathFiles:
    """Files and sockets by their paths. Implements `command_line.Files`."""

    def __init__(self, spec: DomainSpec) -> None:
        self._spec = spec

    def firmware_dir(self) -> str:
        """-L."""
        return str(self._spec.firmware_dir)

    def ram(self) -> str:
        """Anonymous memory."""
        return tracking.FRESH

    def state(self) -> None:
        """Nothing: this launcher does not restore memory yet."""

    def bios(self) -> str:
        """The flash's file."""
        return str(self._spec.firmware_dir / BIOS)

    def kernel(self) -> str:
        """-kernel."""
        return str(self._spec.kernel)

    def initrd(self) -> str:
        """-initrd."""
        return str(self._spec.initrd)

    def layer(self, layer: ChainLayer, *, active: bool) -> str:
        """A layer's own file."""
        return str(layer.path)

    def listener(self, name: str) -> str:
        """A socket that QEMU makes itself; its path is at most 107 bytes long."""
        path = str(self._spec.folder / name)
        return "path=" + path.replace(",", ",,")

    def extra(self) -> Sequence[str]:
        """Nothing."""
        return ()


def build(spec: DomainSpec, name: str, *, emulator: Path, uid: int) -> str:
    """The XML of a transient domain.

    :param uid: user and group that QEMU runs as; files are not relabelled for it.
    """
    ET.register_namespace("qemu", QEMU_NAMESPACE)
    machine = spec.machine
    kvm = machine.accelerator == "kvm"
    domain = ET.Element("domain", type="kvm" if kvm else "qemu")
    _text(domain, "name", name)
    _text(domain, "uuid", str(spec.sandbox))
    _text(domain, "memory", str(spec.memory), unit="MiB")
    _text(domain, "vcpu", str(spec.cpus))
    system = ET.SubElement(domain, "os")
    _text(system, "type", "hvm", arch="x86_64", machine=machine.machine_type)
    if machine.kernel_boot is not None:
        _text(system, "kernel", str(spec.kernel))
        _text(system, "initrd", str(spec.initrd))
        _text(system, "cmdline", machine.kernel_boot.command_line)
    features = ET.SubElement(domain, "features")
    ET.SubElement(features, "acpi")
    ET.SubElement(domain, "cpu", mode="host-passthrough" if kvm else "maximum", check="none")
    ET.SubElement(domain, "clock", offset="utc")
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", str(emulator))
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")
    label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
    _text(label, "label", f"+{uid}:+{uid}")
    passed = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    for argument in (
        *("-machine", command_line.MACHINE_PROPERTIES),
        *command_line.hardware(spec, PathFiles(spec)),
    ):
        ET.SubElement(passed, f"{{{QEMU_NAMESPACE}}}arg", value=argument)
    return ET.tostring(domain, encoding="unicode")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
