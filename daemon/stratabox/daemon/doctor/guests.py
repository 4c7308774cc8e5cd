"""The doctor's checks of what runs guests: QEMU, its accelerator, its memory."""

from __future__ import annotations

import asyncio
import os
import platform
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.config.keys import AcceleratorWish
from stratabox.daemon.doctor.finding import (
    Finding,
    Status,
    apt,
    find_tool,
    first_line,
    output_of,
    read,
)
from stratabox.daemon.hypervisor.memory import tracking
from stratabox.daemon.hypervisor.network import slirp

OLDEST_QEMU = (7, 2)
_INSTALL_QEMU = apt("qemu-system-x86", "qemu-utils", "seabios")
_KVM = Path("/dev/kvm")


def check_qemu(config: Config) -> Iterator[Finding]:
    """QEMU: there, new enough, with the machines and devices that sandboxes are made of."""
    binary = find_tool(config.qemu_binary)
    if not binary:
        detail = f"{config.qemu_binary} is not installed"
        yield Finding("qemu", Status.FAIL, detail, _INSTALL_QEMU)
        return
    text = output_of(binary, "--version")
    version = parse_version(text)
    oldest = ".".join(map(str, OLDEST_QEMU))
    if version is None:
        detail = f"{binary} does not say its version: {first_line(text, 'it failed')}"
        yield Finding("qemu", Status.FAIL, detail, _INSTALL_QEMU)
        return
    shown = f"{'.'.join(map(str, version))} ({binary})"
    if version < OLDEST_QEMU:
        remedy = f"install QEMU {oldest} or newer and set qemu_binary, or upgrade the host"
        yield Finding("qemu", Status.FAIL, f"{shown}: {oldest} is the oldest that works", remedy)
        return
    yield Finding("qemu", Status.OK, shown)

    machines = q35_machines(output_of(binary, "-machine", "help"))
    if machines:
        detail = f"{machines[0]} and {len(machines) - 1} older"
        yield Finding("machine-types", Status.OK, detail)
    else:
        detail = f"{binary} has no versioned q35 machine"
        yield Finding("machine-types", Status.FAIL, detail, _INSTALL_QEMU)

    devices = output_of(binary, "-device", "help")
    needed = ("virtio-blk-pci", "virtio-serial-pci", "virtio-rng-pci", "vmgenid")
    missing = [name for name in needed if f'"{name}"' not in devices]
    if missing:
        detail = f"{binary} has no {', '.join(missing)}"
        yield Finding("devices", Status.FAIL, detail, _INSTALL_QEMU)


def check_network(config: Config) -> Iterator[Finding]:
    """What a network for guests needs. Without it there is none, and all else works."""
    try:
        slirp.load()
    except OSError as error:
        detail = f"sandboxes can have no network egress: {error}"
        yield Finding("network", Status.WARN, detail, apt("libslirp0"))
        return
    yield Finding("network", Status.OK, f"egress by {slirp.LIBRARY}")


def parse_version(text: str) -> tuple[int, int, int] | None:
    """Read QEMU's version from what ``--version`` prints."""
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def q35_machines(text: str) -> list[str]:
    """List the versioned q35 machines in what ``-machine help`` prints, newest first."""
    found = set(re.findall(r"^pc-q35-(\d+)\.(\d+)\s", text, re.MULTILINE))
    versions = sorted(((int(major), int(minor)) for major, minor in found), reverse=True)
    return [f"pc-q35-{major}.{minor}" for major, minor in versions]


def check_firmware(config: Config) -> Iterator[Finding]:
    """The BIOS that guests start with; it is copied into the store when first used."""
    binary = find_tool(config.qemu_binary)
    if not binary:
        return
    folders = [Path(line.strip()) for line in output_of(binary, "-L", "help").splitlines()]
    for folder in folders:
        if (folder / "bios-256k.bin").is_file():
            yield Finding("firmware", Status.OK, str(folder / "bios-256k.bin"))
            return
    where = ", ".join(map(str, folders)) or "QEMU's folders"
    yield Finding(
        "firmware", Status.FAIL, f"SeaBIOS (bios-256k.bin) is not in {where}", apt("seabios")
    )


