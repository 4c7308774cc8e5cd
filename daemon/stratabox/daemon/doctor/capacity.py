"""The doctor's checks of how many guests this host can take, and what they are kept in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.config.admission_keys import SwapWish
from stratabox.daemon.config.keys import ConfinementWish, LauncherName
from stratabox.daemon.doctor.finding import Finding, Status, find_tool, read
from stratabox.daemon.hypervisor import confinement, host_room
from stratabox.daemon.hypervisor.confinement import Walls
from stratabox.daemon.hypervisor.libvirt import walls as libvirt_walls
from stratabox.daemon.lifecycle.account import OVERHEAD
from stratabox.storage.model.records import MIB


def check_memory(config: Config) -> Iterator[Finding]:
    """What memory there is, and for how many more guests of the default size."""
    room = host_room.look()
    here = room.memory(swap=config.admission_swap is SwapWish.COUNT)
    left = max(0, here - config.admission_memory_reserve // MIB)
    detail = f"{room.available} of {room.total} MiB available, {room.swap} MiB of swap free"
    if room.group is not None and room.group < room.available:
        detail = f"{room.group} MiB left to its control group; the host has {detail}"
    remedy = "end other programs, or lower admission.memory_reserve and default_memory"
    if not config.admission_memory_overcommit:
        yield Finding("memory", Status.OK, f"{detail}; guests may take it all, and more")
        return
    allowed = int(left * config.admission_memory_overcommit)
    count = allowed // (config.default_memory + OVERHEAD)
    detail += (
        f"; {count} more guests of {config.default_memory} MiB may start"
        f" (admission.memory_overcommit = {config.admission_memory_overcommit:g})"
    )
    yield Finding("memory", Status.OK if count else Status.WARN, detail, "" if count else remedy)


_WALLS = {
    Walls.FULL: "namespaces of its own, Landlock, seccomp",
    Walls.PATHS: "Landlock and seccomp, but the host's namespaces",
    Walls.PLAIN: "QEMU's own seccomp sandbox alone",
}


_NO_USER_NAMESPACES = {
    "/proc/sys/user/max_user_namespaces": "0",
    "/proc/sys/kernel/unprivileged_userns_clone": "0",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
}
"""Where a host forbids them to those who are not root, and by which value."""


def check_confinement(config: Config) -> Iterator[Finding]:
    """What each QEMU runs in: tried with the QEMU that is configured."""
    qemu = find_tool(config.qemu_binary)
    if qemu is None:
        return  # which is a finding of its own
    if config.confinement is ConfinementWish.OFF:
        detail = f'confinement = "off": {_WALLS[Walls.PLAIN]}'
        yield Finding("confinement", Status.WARN, detail, 'set confinement = "auto"')
        return
    version = confinement.landlock_version()
    if config.launcher is LauncherName.LIBVIRT:
        yield _under_libvirt(config, version)
        return
    found = confinement.examine(Path(qemu).resolve())
    detail = _WALLS[found.walls] + (f" (Landlock {version})" if version else "")
    if not found.why:
        yield Finding("confinement", Status.OK, detail)
        return
    bad = Status.FAIL if config.confinement is ConfinementWish.REQUIRED else Status.WARN
    yield Finding("confinement", bad, f"{detail}: {found.why}", _way(found.walls, version))


def _under_libvirt(config: Config, version: int) -> Finding:
    """What can be told without libvirtd: each start there tries by itself, and the daemon logs."""
    lacks = libvirt_walls.missing(version, own_uid=os.geteuid() == 0)
    remedy = _way(Walls.FULL, version)
    for name, bad in _NO_USER_NAMESPACES.items():
        if not lacks and read(name).strip() == bad:
            lacks = f"QEMU's users make no namespaces: {name} is {bad}"
            remedy = f"allow user namespaces: another value in {name}"
    if lacks:
        required = config.confinement is ConfinementWish.REQUIRED
        return Finding("confinement", Status.FAIL if required else Status.WARN, lacks, remedy)
    detail = f"Landlock {version} and seccomp; namespaces, where libvirtd lets its QEMU have them"
    return Finding("confinement", Status.OK, detail)


def _way(walls: Walls, landlock: int) -> str:
    if not confinement.PROGRAM.exists():
        return "install gcc and then Stratabox again, which builds it"
    if walls is Walls.FULL or not landlock:
        return "boot with a kernel that has Landlock on, as by lsm=landlock,… on its command line"
    if os.geteuid() == 0:
        return "give the daemon CAP_SYS_ADMIN, and let it make namespaces (RestrictNamespaces=)"
    if read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1":
        return (
            "install the AppArmor profile that comes along (docs/security.md), which allows user"
            " namespaces to this one program; or run the daemon as root"
        )
    return "run the daemon as root, or allow user namespaces: user.max_user_namespaces"
