"""The doctor's checks of how the daemon is installed and run: package, units, the one that runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import UnixAddress
from stratabox.daemon.doctor.finding import Finding, Status, find_tool, output_of
from stratabox.daemon.service.housing import SYSTEMD_RUNS
from stratabox.storage.model.errors import UnavailableError

Units = Mapping[str, Mapping[str, str]]
"""Unit → its properties, as systemd tells them."""

_PACKAGE = Path(__file__).parents[1]
_DEBIAN = Path("/usr/lib/stratabox")
"""Where the Debian package has its Python packages."""
_SERVICE, _SOCKET, _SLICE = "strataboxd.service", "strataboxd.socket", "stratabox.slice"
_PROPERTIES = "Id,LoadState,UnitFileState,ActiveState,FragmentPath,TasksCurrent"


def check_package(config: Config) -> Iterator[Finding]:
    """By which way Stratabox was installed, and whether two ways are mixed."""
    here = metadata.version("stratabox")
    way = _way()
    packaged = output_of("dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Version}", "stratabox")
    found = packaged.removeprefix("ii ").strip() if packaged.startswith("ii ") else ""
    if found and not _PACKAGE.is_relative_to(_DEBIAN):
        detail = f"this is {here} ({way}), and the Debian package {found} is installed, too"
        remedy = "remove one of both: the units run the package's, and two upgrade apart"
        yield Finding("package", Status.WARN, detail, remedy)
    elif found and found != here:
        detail = f"the Debian package says {found}, and its files are of {here}"
        yield Finding("package", Status.WARN, detail, "sudo apt-get install --reinstall stratabox")
    else:
        yield Finding("package", Status.OK, f"{here}, {way}")


def _way() -> str:
    if _PACKAGE.is_relative_to(_DEBIAN):
        return "from the Debian package"
    if "pipx" in Path(sys.prefix).parts:
        return f"by pipx in {sys.prefix}"
    if "site-packages" not in _PACKAGE.parts and "dist-packages" not in _PACKAGE.parts:
        return f"from the sources in {_PACKAGE.parents[2]}"
    if sys.prefix != sys.base_prefix:
        return f"in the virtual environment {sys.prefix}"
    return f"by pip in {sys.prefix}"


def check_units(config: Config) -> Iterator[Finding]:
    """Units of systemd: there, enabled, active. Another way to run the daemon is as good."""
    if not SYSTEMD_RUNS.exists():
        yield Finding("units", Status.OK, "systemd does not run this host: no units are needed")
        return
    if find_tool("systemctl") is None:
        yield Finding("units", Status.WARN, "systemd runs this host, and there is no systemctl")
        return
    yield judge_units(ask_units(), root=os.geteuid() == 0)


def ask_units() -> Units:
    """What systemd says of our units: the system's for root, else the user's own."""
    scope = [] if os.geteuid() == 0 else ["--user"]
    return parse_units(
        output_of("systemctl", *scope, "show", "-p", _PROPERTIES, _SERVICE, _SOCKET, _SLICE)
    )


def parse_units(text: str) -> Units:
    """Read what ``systemctl show`` prints of several units."""
    blocks = [
        dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        for block in text.split("\n\n")
    ]
    return {block["Id"]: block for block in blocks if "Id" in block}


def judge_units(units: Units, *, root: bool) -> Finding:
    """What is to be done about them."""
    name, control = "units", "sudo systemctl" if root else "systemctl --user"
    if not units:
        detail = "systemd does not answer"
        if root:
            return Finding(name, Status.WARN, detail, "systemctl status")
        remedy = 'log in on the host itself, or sudo loginctl enable-linger "$USER"'
        return Finding(name, Status.WARN, f"{detail} this user", remedy)
    absent = [each for each in (_SERVICE, _SOCKET, _SLICE) if _is(units, each) == "not-found"]
    if len(absent) == 3:
        detail = "none is installed: guests have no scopes of their own, and no limits"
        remedy = (
            "install the Debian package (make deb), or copy lib/systemd of the Python package's"
            f" prefix ({sys.prefix}) into /etc/systemd, and {control} daemon-reload"
        )
        return Finding(name, Status.WARN, detail, remedy)
    if absent:
        remedy = f"install it beside the others, and {control} daemon-reload"
        return Finding(name, Status.WARN, f"{', '.join(absent)} is not installed", remedy)
    masked = [each for each in units if _is(units, each) == "masked"]
    if masked:
        detail = f"{', '.join(masked)} is masked: it cannot be started"
        return Finding(name, Status.WARN, detail, f"{control} unmask {' '.join(masked)}")
    detail = "; ".join(f"{each} {_state(units[each])}" for each in (_SERVICE, _SOCKET))
    detail += f"; {_SLICE} {units[_SLICE].get('ActiveState')}"
    tasks = units[_SLICE].get("TasksCurrent", "")
    if tasks.isdecimal() and len(tasks) < 10:  # else systemd's word for unknown: 2^64 - 1
        detail += f" with {tasks} threads of guests"
    if units[_SERVICE].get("ActiveState") == "failed":
        remedy = f"journalctl {'' if root else '--user '}-u {_SERVICE} says why"
        return Finding(name, Status.FAIL, detail, remedy)
    if units[_SOCKET].get("ActiveState") != "active":
        remedy = f"{control} enable --now {_SOCKET} {_SERVICE}"
        return Finding(name, Status.WARN, detail, remedy)
    if "disabled" in (units[each].get("UnitFileState") for each in (_SERVICE, _SOCKET)):
        remedy = f"{control} enable {_SOCKET} {_SERVICE}, to have it after a reboot"
        return Finding(name, Status.WARN, detail, remedy)
    return Finding(name, Status.OK, detail)


def _is(units: Units, name: str) -> str:
    return units.get(name, {}).get("LoadState", "not-found")


def _state(unit: Mapping[str, str]) -> str:
    return f"{unit.get('UnitFileState') or 'static'}, {unit.get('ActiveState')}"


def check_daemon(config: Config) -> Iterator[Finding]:
    """The daemon that runs: the same version as this, and what it gives guests.

    A daemon that would be started by the question is not asked.
    """
    address = config.address
    if not isinstance(address, UnixAddress) or not address.path.exists():
        yield Finding("daemon", Status.OK, f"none was asked at {address}")
        return
    if SYSTEMD_RUNS.exists():
        units = ask_units()
        waits = units.get(_SOCKET, {}).get("ActiveState") == "active"
        if waits and units.get(_SERVICE, {}).get("ActiveState") != "active":
            yield Finding("daemon", Status.OK, "it is started by the first call")
            return
    yield from _ask(address.path)


def _ask(path: Path) -> Iterator[Finding]:
    # Here: whoever has no grpc is told so by another check.
    from stratabox.daemon.rpc.asking import ask

    try:
        found = ask(path)
    except UnavailableError as error:
        yield Finding("daemon", Status.OK, error.message)
        return
    here = metadata.version("stratabox")
    detail = f"{found.version} runs (pid {found.pid}, launcher {found.launcher})"
    if found.version != here:
        remedy = "restart it (systemctl restart strataboxd): guests run on"
        yield Finding("daemon", Status.WARN, f"{detail}; installed is {here}", remedy)
    else:
        yield Finding("daemon", Status.OK, detail)
    held = f"{', '.join(found.limits)} by {found.limits_by}" if found.limits else "none"
    if found.limits_reason:
        detail = f"{held}: {found.limits_reason}"
        remedy = "docs/operations.md, Limits of guests; see also control-groups here"
        yield Finding("guests-limits", Status.WARN, detail, remedy)
    else:
        yield Finding("guests-limits", Status.OK, held)
