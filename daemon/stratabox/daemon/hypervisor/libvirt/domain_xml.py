"""A spec as libvirt's domain XML. Pure, and built as a tree: no text becomes markup.

libvirt gets to know what it shows (`virsh list`, `virsh dominfo`, virt-manager): name, uuid, title,
size, machine, our ids. Devices it is told of none: it would add its own beside them, and manage
disks that change under it. `command_line` has the hardware; see the package.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor.machine import DomainSpec

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
OUR_NAMESPACE = "https://stratabox.dev/xmlns/libvirt/1"
"""Of <metadata>. A name, no address."""
_TITLE_MOST = 200


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """Who QEMU is, in the words of libvirt's security drivers.

    :param drivers: those that this libvirt has, as "apparmor" and "dac".
    """

    uid: int
    gid: int
    drivers: Collection[str]


def build(
    spec: DomainSpec,
    name: str,
    *,
    store_id: str,
    emulator: Path,
    arguments: Sequence[str],
    confinement: Confinement,
) -> str:
    """The XML of a transient domain.

    :param emulator: what libvirt runs as QEMU.
    :param arguments: what it is given besides libvirt's own words.
    """
    ET.register_namespace("qemu", QEMU_NAMESPACE)
    ET.register_namespace("stratabox", OUR_NAMESPACE)
    kvm = spec.machine.accelerator == "kvm"
    domain = ET.Element("domain", type="kvm" if kvm else "qemu")
    _text(domain, "name", name)
    _text(domain, "uuid", str(spec.sandbox))
    if title := _printable(spec.title):
        _text(domain, "title", title)
    _text(domain, "description", "A sandbox of Stratabox, which starts, stops and changes it.")
    ours = ET.SubElement(
        ET.SubElement(domain, "metadata"), f"{{{OUR_NAMESPACE}}}sandbox", id=str(spec.sandbox)
    )
    ours.set("store", store_id)
    ours.set("name", title)
    _text(domain, "memory", str(spec.memory), unit="MiB")
    _text(domain, "vcpu", str(spec.cpus))
    system = ET.SubElement(domain, "os")
    _text(system, "type", "hvm", arch="x86_64", machine=spec.machine.machine_type)
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    ET.SubElement(domain, "cpu", mode="host-passthrough" if kvm else "maximum", check="none")
    ET.SubElement(domain, "clock", offset="utc")
    # A guest that powers itself off or panics is ended or kept by us; libvirt only sees it.
    _text(domain, "on_crash", "preserve")
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", str(emulator))
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")
    _labels(domain, confinement)
    passed = ET.SubElement(domain, f"{{{QEMU_NAMESPACE}}}commandline")
    for argument in arguments:
        ET.SubElement(passed, f"{{{QEMU_NAMESPACE}}}arg", value=argument)
    return ET.tostring(domain, encoding="unicode")


def _labels(domain: ET.Element, confinement: Confinement) -> None:
    """A user of its own, and no files to label: it has them as descriptors.

    A profile or label of another driver would be made from the files in the XML, of which there are
    none, and refuse QEMU those that it was given.
    """
    for driver in sorted(confinement.drivers):
        if driver == "dac":
            label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
            _text(label, "label", f"+{confinement.uid}:+{confinement.gid}")
        elif driver != "none":
            ET.SubElement(domain, "seclabel", type="none", model=driver)


def _printable(text: str) -> str:
    """What XML can hold, on one line, as libvirt wants titles."""
    return "".join(each for each in text if each.isprintable())[:_TITLE_MOST]


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
