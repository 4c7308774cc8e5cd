"""The doctor's checks of libvirt: needed only where it is the launcher, and then asked."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

from stratabox.daemon import extras
from stratabox.daemon.config import Config
from stratabox.daemon.config.keys import LauncherName
from stratabox.daemon.doctor.finding import Finding, Status, apt, existing_parent
from stratabox.daemon.hypervisor.libvirt import connection, emulator
from stratabox.storage.model.errors import StrataboxError

_SERVICE = f"{apt('libvirt-daemon-system')} && sudo systemctl start libvirtd"
_NAME = "libvirt"


def check_libvirt(config: Config) -> Iterator[Finding]:
    """Whether libvirt answers, and can run what the daemon would have it run."""
    wanted = config.launcher is LauncherName.LIBVIRT
    optional = "" if wanted else " (optional)"
    if extras.missing_modules(extras.LIBVIRT):
        detail = f"no Python module libvirt{optional}"
        bad = Status.FAIL if wanted else Status.OK
        yield Finding(_NAME, bad, detail, extras.INSTALL_LIBVIRT if wanted else "")
        return
    if wanted:
        yield _answer(config)
        yield _emulator(config)
        return
    runtime = os.environ.get("XDG_RUNTIME_DIR", "/nonexistent")
    folder = "/run" if config.libvirt_uri.endswith("/system") else runtime
    sockets = [Path(folder, "libvirt", name) for name in ("libvirt-sock", "virtqemud-sock")]
    found = [path for path in sockets if path.exists()]
    if found:
        yield Finding(_NAME, Status.OK, f"{config.libvirt_uri} by {found[0]}{optional}")
    elif folder != "/run":
        # A session daemon is started by the first connection.
        yield Finding(_NAME, Status.OK, f"{config.libvirt_uri}{optional}")
    else:
        yield Finding(_NAME, Status.OK, f"no service for {config.libvirt_uri}{optional}")


def _answer(config: Config) -> Finding:
    try:
        number = asyncio.run(_version(config.libvirt_uri))
    except StrataboxError as error:
        return Finding(_NAME, Status.FAIL, error.message, _SERVICE)
    version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
    return Finding(_NAME, Status.OK, f"{config.libvirt_uri}: libvirt {version} answers")


async def _version(uri: str) -> int:
    opened = connection.Connection(uri)
    try:
        return await opened.call(lambda libvirt: int(libvirt.getLibVersion()))
    finally:
        await opened.close()


def _emulator(config: Config) -> Finding:
    name = "libvirt-emulator"
    if not emulator.PROGRAM.exists():
        detail = "the program that libvirt is to run was not built with Stratabox"
        return Finding(name, Status.FAIL, detail, "install gcc, and then Stratabox again")
    folder = config.libvirt_folder
    closed = emulator.closed_folder(existing_parent(folder)) if os.geteuid() == 0 else None
    if closed is not None:
        detail = f"QEMU's users cannot enter {closed}, and libvirt is to run a program in {folder}"
        remedy = "set libvirt_folder to a folder that all may enter"
        return Finding(name, Status.FAIL, detail, remedy)
    return Finding(name, Status.OK, f"will be, or is, in {folder}")
