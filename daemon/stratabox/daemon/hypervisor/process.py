"""QEMU processes: named so that they are found again, identified beyond doubt, watched to the end.

A process is identified by its pid *and* its start time. Whoever signals one holds a pidfd that was
checked against the start time, so that a pid that the kernel gave to somebody else is never hit.
Domains are found by the name in their command line, not by pid files: a daemon can be killed
between a fork and the writing of a file, but a process always has its command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import signal
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId, is_id

LOG = "qemu.log"
LOG_TAIL = 2000
"""At most so many bytes of QEMU's own words go into a message."""

_PROC = Path("/proc")
_NAME = re.compile(rb"guest=stratabox-([A-Za-z0-9_.-]+?)-([0-9a-f-]{36})(?:,|$)")
_REMEMBERED = 4096

_status: OrderedDict[tuple[int, int], int] = OrderedDict()
"""Exit statuses of own children: a child can be reaped once, and several want to know."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A running QEMU of ours."""

    sandbox: SandboxId
    pid: int
    started: int


def guest_name(store_id: str, sandbox: SandboxId) -> str:
    """What the domain is called on its command line and in libvirt."""
    return f"stratabox-{store_id}-{sandbox}"


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None when it is gone or a zombie."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name in parentheses may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def find_all(store_id: str) -> list[Found]:
    """All running domains of one store. A domain that was just forked may not have its name yet."""
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        sandbox = _sandbox_in(arguments, store_id)
        started = start_time(int(entry.name)) if sandbox else None
        if sandbox is not None and started is not None:
            found.append(Found(sandbox=sandbox, pid=int(entry.name), started=started))
    return found


def _sandbox_in(arguments: list[bytes], store_id: str) -> SandboxId | None:
    # Only the argument after -name counts, of a program that is QEMU or its wrapper: a shell in
    # whose command line our name happens to appear is none of ours.
    for option, value in itertools.pairwise(arguments):
        match = _NAME.match(value) if option == b"-name" else None
        if match and match[1] == store_id.encode() and is_id(text := match[2].decode()):
            return SandboxId(text)
    return None


@contextlib.contextmanager
def opened(pid: int, started: int) -> Iterator[int | None]:
    """A pidfd of exactly that process, closed afterwards; None when it is gone."""
    descriptor = open_pidfd(pid, started)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def open_pidfd(pid: int, started: int) -> int | None:
    """A pidfd of exactly that process, for the caller to close; None when it is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Checked after opening: from here on the descriptor can't come to mean another process.
    if start_time(pid) != started:
        os.close(descriptor)
        reap(pid, started)
        return None
    return descriptor


async def wait_gone(pidfd: int) -> None:
    """Wait until the process of a pidfd has ended. It may still be a zombie."""
    loop = asyncio.get_running_loop()
    watched = os.dup(pidfd)  # add_reader knows one callback a descriptor, and callers may share
    gone = asyncio.Event()
    loop.add_reader(watched, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(watched)
        os.close(watched)


def reap(pid: int, started: int) -> int | None:
    """Exit status of an ended process, negative for a signal; None for one that is not our child.

    Reaps the zombie where there is one. Can be asked any number of times.
    """
    key = (pid, started)
    if key in _status:
        return _status[key]
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    exited = result.si_code == os.CLD_EXITED
    _status[key] = result.si_status if exited else -result.si_status
    while len(_status) > _REMEMBERED:
        _status.popitem(last=False)
    return _status[key]


async def kill(pid: int, started: int, seconds: float = 60.0) -> None:
    """End a process at once and wait until it is gone. One that is gone already is fine.

    :raise FailedError: QEMU_FAILED, when the kernel does not let go of it in time.
    """
    with opened(pid, started) as pidfd:
        if pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            try:
                async with asyncio.timeout(seconds):
                    await wait_gone(pidfd)
            except TimeoutError:
                raise FailedError(
                    f"QEMU (process {pid}) does not end although it was killed; the host's "
                    "storage may hang.",
                    reason="QEMU_FAILED",
                ) from None
    reap(pid, started)


async def end_child(child: asyncio.subprocess.Process, seconds: float = 2.0) -> None:
    """Kill a short-lived helper that still runs, and reap it if the kernel lets go of it soon."""
    if child.returncode is None:
        child.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await child.communicate()


def describe(status: int | None) -> str:
    """An exit status as the end of a sentence that begins with "QEMU"."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"exited with code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-status} ({name})"


def log_size(folder: Path) -> int:
    """Bytes of QEMU's messages so far."""
    try:
        return (folder / LOG).stat().st_size
    except FileNotFoundError:
        return 0


def log_tail(folder: Path, since: int = 0) -> str:
    """QEMU's last words: the end of what it wrote after byte `since`; "" when it wrote nothing."""
    try:
        with (folder / LOG).open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(since, end - LOG_TAIL))
            return printable(log.read(LOG_TAIL).decode(errors="replace")).strip()
    except FileNotFoundError:
        return ""


def printable(text: str) -> str:
    """Text from a guest or from QEMU, with control characters made visible (but line ends)."""
    return "".join(
        character
        if character == "\n" or character.isprintable()
        else character.encode("unicode_escape").decode()
        for character in text.replace("\r\n", "\n").replace("\t", "    ")
    )
