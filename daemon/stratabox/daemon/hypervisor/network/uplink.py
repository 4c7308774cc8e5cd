"""The daemon's side of a helper: starts it, finds it again, tells it the policy, ends it.

```
 start ─▶ (its code loads, QEMU starts) ─▶ connect ─▶ up ─▶ change, look ─▶ its QEMU's end, or end
 find, by the control socket in the sandbox's folder ──────▶ up
```

A helper is found by the socket that it listens on, and one that does not answer there by its
command line, so that none is left behind, whenever a daemon was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from stratabox.daemon.hypervisor import process, sockets
from stratabox.daemon.hypervisor.network import wire
from stratabox.daemon.hypervisor.network.slirp import load
from stratabox.daemon.hypervisor.network.walls import Counters
from stratabox.storage.model.errors import DeniedError, FailedError
from stratabox.storage.model.network import Network

ANSWER_SECONDS = 20.0
"""For a helper to answer in, from its start; it takes 0.1 s on a quiet host."""
FIND_SECONDS = 3.0

_MODULE = "stratabox.daemon.hypervisor.network.helper"
_PROC = Path("/proc")


def require_library() -> None:
    """:raise DeniedError: NETWORK_UNAVAILABLE, when this host has no libslirp."""
    try:
        load()
    except OSError as error:
        raise DeniedError(
            f"network egress needs libslirp, and this host has none ({error}): install libslirp0",
            reason="NETWORK_UNAVAILABLE",
        ) from None


class Uplink:
    """One helper that runs, or ran a moment ago. Made by `start` or `find`."""

    def __init__(self, pid: int, started: int, folder: Path, control: socket.socket) -> None:
        self.pid = pid
        self.started = started
        self._folder = folder
        self._control = control
        self._turn = asyncio.Lock()

    @classmethod
    def start(cls, name: str, folder: Path, uid: int | None) -> Uplink:
        """Start one, which waits to be attached. Some ms; nothing is left when this raises.

        :param name: by which it is found again; the domain's.
        :param uid: host uid that it runs as; None: the daemon's own.
        :raise FailedError: NETWORK_FAILED.
        """
        try:
            with (
                sockets.listen(folder, wire.CONTROL, wire.KIND) as listening,
                _log(folder) as log,
            ):
                arguments = [sys.executable, "-S", "-P", "-B", "-s", "-m", _MODULE]
                arguments += ["--name", name, "--control", str(listening.fileno())]
                if uid is not None:
                    arguments += ["--uid", str(uid)]
                child = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env={
                        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                        "LC_ALL": "C",
                        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    },
                    pass_fds=[listening.fileno()],
                    start_new_session=True,
                )
            started = process.start_time(child.pid) or 0
            child.returncode = 0  # from here on `process.reap` reaps it
            try:
                return cls(child.pid, started, folder, _connect(folder))
            except OSError:
                os.kill(child.pid, signal.SIGKILL)  # ours, and not reaped: it cannot be another
                raise
        except (OSError, subprocess.SubprocessError) as error:
            raise FailedError(
                f"the network's helper cannot be started: {error}.", reason="NETWORK_FAILED"
            ) from error

    @classmethod
    async def find(cls, name: str, folder: Path) -> Uplink | None:
        """The helper that an earlier daemon started; None: there is none that can be used.

        One that does not answer is ended.
        """
        try:
            control = _connect(folder)
        except OSError:
            control = None
        if control is not None:
            found = cls(0, 0, folder, control)
            try:
                async with asyncio.timeout(FIND_SECONDS):
                    answer = await found._ask({"do": "look"})
                found.pid = int(str(answer["pid"]))
                found.started = process.start_time(found.pid) or 0
                return found
            except (TimeoutError, FailedError):
                control.close()
        for pid, started in await asyncio.to_thread(_running, name):
            await process.kill(pid, started)
        return None

    def connect(self, network: Network) -> None:
        """Give it the wire to the guest's card, and its policy. It may still be starting.

        :raise FailedError: NETWORK_FAILED, when QEMU has no such wire, or the helper has ended.
        """
        order = json.dumps({"do": "attach", "rules": network.allow}).encode()
        try:
            with sockets.connect(self._folder, wire.LINK) as link:
                socket.send_fds(self._control, [order], [link.fileno()])
        except OSError as error:
            raise self._failed(f"cannot be connected to QEMU ({error})") from error

    async def up(self) -> None:
        """Wait until it has done what `connect` told it.

        :raise FailedError: NETWORK_FAILED, with its last words.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._hear()
            except TimeoutError:
                raise self._failed("does not answer") from None

    async def change(self, network: Network) -> None:
        """Have it hold to another policy; on return, what is not allowed any more has ended.

        :raise FailedError: NETWORK_FAILED; then it must be ended.
        """
        await self._ask_in_time({"do": "change", "rules": network.allow})

    async def look(self) -> Counters:
        """What has gone through since it was started. :raise FailedError: NETWORK_FAILED."""
        answer = await self._ask_in_time({"do": "look"})
        counters = answer.get("counters")
        assert isinstance(counters, dict)
        return Counters(**counters)

    async def gone(self) -> None:
        """Wait until it has ended."""
        with process.opened(self.pid, self.started) as pidfd:
            if pidfd is not None:
                await process.wait_gone(pidfd)
        process.reap(self.pid, self.started)

    async def end(self) -> None:
        """End it, and wait until it is gone. Idempotent."""
        self.let_go()
        await process.kill(self.pid, self.started)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (self._folder / wire.CONTROL).unlink()

    def let_go(self) -> None:
        """Leave it to itself, for the next daemon to find."""
        self._control.close()

    def age(self) -> float:
        """Seconds since it was started, by whichever daemon."""
        ticks = os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - self.started / ticks

    def last_words(self) -> str:
        """The end of its log."""
        try:
            with (self._folder / wire.LOG).open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - process.LOG_TAIL))
                return process.printable(log.read().decode(errors="replace")).strip()
        except FileNotFoundError:
            return ""

    async def _ask_in_time(self, order: dict[str, object]) -> dict[str, object]:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._ask(order)
        except TimeoutError:
            raise self._failed("does not answer") from None

    async def _ask(self, order: dict[str, object]) -> dict[str, object]:
        async with self._turn:
            try:
                self._control.send(json.dumps(order).encode())
            except OSError as error:
                raise self._failed(f"has ended ({error})") from error
            return await self._hear()

    async def _hear(self) -> dict[str, object]:
        try:
            data = await asyncio.get_running_loop().sock_recv(self._control, wire.MAX_BYTES)
            answer = json.loads(data) if data else None
        except (OSError, ValueError) as error:
            raise self._failed(f"does not answer ({error})") from error
        if not isinstance(answer, dict):
            raise self._failed("has ended")
        if "error" in answer:
            raise self._failed(f"refuses: {process.printable(str(answer['error']))[:500]}")
        return answer

    def _failed(self, what: str) -> FailedError:
        words = self.last_words()
        return FailedError(
            f"the network's helper {what}" + (f": {words}" if words else ""),
            reason="NETWORK_FAILED",
        )


def _connect(folder: Path) -> socket.socket:
    return sockets.connect(folder, wire.CONTROL, wire.KIND)


def _running(name: str) -> Sequence[tuple[int, int]]:
    """Helpers of that name, by their command lines: pid and start time."""
    found = []
    wanted = [b"-m", _MODULE.encode(), b"--name", name.encode()]
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        started = process.start_time(int(entry.name))
        if arguments[5:9] == wanted and started is not None:
            found.append((int(entry.name), started))
    return found


@contextlib.contextmanager
def _log(folder: Path) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_TRUNC | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    descriptor = os.open(folder / wire.LOG, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
