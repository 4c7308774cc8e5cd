"""The QEMU of this host, and the machines that it makes.

Asked once at the daemon's start: version, the versioned name behind the alias ``q35``, and the
firmware files that guests need to start again without anything under /usr/share.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor.accelerator import Accelerator
from stratabox.daemon.hypervisor.process import end_child
from stratabox.storage.model.errors import DeniedError, FailedError
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import KernelBoot, Machine

BINARY = "qemu-system-x86_64"
BIOS = "bios-256k.bin"
FIRMWARE = (BIOS, "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin")
"""All that QEMU opens by name for our machine (seen with strace on 7.2): SeaBIOS, the option ROMs
that load a kernel given by -kernel (Linux's own format, and PVH), and the APIC's `vapic`."""

_SECONDS = 20.0
_VERSION = re.compile(r"version (\d+)\.(\d+)(?:\.(\d+))?")
_MACHINE = re.compile(r"^(pc-[\w.-]+)\s", re.MULTILINE)
_Q35 = re.compile(r"^q35\s.*\(alias of (pc-q35-[\w.]+)\)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class QemuHost:
    """One QEMU binary and what it offers."""

    path: Path
    version: tuple[int, int, int]
    version_text: str
    """As "7.2.22"."""
    machine_type: str
    """What q35 stands for in this QEMU, as "pc-q35-7.2"."""
    machine_types: frozenset[str]
    """All that it knows by their versioned names."""
    firmware_sources: Mapping[str, Path]
    """File name as QEMU asks for it → where this host has it."""


async def probe(binary: str | Path = BINARY) -> QemuHost:
    """Find a QEMU and ask it what it is.

    :raise DeniedError: TOOL_MISSING, when it or its firmware is not installed.
    :raise FailedError: QEMU_FAILED, when it does not answer as QEMU does.
    """
    found = shutil.which(binary)
    if found is None:
        raise DeniedError(
            f"QEMU ({binary}) is not installed: install the package qemu-system-x86.",
            reason="TOOL_MISSING",
            tool=binary,
        )
    path = Path(found).resolve()
    version_text, machines, folders = await asyncio.gather(
        _ask(path, "--version"), _ask(path, "-machine", "help"), _ask(path, "-L", "help")
    )
    version = _VERSION.search(version_text)
    machine = _Q35.search(machines)
    if version is None or machine is None:
        raise FailedError(
            f"{path} does not say its version or has no q35 machine.", reason="QEMU_FAILED"
        )
    numbers = (int(version[1]), int(version[2]), int(version[3] or 0))
    return QemuHost(
        path=path,
        version=numbers,
        version_text=".".join(map(str, numbers)),
        machine_type=machine[1],
        machine_types=frozenset(_MACHINE.findall(machines)),
        firmware_sources=await asyncio.to_thread(_find_firmware, folders.splitlines()),
    )


async def cpu_features(host: QemuHost, accelerator: str, model: str) -> frozenset[str]:
    """Names of all features that a CPU model gives a guest on this host. Takes 30 ms.

    :raise FailedError: QEMU_FAILED, when QEMU does not answer.
    """
    commands: list[dict[str, object]] = [
        {"execute": "qmp_capabilities"},
        {
            "execute": "query-cpu-model-expansion",
            "arguments": {"type": "full", "model": {"name": model}},
        },
        {"execute": "quit"},
    ]
    output = await _ask(
        host.path,
        *("-machine", "none", "-accel", accelerator, "-S", "-display", "none"),
        *("-nodefaults", "-no-user-config", "-qmp", "stdio"),
        given="".join(map(json.dumps, commands)).encode(),
    )
    for line in output.splitlines():
        try:
            properties = json.loads(line)["return"]["model"]["props"]
        except (ValueError, LookupError, TypeError):
            continue
        return frozenset(name for name, value in properties.items() if value is True)
    raise FailedError(
        f"{host.path} does not say what its CPU model {model} has.", reason="QEMU_FAILED"
    )


def new_machine(
    host: QemuHost,
    accelerator: Accelerator,
    firmware: Mapping[str, Sha256],
    kernel_boot: KernelBoot | None,
    mac: str | None = None,
) -> Machine:
    """Make the record of a new virtual machine as this host would build it today.

    :param firmware: the blobs into which `QemuHost.firmware_sources` were copied.
    :param mac: address of its network card; None makes one up.
    """
    return Machine(
        machine_type=host.machine_type,
        accelerator=accelerator.name,
        cpu_model=accelerator.cpu_model,
        qemu_version=host.version_text,
        firmware=dict(firmware),
        mac=mac or random_mac(),
        kernel_boot=kernel_boot,
    ).up_to_date()


def random_mac() -> str:
    """Make up a MAC address under QEMU's prefix 52:54:00."""
    return ":".join(["52", "54", "00", *(f"{byte:02x}" for byte in secrets.token_bytes(3))])


async def _ask(path: Path, *arguments: str, given: bytes = b"") -> str:
    """Run QEMU for something that it prints.

    :param given: its standard input.

    :raise FailedError: QEMU_FAILED, when it fails or takes too long.
    """
    process = await asyncio.create_subprocess_exec(
        path,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(_SECONDS):
            output, _ = await process.communicate(given)
    except TimeoutError:
        raise FailedError(
            f"{path} {' '.join(arguments)} did not end within {_SECONDS:g} s.",
            reason="QEMU_FAILED",
        ) from None
    finally:
        await end_child(process)
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise FailedError(f"{path} does not run: {text.strip()[-300:]}", reason="QEMU_FAILED")
    return text


def _find_firmware(folders: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in FIRMWARE:
        places = [Path(folder) / name for folder in folders]
        place = next((place for place in places if place.is_file()), None)
        if place is None:
            raise DeniedError(
                f"QEMU's firmware {name} is not installed: install the packages seabios and "
                "qemu-system-data.",
                reason="TOOL_MISSING",
                tool=name,
            )
        found[name] = place.resolve()
    return found
