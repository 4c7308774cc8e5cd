"""What keeps a saved machine from going on here. Pure.

QEMU itself checks next to nothing of this: with another accelerator, or a CPU that lacks what the
guest has found at its boot, it runs on until the guest crashes. A *newer* QEMU is fine where it
still knows the machine type, so that an upgrade of the host costs no snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from stratabox.storage.model.records import Machine

_NUMBERS = re.compile(r"\d+")
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this host can run."""

    qemu_version: str
    """As "7.2.22"."""
    machine_types: Collection[str]
    accelerator: str
    cpu_features: Collection[str]
    """QEMU's names of all that the machine's CPU model gives a guest here."""


def differences(machine: Machine, cpu_features: Collection[str], offer: Offer) -> Sequence[str]:
    """Why a machine's saved memory cannot be restored here, each as part of a sentence; or nothing.

    :param cpu_features: what the CPU model gave the guest where it was saved.
    """
    found = []
    if _numbers(machine.qemu_version) > _numbers(offer.qemu_version):
        found.append(
            f"it was saved by QEMU {machine.qemu_version}, and here is the older "
            f"{offer.qemu_version}"
        )
    if machine.machine_type not in offer.machine_types:
        found.append(
            f"QEMU {offer.qemu_version} does not know the machine type {machine.machine_type}"
        )
    if machine.accelerator != offer.accelerator:
        found.append(f"it ran on {machine.accelerator}, and guests run on {offer.accelerator} here")
    missing = sorted(set(cpu_features) - set(offer.cpu_features))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        found.append(f"this host's CPU lacks {', '.join(missing[:_SHOWN])}{more}")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor: QEMU's stable releases do not change what they save."""
    return tuple(map(int, _NUMBERS.findall(version)[:2]))
