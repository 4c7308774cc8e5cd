"""Puts guests into control groups of our own (cgroups(7), version 2), where no systemd does.

```
FOLDER                       as configured; its controllers are passed on
└── STORE                    one for each store, so for each daemon
    ├── guest-ID-PID         QEMU of a sandbox
    └── network-ID-PID       the helper of its network
```

A group goes when its last process has: the kernel tells that by the group's ``cgroup.events``. One
that a killed daemon left goes at the next start of one. Guests outlive the daemon in theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import threading
from collections.abc import Collection
from pathlib import Path

from stratabox.daemon.hypervisor import cgroup
from stratabox.daemon.hypervisor.housing import HouseError
from stratabox.daemon.hypervisor.limits import Controller, GroupLimits, group_files
from stratabox.storage.model.ids import SandboxId

log = logging.getLogger(__name__)


class Groups:
    """The groups of one store; implements `House`. Whoever does not `keep` it closes it.

    What is in there already is taken over: groups without a process go at once.

    :param root: the store's own folder, as of `prepare`.
    :param held: what can be limited in there.
    :param place: a folder on the device whose bandwidth is limited.
    :param automatic: the folder above goes, too, when nothing is in there any more.
    """

    def __init__(
        self,
        root: Path,
        held: Collection[Controller],
        place: Path,
        *,
        automatic: bool = False,
    ) -> None:
        self.root = root
        self._held = held
        self._automatic = automatic
        self._device = cgroup.disk_of(place)
        # Taken for a moment, by threads: a group that is being made is without a process, too.
        self._turn = threading.Lock()
        self._poll = select.epoll()
        self._watched: dict[int, Path] = {}
        for group in sorted(root.iterdir()):
            if group.is_dir():
                self._watch(group)
        self._sweep()

    async def put(
        self, kind: str, sandbox: SandboxId, pid: int, limits: GroupLimits | None
    ) -> None:
        """Have a process run in a group of its own, which goes with its last process.

        :raise HouseError: when the kernel refuses; nothing is left then.
        """
        files = {} if limits is None else group_files(limits, self._held, self._device)
        group = self.root / f"{kind}-{sandbox}-{pid}"
        try:
            await asyncio.to_thread(self._make, group, files, pid)
        except OSError as error:
            raise HouseError(f"{error.filename or group}: {error.strerror}") from error

    async def keep(self) -> None:
        """Remove groups as they become empty, until cancelled; then let go of all."""
        changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._poll.fileno(), changed.set)
        try:
            while True:
                await changed.wait()
                changed.clear()
                await asyncio.to_thread(self._sweep)
        finally:
            loop.remove_reader(self._poll.fileno())
            self.close()

    def close(self) -> None:
        """Let go of all groups; those with processes stay, and the store's, if there are any."""
        self._sweep()
        with self._turn:
            for descriptor in self._watched:
                os.close(descriptor)
            self._watched.clear()
            self._poll.close()
        with contextlib.suppress(OSError):
            self.root.rmdir()
            if self._automatic:
                self.root.parent.rmdir()

    def _make(self, group: Path, files: dict[str, str], pid: int) -> None:
        with self._turn:
            group.mkdir()
            try:
                for name, value in files.items():
                    _write(group / name, value)
                _write(group / "cgroup.procs", str(pid))
            except OSError:
                group.rmdir()
                raise
            self._watch(group)

    def _watch(self, group: Path) -> None:
        descriptor = os.open(group / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        self._watched[descriptor] = group
        # A change is told as an exceptional condition, until the file is read again.
        self._poll.register(descriptor, select.EPOLLPRI)

    def _sweep(self) -> None:
        with self._turn:
            for descriptor, group in list(self._watched.items()):
                if b"populated 1" in os.pread(descriptor, 4096, 0):
                    continue
                _tell_killed(group)
                self._poll.unregister(descriptor)
                os.close(descriptor)
                del self._watched[descriptor]
                try:
                    group.rmdir()
                except OSError as error:
                    log.error("%s stays: %s", group, error.strerror)


def prepare(folder: Path, store: str, wanted: Collection[Controller]) -> frozenset[Controller]:
    """Make a store's folder in a hierarchy, and have as many controllers as can be in there.

    :return: those that there are.
    :raise HouseError: when there can be no groups at all.
    """
    point = _hierarchy_of(folder)
    if point is None:
        raise HouseError(f"{folder} is not in a hierarchy of control groups of version 2")
    root = folder / store
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HouseError(f"{root} cannot be made: {error.strerror}") from error
    # From above, as far as they are not there yet: what is above the folder is others'.
    above = [each for each in reversed(folder.parents) if each.is_relative_to(point)]
    for each in (*above, folder, root):
        if each in above and _has(folder, wanted):
            continue
        for controller in wanted:
            if str(controller) in cgroup.words(each / "cgroup.subtree_control"):
                continue
            with contextlib.suppress(OSError):  # what is missing in the end is told
                _write(each / "cgroup.subtree_control", f"+{controller}")
    passed = cgroup.words(root / "cgroup.subtree_control")
    return frozenset(each for each in wanted if str(each) in passed)


def _has(folder: Path, wanted: Collection[Controller]) -> bool:
    return {str(each) for each in wanted} <= cgroup.words(folder / "cgroup.controllers")


def _hierarchy_of(folder: Path) -> Path | None:
    return next((each for each in cgroup.hierarchies() if folder.is_relative_to(each)), None)


def _write(file: Path, value: str) -> None:
    # In one piece, and never made: a file that is not there is a controller that is not.
    descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, value.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        os.close(descriptor)


def _tell_killed(group: Path) -> None:
    try:
        rows = dict(row.split() for row in (group / "memory.events").read_text().splitlines())
    except (OSError, ValueError):
        return  # memory is not counted there
    if int(rows.get("oom_kill", 0)):
        log.warning("%s came to its memory limit, and was killed by the kernel", group.name)
