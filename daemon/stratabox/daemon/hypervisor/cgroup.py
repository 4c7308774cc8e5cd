"""Control groups as they are: where they are mounted, and what memory the daemon's may still take.

Both versions are read (cgroups(7)): on many hosts the memory controller is still in a hierarchy of
version 1. Where one is mounted is told by /proc/self/mountinfo, which process is in which group by
/proc/self/cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

_UNLIMITED = 1 << 60
"""Version 1 says "no limit" by a number near the largest that there is."""


def memory_room(proc: Path = Path("/proc/self")) -> int | None:
    """Bytes that this process's group may still take, or the tightest one above it; None: no limit.

    Pages of files that can be dropped at once do not count as taken.
    """
    rooms = [
        room
        for controller, names in (
            ("", ("memory.max", "memory.current", "inactive_file")),
            ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        )
        for folder in _folders(proc, controller)
        if (room := _room(folder, *names)) is not None
    ]
    return min(rooms, default=None)


def group_of(pid: int | str = "self") -> Path | None:
    """The folder of a process's group of version 2; None: it has none that can be seen here."""
    return next(_folders(Path("/proc", str(pid)), ""), None)


def hierarchies(mountinfo: Path = Path("/proc/self/mountinfo")) -> list[Path]:
    """Where version 2 is mounted, with its root or a part of it."""
    return [Path(point) for _, point in _mounts(mountinfo.read_text().splitlines(), "")]


def words(file: Path) -> frozenset[str]:
    """What is in a file such as cgroup.controllers; nothing where it cannot be read."""
    try:
        return frozenset(file.read_text().split())
    except OSError:
        return frozenset()


def disk_of(path: Path, sys: Path = Path("/sys/dev/block")) -> str | None:
    """MAJOR:MINOR of the whole disk that a file is on; None: of no single one.

    Of a partition bandwidth cannot be limited.
    """
    number = path.stat().st_dev
    found = sys / f"{os.major(number)}:{os.minor(number)}"
    if not found.exists():
        return None
    if (found / "partition").exists():
        return (found.resolve().parent / "dev").read_text().strip()
    return found.name


def _folders(proc: Path, controller: str) -> Iterator[Path]:
    """The folder of this process's group and those above it; "" is version 2."""
    try:
        rows = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return
    group = next((path for names, path in _groups(rows) if controller in names), None)
    if group is None:
        return
    for root, point in _mounts(mounts, controller):
        # Of a group above the mount's root nothing can be seen here.
        if group != root and not group.startswith(f"{root.rstrip('/')}/"):
            continue
        inner = group[len(root.rstrip("/")) :].strip("/")
        folder = Path(point, inner)
        while folder != Path(point).parent:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        return


def _groups(rows: Sequence[str]) -> Iterator[tuple[Sequence[str], str]]:
    for row in rows:
        parts = row.split(":", 2)
        if len(parts) == 3:
            yield parts[1].split(","), parts[2]


def _mounts(rows: Sequence[str], controller: str) -> Iterator[tuple[str, str]]:
    """Root and mount point of each mount of that hierarchy."""
    for row in rows:
        before, _, after = row.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        wanted = (
            kind[0] == "cgroup2"
            if controller == ""
            else kind[0] == "cgroup" and controller in kind[2].split(",")
        )
        if wanted:
            yield fields[3], fields[4]


def _room(folder: Path, limit: str, usage: str, droppable: str) -> int | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        if most == "max" or int(most) >= _UNLIMITED:
            return None
        rows = dict(
            line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines()
        )
    except (OSError, ValueError):
        return None
    return max(0, int(most) - used + int(rows.get(droppable, 0)))