def check_accelerator(config: Config) -> Iterator[Finding]:
    """What guests would run on, found by the very code that the daemon uses."""
    if find_spec("stratabox.daemon.hypervisor.accelerator") is None or not find_tool(
        config.qemu_binary
    ):
        return
    from stratabox.daemon.hypervisor import accelerator

    chosen = asyncio.run(accelerator.choose(config.accel))
    detail = f"{chosen.name}: {chosen.reason}"
    slow = chosen.name == AcceleratorWish.TCG and config.accel is not AcceleratorWish.TCG
    remedy = (
        "guests work, some 10 times slower; for KVM use a host (or a nested guest) with "
        "virtualisation switched on in its firmware, and access to /dev/kvm"
    )
    yield Finding("accelerator", Status.WARN if slow else Status.OK, detail, remedy * slow)


def check_kvm_device(config: Config) -> Iterator[Finding]:
    """/dev/kvm: absent, closed to this user, a trap, or fine."""
    if not _KVM.exists():
        yield Finding("kvm-device", Status.OK, "no /dev/kvm: guests run under TCG")
        return
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        yield Finding(
            "kvm-device",
            Status.WARN,
            f"uid {os.geteuid()} may not open /dev/kvm",
            'sudo usermod -aG kvm "$USER", then log in again',
        )
        return
    except OSError as error:
        detail = f"/dev/kvm does not open ({error.strerror}): guests run under TCG"
        yield Finding("kvm-device", Status.OK, detail)
        return
    if has_virtualisation(read("/proc/cpuinfo")):
        yield Finding("kvm-device", Status.OK, "/dev/kvm opens, the CPU has vmx or svm")
        return
    remedy = (
        "none needed here; should libvirtd be used and take 80 s for every start (it probes QEMU "
        "again each time), hide the device from it: systemctl edit libvirtd, [Service] "
        "InaccessiblePaths=/dev/kvm"
    )
    detail = "/dev/kvm opens but the CPU shows neither vmx nor svm: it can run nothing, so TCG"
    yield Finding("kvm-device", Status.WARN, detail, remedy)


def has_virtualisation(cpuinfo: str) -> bool:
    """Tell whether /proc/cpuinfo's flags have Intel's or AMD's virtualisation."""
    return re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo, re.MULTILINE) is not None


def check_memory_rights(config: Config) -> Iterator[Finding]:
    """Whether the daemon may read its guests' pages, which memory snapshots will need."""
    scope = read("/proc/sys/kernel/yama/ptrace_scope").strip()
    if os.geteuid() == 0:
        yield Finding("memory-rights", Status.OK, "root reads guests' pages")
    elif scope in ("", "0"):
        yield Finding("memory-rights", Status.OK, "this user reads its own guests' pages")
    elif scope == "1" and tracking.LIBRARY.exists():
        # By PR_SET_PTRACER, which the library calls in each guest's QEMU.
        yield Finding("memory-rights", Status.OK, "this user reads its own guests' pages")
    elif scope == "1":
        # Guests of an earlier daemon are no longer its children.
        detail = "ptrace_scope is 1: pages of guests that this daemon started itself only"
        remedy = (
            "only for memory snapshots: install gcc and then Stratabox again, which builds a "
            "library for this; or sudo sysctl kernel.yama.ptrace_scope=0"
        )
        yield Finding("memory-rights", Status.OK, detail, remedy)
    else:
        detail = f"ptrace_scope is {scope}: guests' pages cannot be read (memory snapshots)"
        remedy = "only for memory snapshots: sudo sysctl kernel.yama.ptrace_scope=0, or run as root"
        yield Finding("memory-rights", Status.OK, detail, remedy)


def check_page_tracking(config: Config) -> Iterator[Finding]:
    """How written pages can be told from others, which memory snapshots will need."""
    release = platform.release()
    match = re.match(r"(\d+)\.(\d+)", release)
    ioctl = match is not None and (int(match[1]), int(match[2])) >= (6, 7)
    how = "PAGEMAP_SCAN and userfaultfd" if ioctl else "reading /proc/PID/pagemap"
    yield Finding("page-tracking", Status.OK, f"Linux {release}: {how} (memory snapshots)")
