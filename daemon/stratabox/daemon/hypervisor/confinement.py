"""Within what walls QEMU runs: as many as this host has, tried once, at the daemon's start.

```
 full        namespaces + Landlock + seccomp     root with CAP_SYS_ADMIN, or user namespaces
 paths       Landlock + seccomp                  a kernel with Landlock
 plain       QEMU's own seccomp sandbox alone    where nothing else can be had
```

(under libvirt no pid namespace: ``libvirt/walls.py``)

Under each of them QEMU has a uid of its own where the daemon is root, and descriptors instead of
paths. Whatever was found to work is then used for every guest, without a way back: a start where it
fails is a start that fails. ``walls.h`` does the work, in ``confine.c``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from stratabox.daemon.hypervisor import process
from stratabox.storage.model.errors import DeniedError

log = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("confine.1")
_TRY_SECONDS = 20.0
_NOBODY = 65534
"""Guests of root's daemon have users that own nothing, either."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SYS_LANDLOCK_CREATE_RULESET = 444  # x86-64


class Walls(StrEnum):
    """How much is between a guest and its host."""

    FULL = "full"
    PATHS = "paths"
    PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """What QEMU opens once more by /proc/self/fd."""

    folders: Mapping[int, Path | None]
    """Descriptors of folders → where those are; None: where QEMU's user may not enter what is
    above them, so that there is no way up."""
    files: Sequence[int]
    devices: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What every guest of this daemon is started in."""

    walls: Walls
    why: str = ""
    """Why not more; empty: there is all."""
    trees: Sequence[str] = ()
    """What QEMU reads and executes."""

    def options(self, *, spaces: str, reopened: Reopened, devices: Sequence[str] = ()) -> list[str]:
        """These walls, in the words of ``walls.h``.

        :param spaces: the namespaces, where there are any.
        :param devices: that it may use, beside those that everybody may.
        """
        options = [f"space={spaces}"] if self.walls is Walls.FULL else []
        options += ["landlock=1", *(f"tree={each}" for each in self.trees)]
        options += [f"device={each}" for each in (*_DEVICES, *devices)]
        options += [
            f"folder={number}" if path is None else f"folder={number}:{path}"
            for number, path in reopened.folders.items()
        ]
        options += [f"file={number}" for number in reopened.files]
        options += [f"opened={number}" for number in reopened.devices]
        return options

    def command(
        self,
        command: Sequence[str],
        *,
        report: int,
        uid: int | None,
        groups: Sequence[int] = (),
        reopened: Reopened,
        devices: Sequence[str] = (),
    ) -> list[str]:
        """The command that becomes this one, within the walls.

        :param report: where its pid comes; see `spawn`.
        :param devices: that it may use, beside those that everybody may.
        """
        options = [f"report={report}"]
        if uid is not None:
            options += [f"uid={uid}", *(f"group={each}" for each in groups)]
        # User namespaces for those who may make the others in no other way.
        spaces = "mpnih" if os.geteuid() == 0 else "umpnih"
        options += self.options(spaces=spaces, reopened=reopened, devices=devices)
        return [str(PROGRAM), *options, "--", *command]


PLAIN = Confinement(walls=Walls.PLAIN, why="it is switched off")
"""QEMU's own seccomp sandbox, and nothing else."""


def spawn(
    arguments: Sequence[str],
    report: tuple[int, int],
    *,
    output: int,
    environment: Mapping[str, str],
    descriptors: Sequence[int],
) -> int:
    """Start what `Confinement.command` gave; the pid of the process that becomes it, our child.

    Takes some ms, and not in a thread: so a cancellation can't come between.

    :param report: both ends of a pipe, whose second it was given. The first is read.
    :param output: where its words go, and its errors.
    :raise OSError: when it cannot be started.
    """
    child = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env=environment,
        pass_fds=[*descriptors, report[1]],
    )
    # It ends at once, whatever it did; and it has told the pid before it ends, if ever.
    status = child.wait()
    os.set_blocking(report[0], False)
    with contextlib.suppress(BlockingIOError):
        if told := os.read(report[0], 32):
            return int(told)
    raise OSError(f"{PROGRAM.name} {process.describe(status)}")


