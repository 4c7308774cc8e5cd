"""libvirt, to be compared with: its daemon, and one guest of ours as its domain."""

from __future__ import annotations

import json
import os
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import libvirtd
from bench.scene import Scene

NAME = "stratabox-bench"
"""Of the domain."""
_PING = '{"execute":"guest-ping"}'
_URI = "LIBVIRT_DEFAULT_URI"
"""What virsh connects to."""


absent = libvirtd.absent


@contextmanager
def daemon() -> Iterator[None]:
    """A libvirtd that `virsh` and the others here speak to."""
    with libvirtd.running() as running:
        os.environ[_URI] = running.uri
        try:
            yield
        finally:
            del os.environ[_URI]


@contextmanager
def domain(folder: Path, seen: Scene) -> Iterator[None]:
    """A guest of that machine on an overlay of its own, booted; it is gone at the end."""
    overlay, description = folder / "virsh.qcow2", folder / "virsh.xml"
    base = seen.chain[-1].path
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base)]
    subprocess.run([*command, str(overlay), str(seen.disk_bytes)], check=True)
    description.write_text(_xml(seen, overlay))
    try:
        virsh("create", str(description))
        wait_agent()
        yield
    finally:
        subprocess.run(["virsh", "destroy", NAME], capture_output=True, check=False)
        for path in (overlay, description):
            path.unlink(missing_ok=True)


def virsh(*arguments: str) -> str:
    """Run a command of virsh's and return what it prints."""
    done = subprocess.run(["virsh", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"virsh {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def wait_agent() -> None:
    """Ask until the agent has answered; libvirt refuses as long as it has not seen its port."""
    deadline = time.monotonic() + 120
    command = ["virsh", "qemu-agent-command", NAME, _PING]
    while subprocess.run(command, capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError("the agent of libvirt's guest does not answer")


def run(line: str) -> None:
    """Run a line in the guest's shell, and wait for its end."""
    asked = {"path": "/bin/sh", "arg": ["-c", line]}
    pid = _ask_agent("guest-exec", asked)["pid"]
    while not (status := _ask_agent("guest-exec-status", {"pid": pid}))["exited"]:
        time.sleep(0.1)
    if status["exitcode"] != 0:
        raise RuntimeError(f"a command failed in libvirt's guest: {status}")


def _ask_agent(command: str, arguments: Mapping[str, object]) -> Any:
    message = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(virsh("qemu-agent-command", NAME, message))["return"]


def _xml(seen: Scene, overlay: Path) -> str:
    boot = seen.machine.kernel_boot
    if boot is None:
        raise ValueError("only guests that boot by kernel are compared")
    kvm = seen.machine.accelerator == "kvm"
    domain = ET.Element("domain", type="kvm" if kvm else "qemu")
    _text(domain, "name", NAME)
    _text(domain, "memory", str(seen.memory), unit="MiB")
    _text(domain, "vcpu", str(seen.cpus))
    system = ET.SubElement(domain, "os")
    _text(system, "type", "hvm", arch="x86_64", machine=seen.machine.machine_type)
    _text(system, "kernel", str(seen.kernel))
    _text(system, "initrd", str(seen.initrd))
    _text(system, "cmdline", boot.command_line)
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    ET.SubElement(domain, "cpu", mode="host-passthrough" if kvm else "maximum", check="none")
    devices = ET.SubElement(domain, "devices")
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(disk, "driver", name="qemu", type="qcow2")
    ET.SubElement(disk, "source", file=str(overlay))
    ET.SubElement(disk, "target", dev="vda", bus="virtio")
    channel = ET.SubElement(devices, "channel", type="unix")
    ET.SubElement(channel, "target", type="virtio", name="org.qemu.guest_agent.0")
    ET.SubElement(devices, "controller", type="usb", model="none")
    ET.SubElement(devices, "memballoon", model="none")
    ET.SubElement(devices, "serial", type="null")
    label = ET.SubElement(domain, "seclabel", type="static", model="dac", relabel="no")
    _text(label, "label", f"+{os.getuid()}:+{os.getuid()}")
    return ET.tostring(domain, encoding="unicode")


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text
