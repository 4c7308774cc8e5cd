"""The doctor's checks of what the kernel holds processes by: control groups, AppArmor, SELinux."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.config.keys import LauncherName
from stratabox.daemon.doctor.finding import Finding, Status, existing_parent, read
from stratabox.daemon.hypervisor import cgroup
from stratabox.daemon.service.housing import SYSTEMD_RUNS, allowance_of, folder_of

_GROUPS = "control-groups"
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_SELINUX = Path("/sys/fs/selinux/enforce")


def check_control_groups(config: Config) -> Iterator[Finding]:
    """Which version and controllers there are, and whether guests' limits can be had by them."""
    allowance = allowance_of(config)
    if allowance is None:
        detail = 'cgroups.limits = "off": guests are not limited'
        yield Finding(_GROUPS, Status.WARN, detail, 'set cgroups.limits = "auto"')
        return
    if config.launcher is LauncherName.LIBVIRT:
        yield Finding(_GROUPS, Status.OK, "guests are in libvirt's own; no limits are set there")
        return
    points = cgroup.hierarchies()
    if not points:
        detail = "version 2 is not mounted: guests are not limited"
        remedy = (
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 where no systemd is"
        )
        yield Finding(_GROUPS, Status.WARN, detail, remedy)
        return
    wanted = allowance.guest(cpus=1, memory=64, accelerator="kvm", host_memory=0).controllers
    if SYSTEMD_RUNS.exists() and config.cgroups_folder is None:
        where = points[0] if os.geteuid() == 0 else _delegated(points[0])
        remedy = "sudo systemctl edit user@.service: [Service], Delegate=cpu cpuset io memory pids"
        if os.geteuid() == 0:
            remedy = "boot with systemd.unified_cgroup_hierarchy=1, or cgroup_enable=memory"
        good = "scopes in stratabox.slice, where systemd runs the daemon"
    else:
        folder, why = folder_of(config)
        if folder is None:
            remedy = "run it by systemd, or set cgroups.folder to one that was delegated to it"
            yield Finding(_GROUPS, Status.WARN, f"{why}: guests are not limited", remedy)
            return
        where = existing_parent(folder)
        if not any(where.is_relative_to(point) for point in points):
            detail = f"{folder} is in no hierarchy of version 2"
            remedy = f"set cgroups.folder to a folder below {points[0]}"
            yield Finding(_GROUPS, Status.WARN, detail, remedy)
            return
        if not os.access(where, os.W_OK | os.X_OK):
            detail = f"uid {os.geteuid()} may not make groups in {where}"
            remedy = f"delegate {folder} to it: make it, chown it and its cgroup.* files"
            yield Finding(_GROUPS, Status.WARN, detail, remedy)
            return
        good, remedy = str(folder), f"enable them in cgroup.subtree_control above {where}"
    there = cgroup.words(where / "cgroup.controllers")
    lacking = sorted(each for each in wanted if str(each) not in there)
    if lacking:
        detail = f"no controller {', '.join(lacking)} in {where}{_elsewhere()}"
        yield Finding(_GROUPS, Status.WARN, detail, remedy)
    else:
        limited = ", ".join(sorted(wanted))
        yield Finding(_GROUPS, Status.OK, f"version 2 ({limited}): {good}")


def _delegated(point: Path) -> Path:
    """The group of this user's service manager, where it can be seen."""
    uid = os.geteuid()
    manager = point / f"user.slice/user-{uid}.slice/user@{uid}.service"
    return manager if manager.exists() else point


def _elsewhere() -> str:
    rows = (line.split() for line in read("/proc/cgroups").splitlines()[1:])
    old = [row[0] for row in rows if len(row) == 4 and row[1] != "0"]
    return f"; in version 1: {', '.join(old)}" if old else ""


def check_labels(config: Config) -> Iterator[Finding]:
    """AppArmor and SELinux: whether they are on, and what that means for guests."""
    if read(_APPARMOR).strip() == "Y":
        yield _apparmor(config)
    else:
        yield Finding("apparmor", Status.OK, "not on in this kernel")
    enforcing = read(_SELINUX).strip()
    if not enforcing:
        yield Finding("selinux", Status.OK, "not on in this kernel")
        return
    mode = "enforcing" if enforcing == "1" else "permissive"
    detail = f"{mode}; guests run in the daemon's domain, nothing is labelled (docs/security.md)"
    yield Finding("selinux", Status.OK, detail)


def _apparmor(config: Config) -> Finding:
    profiles = read(_PROFILES)
    loaded = "stratabox-confine " in profiles
    restricted = read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip() == "1"
    if restricted and os.geteuid() != 0 and not loaded and profiles:
        detail = "on; user namespaces are forbidden to programs without a profile"
        remedy = "install packaging/apparmor/stratabox-confine (docs/security.md)"
        return Finding("apparmor", Status.WARN, detail, remedy)
    if config.launcher is LauncherName.LIBVIRT and "libvirtd " in profiles:
        detail = f"on, and libvirtd is confined: it may not run what is in {config.libvirt_folder}"
        local = Path("/etc/apparmor.d/local/usr.sbin.libvirtd")
        if str(config.libvirt_folder) not in read(local) and "stratabox" not in read(local):
            remedy = "install packaging/apparmor/libvirtd (docs/libvirt.md)"
            return Finding("apparmor", Status.WARN, f"{detail} unless its profile says so", remedy)
    detail = "on; profile stratabox-confine is " + ("loaded" if loaded else "not loaded")
    if not profiles:
        detail = "on; only root can see which profiles are loaded"
    return Finding("apparmor", Status.OK, detail)
