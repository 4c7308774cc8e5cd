"""What a guest was short of when a command in it failed: memory, or room on a disk.

The guest is asked only where a command ended as one does for want of these: killed, or with words
of what failed. What it answers is a guess about why, and the guest's own.
"""

from __future__ import annotations

import time
from dataclasses import replace

from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.exec import ExecResult, execute
from stratabox.storage.model.errors import StrataboxError

_KILL = 9
_BY_SIGNAL = 128
"""Above it, a shell's exit code is that of a command of its that a signal has ended."""
_ROOM_WORDS = (b"No space left", b"I/O error", b"Disk quota", b"write error")
_LAST = 4096
"""Bytes at the end of standard error that are looked at."""
_ASK_SECONDS = 15.0
_ANSWER_BYTES = 8192

# $1: the directory of the command. The time since boot; each kill for want of memory: its time
# since boot, and whom; "full" for a file system without room.
_ASK = """\
read -r up rest </proc/uptime && echo "$up"
dmesg | sed -n 's/^\\[ *\\([0-9.]*\\)\\].*Killed process \\([0-9]*\\).*/\\1 \\2/p' | tail -n 50
df -P -- "$1" /tmp / | while read -r device size used left rest; do
    [ "$left" != 0 ] || echo full
done
"""


async def look(agent: GuestAgent, result: ExecResult, cwd: str) -> ExecResult:
    """The same result, with what its guest was short of; called as soon as it is there.

    Where the guest does not answer, nothing is known, and nothing is said.
    """
    killed = _KILL in (result.signal, (result.exit_code or 0) - _BY_SIGNAL)
    tail = result.stderr[-_LAST:]
    if result.timed_out or not (killed or (result.exit_code and _names_room(tail))):
        return result
    started = time.monotonic() - result.duration
    try:
        answer = await execute(agent, ["sh", "-c", _ASK, "sh", cwd], timeout=_ASK_SECONDS)
    except StrataboxError:
        return result
    elapsed = time.monotonic() - started
    memory, disk = read(answer.stdout[:_ANSWER_BYTES], elapsed, result.pid)
    return replace(result, out_of_memory=killed and memory, disk_full=disk)


def read(answer: bytes, elapsed: float, pid: int) -> tuple[bool, bool]:
    """Whether somebody was killed for want of memory since a command began; whether a disk is full.

    :param elapsed: seconds since its beginning.
    :param pid: the command's; those that it started have higher ones.
    """
    first, *lines = answer.decode(errors="replace").splitlines() or [""]
    try:
        began = float(first) - elapsed
        kills = [line.split() for line in lines if line != "full"]
        found = any(float(when) >= began and int(whom) >= pid for when, whom in kills)
    except ValueError:
        return False, False
    return found, "full" in lines


def _names_room(text: bytes) -> bool:
    return any(word in text for word in _ROOM_WORDS)
