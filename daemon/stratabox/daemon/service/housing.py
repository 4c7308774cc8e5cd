"""Finds out what control groups guests can have here, by trying it, once, at the daemon's start.

```
 systemd runs the daemon    scopes in stratabox.slice              `scopes`
 cgroups.folder             groups in there                        `groups`
 neither, root, no systemd  groups in /sys/fs/cgroup/stratabox     `groups`
 else                       none
```

What was found is in `stratabox host` and in the log; ``cgroups.limits = "required"`` has the daemon
not start where something is missing.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.config.cgroup_keys import LimitsWish
from stratabox.daemon.config.keys import LauncherName
from stratabox.daemon.hypervisor import cgroup
from stratabox.daemon.hypervisor.housing import House, HouseError, Housing
from stratabox.daemon.hypervisor.limits import Allowance, Controller, GroupLimits, IoLimits
from stratabox.daemon.service.groups import Groups, prepare
from stratabox.daemon.service.scopes import Scopes, manager_socket
from stratabox.storage.model.errors import DeniedError
from stratabox.storage.model.ids import SandboxId

log = logging.getLogger(__name__)

SYSTEMD_RUNS = Path("/run/systemd/system")
"""There on every host that systemd has started."""
_PROBE = SandboxId("probe")
_FILES = {
    Controller.MEMORY: "memory.max",
    Controller.CPU: "cpu.max",
    Controller.PIDS: "pids.max",
}


async def choose(config: Config, environ: Mapping[str, str], store_id: str) -> Housing:
    """Find out what guests can have.

    :raise DeniedError: CGROUPS_UNAVAILABLE, when limits are required and cannot be had.
    """
    allowance = allowance_of(config)
    manager = manager_socket(environ)
    if manager is not None:
        found = await _try(Scopes(manager, config.state_dir), "systemd", allowance)
    elif allowance is None:
        found = Housing()
    else:
        found = await _groups(config, store_id, allowance)
    if config.launcher is LauncherName.LIBVIRT and allowance is not None:
        found = replace(found, held=frozenset(), why="libvirt has control groups of its own")
    required = config.cgroups_limits is LimitsWish.REQUIRED
    if found.why and required:
        if found.house is not None:
            found.house.close()
        raise DeniedError(
            f"guests cannot be limited as is required: {found.why}. strataboxd doctor tells what"
            ' to do; cgroups.limits = "auto" takes what there is.',
            reason="CGROUPS_UNAVAILABLE",
        )
    if allowance is not None:
        log.log(
            logging.WARNING if found.why else logging.INFO,
            "guests' limits: %s%s",
            f"{', '.join(sorted(found.held))} by {found.by}" if found.held else "none",
            f" ({found.why})" if found.why else "",
        )
    off = 'cgroups.limits = "off"' if allowance is None else ""
    return replace(found, why=found.why or off, allowance=allowance, required=required)


def allowance_of(config: Config) -> Allowance | None:
    """What the configuration says; None: no limits are wanted."""
    if config.cgroups_limits is LimitsWish.OFF:
        return None
    return Allowance(
        memory=config.cgroups_memory_overhead,
        cpu=config.cgroups_cpu_overhead,
        pids=config.cgroups_pids,
        io=IoLimits(
            weight=config.cgroups_io_weight,
            read_bandwidth=config.cgroups_io_read_bandwidth,
            write_bandwidth=config.cgroups_io_write_bandwidth,
            read_iops=config.cgroups_io_read_iops,
            write_iops=config.cgroups_io_write_iops,
        ),
    )


def missing(wanted: Collection[Controller], held: Collection[Controller], where: str) -> str:
    """In words, what is not limited; empty: all is."""
    lacking = sorted(set(wanted) - set(held))
    return f"no controller {', '.join(lacking)} in {where}" if lacking else ""


def folder_of(config: Config) -> tuple[Path | None, str]:
    """Where groups of our own are to be made, without systemd; else why there are none."""
    if config.cgroups_folder is not None:
        return config.cgroups_folder, ""
    if SYSTEMD_RUNS.exists():
        return None, "systemd has this host, but did not start the daemon"
    if os.geteuid() != 0:
        return None, "systemd does not run the daemon, and cgroups.folder names none for it"
    points = cgroup.hierarchies()
    if not points:
        return None, "no control groups of version 2 are mounted"
    if not cgroup.words(points[0] / "cgroup.controllers") & set(map(str, _FILES)):
        return None, f"{points[0]} has no controllers for it (they may be in version 1)"
    return points[0] / "stratabox", ""


async def _groups(config: Config, store_id: str, allowance: Allowance) -> Housing:
    folder, why = folder_of(config)
    if folder is None:
        return Housing(why=why)
    wanted = allowance.guest(cpus=1, memory=64, accelerator="tcg", host_memory=0).controllers
    try:
        held = await asyncio.to_thread(prepare, folder, store_id, wanted)
    except HouseError as error:
        return Housing(why=str(error))
    house = await asyncio.to_thread(
        Groups, folder / store_id, held, config.state_dir, automatic=config.cgroups_folder is None
    )
    found = await _try(house, str(folder), allowance)
    if found.house is None:
        house.close()
    return found


async def _try(house: House, by: str, allowance: Allowance | None) -> Housing:
    """Put a process into a group, and look which of its limits the kernel has been told of."""
    limits = None
    if allowance is not None:
        limits = allowance.guest(cpus=1, memory=64, accelerator="tcg", host_memory=8192)
    child = await asyncio.create_subprocess_exec(
        "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await house.put("probe", _PROBE, child.pid, limits)
        held, where = await asyncio.to_thread(_look, child.pid, limits)
    except HouseError as error:
        return Housing(why=str(error))
    finally:
        assert child.stdin is not None
        child.stdin.close()
        await child.wait()
    return Housing(
        house=house,
        by=by,
        held=held,
        why=missing(limits.controllers, held, where) if limits is not None else "",
    )


def _look(pid: int, limits: GroupLimits | None) -> tuple[frozenset[Controller], str]:
    group = cgroup.group_of(pid)
    if limits is None:
        return frozenset(), ""
    if group is None or not (group / "cgroup.procs").exists():
        return frozenset(), "its hierarchy of version 2, as far as it can be seen"
    held = {
        controller
        for controller, name in _FILES.items()
        if (text := cgroup.words(group / name)) and "max" not in text
    }
    if Controller.IO in cgroup.words(group / "cgroup.controllers"):
        held.add(Controller.IO)
    return frozenset(held & limits.controllers), str(group.parent)
