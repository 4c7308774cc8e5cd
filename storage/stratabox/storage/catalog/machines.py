"""Machine records as JSON, the way sandboxes and snapshots keep them."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from stratabox.storage.catalog.database import json_of
from stratabox.storage.model.ids import Sha256
from stratabox.storage.model.records import KernelBoot, Machine


def dump(machine: Machine) -> str:
    """The column's text."""
    return json_of(asdict(machine))


@lru_cache(maxsize=256)
def load(text: str) -> Machine:
    """The record behind the column's text. The snapshots of a sandbox have the same."""
    values: dict[str, Any] = json.loads(text)
    boot = values.pop("kernel_boot")
    return Machine(kernel_boot=None if boot is None else KernelBoot(**boot), **values)


def blobs_of(machine: Machine) -> set[Sha256]:
    """Every blob that a start of this machine needs."""
    blobs = set(machine.firmware.values())
    if machine.kernel_boot:
        blobs |= {machine.kernel_boot.kernel, machine.kernel_boot.initrd}
    if machine.seed:
        blobs.add(machine.seed)
    return blobs