async def choose(qemu: Path, *, required: bool) -> Confinement:
    """Find out what can be had for this QEMU, by trying it.

    :raise DeniedError: CONFINEMENT_UNAVAILABLE, when all is required and cannot be had.
    """
    found = await asyncio.to_thread(examine, qemu)
    if found.why and required:
        raise denied(found.why)
    if found.why:
        warn(found.walls, found.why)
    return found


def denied(why: str) -> DeniedError:
    """The error where all walls are required and cannot be had."""
    return DeniedError(
        f"guests cannot be confined as is required: {why}. strataboxd doctor tells what"
        ' to do; confinement = "auto" takes what there is.',
        reason="CONFINEMENT_UNAVAILABLE",
    )


def warn(walls: Walls, why: str) -> None:
    """Log that guests have less than there could be."""
    log.warning("guests are confined less than they could be (%s): %s", walls, why)


def examine(qemu: Path) -> Confinement:
    """What can be had here for that QEMU. Blocks for 0.1 s or more."""
    if not PROGRAM.exists():
        return Confinement(
            walls=Walls.PLAIN,
            why=f"{PROGRAM.name} is missing: it is built with Stratabox where there is a C"
            " compiler",
        )
    trees = trees_of(qemu)
    full = Confinement(walls=Walls.FULL, trees=trees)
    trouble = _try(full, qemu)
    if not trouble:
        if landlock_version():
            return full
        return Confinement(walls=Walls.FULL, trees=trees, why="this kernel has no Landlock")
    if not landlock_version():
        # The filter needs nothing, but what would still be in reach makes it hardly a wall.
        return Confinement(
            walls=Walls.PLAIN, why=f"no namespaces ({trouble}), and no Landlock in this kernel"
        )
    paths = Confinement(walls=Walls.PATHS, trees=trees, why=f"no namespaces ({trouble})")
    worse = _try(paths, qemu)
    if not worse:
        return paths
    return Confinement(walls=Walls.PLAIN, why=f"no namespaces ({trouble}), nor Landlock ({worse})")


def landlock_version() -> int:
    """The version of Landlock's interface that this kernel has on; 0: none."""
    found = ctypes.CDLL(None).syscall(_SYS_LANDLOCK_CREATE_RULESET, None, 0, 1)
    return max(0, int(found))


def trees_of(qemu: Path) -> list[str]:
    """What a program needs from its start to its end: itself, and the libraries."""
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    prefix = qemu.parent.parent
    if prefix not in (Path("/usr"), Path("/")):
        wanted += [str(prefix / each) for each in ("lib", "lib64")]
    return [*(each for each in wanted if os.path.lexists(each)), str(qemu)]


def _try(confinement: Confinement, qemu: Path) -> str:
    """Why QEMU does not run in there; empty: it does."""
    with contextlib.ExitStack() as stack:
        report = os.pipe()
        words = os.memfd_create("words")
        for number in (*report, words):
            stack.callback(os.close, number)
        command = confinement.command(
            [str(qemu), "--version"],
            report=report[1],
            uid=_NOBODY if os.geteuid() == 0 else None,
            reopened=Reopened(folders={}, files=[]),
        )
        try:
            pid = spawn(command, report, output=words, environment={}, descriptors=[])
        except OSError as error:
            return _said(words) or str(error)
        try:
            ended = _status(pid)
        except TimeoutError:
            return "QEMU did not end in there"
        return "" if ended == 0 else _said(words) or f"QEMU {process.describe(ended)}"


def _status(pid: int) -> int:
    """How our child ends. :raise TimeoutError: not in time; it is killed then."""
    pidfd = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([pidfd], [], [], _TRY_SECONDS)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        os.close(pidfd)
    if not ready:
        raise TimeoutError
    return code


def _said(words: int) -> str:
    text = os.pread(words, process.LOG_TAIL, 0).decode(errors="replace")
    return process.printable(text).strip().removeprefix("confine: ")
