"""KVM or TCG, decided by looking and not by hoping.

A /dev/kvm that opens proves nothing: on some hosts guests hang on it. So KVM is chosen only when
the CPU has the feature, the device opens, and a test guest really ran (``kvm_probe``).
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from stratabox.daemon.hypervisor.process import end_child
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError

PROBE_SECONDS = 5.0

_PROBE = Path(__file__).with_name("kvm_probe.py")


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What runs guest code here, and in one sentence why."""

    name: str
    """"kvm" or "tcg"."""
    reason: str

    @property
    def cpu_model(self) -> str:
        """What a guest's CPU is by default: all that this host and accelerator can give."""
        return "host" if self.name == "kvm" else "max"


async def choose(wanted: str = "auto") -> Accelerator:
    """Choose the accelerator: `wanted` is "auto", "kvm" or "tcg".

    Takes up to `PROBE_SECONDS` where KVM hangs.

    :raise DeniedError: KVM_UNUSABLE, when "kvm" is wanted and does not work here.
    :raise InvalidArgumentError: when `wanted` is another word.
    """
    if wanted not in ("auto", "kvm", "tcg"):
        raise InvalidArgumentError(f"accel must be auto, kvm or tcg, not {wanted!r}.")
    if wanted == "tcg":
        return Accelerator(name="tcg", reason="The configuration asks for it.")
    obstacle = await find_obstacle()
    if obstacle is None:
        return Accelerator(name="kvm", reason="A test guest ran on /dev/kvm.")
    if wanted == "kvm":
        raise DeniedError(
            f"KVM cannot be used: {obstacle}. Set accel to auto or tcg to emulate the CPU.",
            reason="KVM_UNUSABLE",
        )
    return Accelerator(name="tcg", reason=f"KVM cannot be used: {obstacle}.")


async def find_obstacle(
    *, cpuinfo: Path = Path("/proc/cpuinfo"), device: Path = Path("/dev/kvm")
) -> str | None:
    """What keeps KVM from working here, as part of a sentence; None when it works."""
    flags = await asyncio.to_thread(_cpu_flags, cpuinfo)
    if not flags & {"vmx", "svm"}:
        return "this CPU has no hardware virtualisation (neither vmx nor svm in /proc/cpuinfo)"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"there is no {device} (load the module kvm_intel or kvm_amd)"
    except PermissionError:
        return f"{device} may not be opened (join the group kvm)"
    except OSError as error:
        return f"{device} does not open ({error.strerror})"
    return await run_probe()


async def run_probe(seconds: float = PROBE_SECONDS) -> str | None:
    """Run the test guest in a child process that is killed when it takes too long."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(_PROBE),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        return f"a test guest on /dev/kvm did not end within {seconds:g} s"
    finally:
        await end_child(process)
    if process.returncode == 0:
        return None
    return output.decode(errors="replace").strip() or "a test guest on /dev/kvm crashed"


def _cpu_flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return {
        flag
        for line in lines
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
