"""Run a tool: its own process group, stdin closed, its words kept for the error.

Whatever ends the wait (an error, a cancellation, the time-out) also ends the tool and all that it
started: SIGTERM, so that it can remove its own temporary files, then SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections import deque
from collections.abc import Callable, Sequence

from stratabox.storage.model.errors import DeniedError, FailedError, NoSpaceError

_SEARCH = os.pathsep.join(
    # A plain user's PATH often lacks the sbin folders, where mke2fs lives.
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)
_PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "newuidmap": "uidmap",
    "qemu-img": "qemu-utils",
    "prlimit": "util-linux",
    "setpriv": "util-linux",
    "unshare": "util-linux",
}
_NO_SPACE = (
    "No space left on device",
    "Disk quota exceeded",
    "have enough free space",
    "Could not allocate block in ext2 filesystem",
)
_TROUBLE = re.compile(r"dpkg: error |E: |.*\berror: ")
_TAIL_LINES = 30
_BEFORE, _AFTER = 12, 2
"""Lines that are kept around the first trouble, whose cause stands before it."""
_GRACE_S = 10.0


class _Words:
    """What is kept of what a tool says: the last lines, and those around its first trouble."""

    def __init__(self) -> None:
        self.has_room = True
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._count = 0
        self._first: list[str] = []
        self._first_until = 0

    def take(self, line: str) -> None:
        """One line more."""
        self._tail.append(line)
        self._count += 1
        if any(sign in line for sign in _NO_SPACE):
            self.has_room = False
        if not self._first and _TROUBLE.match(line):
            self._first = list(self._tail)[-_BEFORE - 1 :]
            self._first_until = self._count + _AFTER
        elif self._count <= self._first_until:
            self._first.append(line)

    def tail(self) -> str:
        """The last lines."""
        return "\n".join(self._tail)

    def trouble(self) -> str:
        """The last lines; before them, where it is not among them, the first trouble."""
        begun = self._first_until - _AFTER - _BEFORE
        if not self._first or begun > self._count - _TAIL_LINES:
            return self.tail()
        return "\n".join([*self._first, "…", *self._tail])


def require(*tools: str) -> None:
    """Let a host pass that has these tools.

    :raise DeniedError: TOOL_MISSING; names the Debian packages to install.
    """
    missing = [tool for tool in tools if shutil.which(tool, path=_SEARCH) is None]
    if missing:
        packages = " ".join(sorted({_PACKAGES[tool] for tool in missing}))
        raise DeniedError(
            f"{', '.join(missing)} is missing on this host: apt install {packages}.",
            reason="TOOL_MISSING",
            tool=missing[0],
            package=packages,
        )


async def run(
    argv: Sequence[str],
    *,
    what: str,
    pass_fds: Sequence[int] = (),
    env: dict[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    seconds: float | None = None,
    good: Sequence[int] = (0,),
) -> str:
    """Run a tool to its end and return the last lines of what it said (stdout and stderr).

    When this returns, raises or is cancelled, nothing of the tool's process group is left.

    :param what: What is being done, for the error: "making the file system".
    :param env: Added to a small fixed environment.
    :param on_line: Called with each line as it comes.
    :param seconds: Time-out.
    :param good: Exit codes that are no failure.
    :raise DeniedError: TOOL_MISSING.
    :raise NoSpaceError: NO_SPACE, when the tool said so.
    :raise FailedError: IMAGE_BUILD_FAILED; the message has the tool's first trouble and last words.
    """
    require(argv[0])
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=tuple(pass_fds),
        env=_environment() | (env or {}),
        cwd="/",
        start_new_session=True,
    )
    words = _Words()
    try:
        async with asyncio.timeout(seconds):
            await _read(process, words, on_line)
            code = await process.wait()
    except TimeoutError:
        raise FailedError(
            f"{what}: {argv[0]} did not end within {seconds:g} s.", reason="IMAGE_BUILD_FAILED"
        ) from None
    finally:
        await _end(process)
    if code in good:
        return words.tail()
    if not words.has_room:
        raise NoSpaceError(f"{what}: no space left on the host's disk.", reason="NO_SPACE")
    fate = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise FailedError(
        f"{what}: {argv[0]} failed ({fate}).\n{words.trouble()}", reason="IMAGE_BUILD_FAILED"
    )


def _environment() -> dict[str, str]:
    """What tools see of our environment: no more than finding files and the net needs."""
    kept = ("HOME", "TMPDIR", "USER", "LOGNAME", "http_proxy", "https_proxy", "no_proxy")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    return found | {"PATH": _SEARCH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}


async def _read(
    process: asyncio.subprocess.Process,
    words: _Words,
    on_line: Callable[[str], None] | None,
) -> None:
    assert process.stdout is not None
    rest = b""
    while piece := await process.stdout.read(1 << 16):
        *lines, rest = (rest + piece).replace(b"\r", b"\n").split(b"\n")
        rest = rest[-4096:]
        for raw in lines:
            line = raw[:1000].decode(errors="replace").rstrip()
            if not line:
                continue
            words.take(line)
            if on_line:
                on_line(line)
    if rest.strip():
        words.take(rest.decode(errors="replace").rstrip())


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the whole group and reap the tool. Cancelling the caller does not cut this short."""
    task = asyncio.ensure_future(_end_now(process))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _end_now(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await process.wait()
    _signal(process.pid, signal.SIGKILL)
    await process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
