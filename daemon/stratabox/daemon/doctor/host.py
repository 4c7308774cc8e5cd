"""The doctor's checks of the host around the guests: programs, folders, permissions, space."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from stratabox.daemon import extras
from stratabox.daemon.config import Config
from stratabox.daemon.config.keys import UID_COUNT
from stratabox.daemon.config.kinds import UnixAddress
from stratabox.daemon.doctor.finding import Finding, Status, apt, existing_parent, find_tool, read
from stratabox.storage.model.records import GIB

_SCARCE = 1 * GIB
_LITTLE = 10 * GIB

# tool, package, what for, whether nothing works without it
_TOOLS = (
    ("qemu-img", "qemu-utils", "making and reading disks", True),
    ("mke2fs", "e2fsprogs", "building images", False),
    ("mmdebstrap", "mmdebstrap", "building images", False),
)
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def check_python(config: Config) -> Iterator[Finding]:
    """Stratabox itself, and the extra that the daemon needs."""
    version = metadata.version("stratabox")
    python = ".".join(map(str, sys.version_info[:3]))
    missing = extras.missing_modules(extras.DAEMON)
    if missing:
        detail = f"stratabox {version} without its [daemon] extra: no {', '.join(missing)}"
        yield Finding("stratabox", Status.FAIL, detail, extras.INSTALL_DAEMON)
    else:
        yield Finding("stratabox", Status.OK, f"{version} on Python {python}")


def check_tools(config: Config) -> Iterator[Finding]:
    """Programs that the daemon starts, other than QEMU."""
    for tool, package, purpose, needed in _TOOLS:
        path = find_tool(tool)
        if path:
            yield Finding(tool, Status.OK, path)
        else:
            status = Status.FAIL if needed else Status.WARN
            yield Finding(tool, status, f"not installed; needed for {purpose}", apt(package))
    if _KEYRING.exists():
        yield Finding("debian-keyring", Status.OK, str(_KEYRING))
    else:
        detail = "Debian's signing keys are missing; needed for building Debian images"
        yield Finding("debian-keyring", Status.WARN, detail, apt("debian-archive-keyring"))


def check_subuids(config: Config) -> Iterator[Finding]:
    """What mmdebstrap's unshare mode needs; root does without."""
    if os.geteuid() == 0:
        return
    user = pwd.getpwuid(os.geteuid()).pw_name
    if not find_tool("newuidmap"):
        detail = "newuidmap is not installed; needed for building images as an ordinary user"
        yield Finding("uidmap", Status.WARN, detail, apt("uidmap"))
        return
    for file in ("/etc/subuid", "/etc/subgid"):
        owners = [line.split(":")[0] for line in read(file).splitlines()]
        if user not in owners and str(os.geteuid()) not in owners:
            detail = f"{file} gives no range to {user}; needed for building images"
            remedy = f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            yield Finding("uidmap", Status.WARN, detail, remedy)
            return
    yield Finding("uidmap", Status.OK, f"{user} has ranges in /etc/subuid and /etc/subgid")


def check_state_dir(config: Config) -> Iterator[Finding]:
    """The state folder: there or makable, ours alone, with room."""
    folder = config.state_dir
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        detail = f"{folder}: {parent} is no folder that uid {os.geteuid()} may write to"
        remedy = f"sudo install -d -o {os.geteuid()} -m 0700 {folder}, or set state_dir"
        yield Finding("state-folder", Status.FAIL, detail, remedy)
        return
    detail = str(folder) if parent == folder else f"{folder} (will be made)"
    if parent == folder and stat.S_IMODE(folder.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        yield Finding(
            "state-folder", Status.WARN, f"{folder} is writable by others", f"chmod go-w {folder}"
        )
    else:
        yield Finding("state-folder", Status.OK, detail)

    free = shutil.disk_usage(parent).free
    detail = f"{free / GIB:.1f} GiB free in {parent}"
    remedy = "free some space, or set state_dir to a folder on a larger disk"
    if free < _SCARCE:
        yield Finding("space", Status.FAIL, detail, remedy)
    elif free < _LITTLE:
        yield Finding("space", Status.WARN, f"{detail}; a Debian image takes about 1 GiB", remedy)
    else:
        yield Finding("space", Status.OK, detail)


def check_socket(config: Config) -> Iterator[Finding]:
    """The API's Unix socket: its folder is there or makable."""
    address = config.address
    if not isinstance(address, UnixAddress):
        return
    parent = existing_parent(address.path.parent)
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        yield Finding("api-address", Status.OK, str(address))
    else:
        detail = f"{address}: uid {os.geteuid()} may not write to {parent}"
        remedy = f"set address, as unix://{config.state_dir}/api.sock"
        yield Finding("api-address", Status.FAIL, detail, remedy)


def check_uid_range(config: Config) -> Iterator[Finding]:
    """The uids for QEMU, where the daemon is root: nobody else has them."""
    if os.geteuid() != 0:
        return
    first, last = config.uid_base, config.uid_base + UID_COUNT - 1
    for file in ("/etc/subuid", "/etc/subgid"):
        for line in read(file).splitlines():
            owner, _, numbers = line.partition(":")
            start, _, count = numbers.partition(":")
            if not (start.isdecimal() and count.isdecimal()):
                continue
            if int(start) <= last and int(start) + int(count) > first:
                detail = f"uids {first} to {last} overlap {owner}'s in {file}"
                yield Finding("uid-range", Status.FAIL, detail, "set uid_base to a free range")
                return
    taken = [user.pw_name for user in pwd.getpwall() if first <= user.pw_uid <= last]
    if taken:
        detail = f"uids {first} to {last} belong to users: {', '.join(taken[:5])}"
        yield Finding("uid-range", Status.FAIL, detail, "set uid_base to a free range")
    else:
        yield Finding("uid-range", Status.OK, f"{first} to {last} for QEMU processes")
