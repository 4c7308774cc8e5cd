"""Files in guests, when something goes wrong: nothing half is left, and nothing runs on."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.client import AsyncClient, GuestNoSpaceError, GuestReadOnlyError, Sandbox
from support.daemon import DaemonProcess
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]
MIB = 1 << 20
NOISE = random.Random(7).randbytes(300_000)


@pytest.fixture
def folder(module_box: Sandbox, sh: Shell) -> Iterator[str]:
    """A folder in the guest for one test."""
    sh(module_box, "mkdir /work")
    yield "/work"
    sh(module_box, "umount /work/small 2>/dev/null; rm -rf /work")


def _memory(daemon: DaemonProcess, which: str) -> int:
    """VmRSS: what the daemon has now, from when on VmHWM has its most. In bytes."""
    folder = Path("/proc") / str(daemon.pid)
    if which == "VmRSS":
        (folder / "clear_refs").write_text("5")
    lines = (folder / "status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith(which))
    return int(line.split()[1]) << 10


def _programs(box: Sandbox) -> list[str]:
    """The command lines of all that runs in the guest."""
    line = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f 2>/dev/null; echo; done"
    return box.execute(line).stdout_text.split("\n")


def names(box: Sandbox, path: str) -> list[bytes]:
    return [each.path for each in box.files.list(path)]


def test_a_full_file_system(module_box: Sandbox, folder: str, sh: Shell) -> None:
    small = f"{folder}/small"
    sh(module_box, f"mkdir {small} && mount -t tmpfs -o size=1m none {small}")
    module_box.files.write(f"{small}/kept", b"kept")
    for path in (f"{small}/new", f"{small}/kept"):
        with pytest.raises(GuestNoSpaceError, match=path) as caught:
            module_box.files.write(path, NOISE * 20)
        assert caught.value.metadata["path"] == path
        assert names(module_box, small) == [b"kept"]
    assert module_box.files.read(f"{small}/kept") == b"kept"
    sh(module_box, f"mount -o remount,ro {small}")
    for call in (
        lambda: module_box.files.write(f"{small}/new", b""),
        lambda: module_box.files.write(f"{small}/kept", b"", write_mode="append"),
        lambda: module_box.files.make_directory(f"{small}/d"),
        lambda: module_box.files.remove(f"{small}/kept"),
        lambda: module_box.files.change(f"{small}/kept", mode=0o600),
    ):
        with pytest.raises(GuestReadOnlyError):
            call()


def test_what_changes_meanwhile(module_box: Sandbox, folder: str, sh: Shell) -> None:
    files = module_box.files
    for number in range(5):
        files.write(f"{folder}/stays{number}", b"")
    sh(
        module_box,
        f"(cd {folder}; while [ -e stays0 ]; do touch a b c; mv a d; rm b c d; done)"
        " >/dev/null 2>&1 &",
    )
    for _ in range(10):
        found = names(module_box, folder)
        assert set(found) >= {b"stays%d" % number for number in range(5)}
        assert set(found) <= {b"stays%d" % n for n in range(5)} | {b"a", b"b", b"c", b"d"}
    files.remove(f"{folder}/stays0")
    # A file that is replaced while it is read is read to its end as it was.
    files.write(f"{folder}/f", NOISE * 20)
    pieces = files.stream(f"{folder}/f")
    content = next(pieces) + next(pieces)
    files.write(f"{folder}/f", b"another")
    assert content + b"".join(pieces) == NOISE * 20
    assert files.read(f"{folder}/f") == b"another"


def _writer(daemon: DaemonProcess, box: Sandbox, path: str) -> subprocess.Popen[bytes]:
    """A client that writes, and has sent some, and no more."""
    process = subprocess.Popen(
        [sys.executable, "-m", "stratabox.client.cli", "sandbox", "cp", "-", f"{box.id}:{path}"],
        env={**os.environ, "STRATABOX_ADDRESS": daemon.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(NOISE)
    process.stdin.flush()
    parent = path.rpartition("/")[0]
    eventually(
        lambda: any(
            one.path.startswith(b".stratabox.") and one.size > 100_000
            for one in box.files.list(parent)
        )
    )
    return process


def test_a_client_that_is_killed_leaves_no_half(
    module_box: Sandbox, shared_daemon: DaemonProcess, folder: str
) -> None:
    module_box.files.write(f"{folder}/old", b"as it was")
    for name in ("new", "old"):
        process = _writer(shared_daemon, module_box, f"{folder}/{name}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        eventually(lambda: names(module_box, folder) == [b"old"])
    assert module_box.files.read(f"{folder}/old") == b"as it was"


def test_a_channel_that_is_lost_leaves_no_half(
    module_box: Sandbox, shared_daemon: DaemonProcess, folder: str, sh: Shell
) -> None:
    module_box.files.write(f"{folder}/old", b"as it was")
    process = _writer(shared_daemon, module_box, f"{folder}/old")
    sh(module_box, "killall -9 sshd; true")
    _, words = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"error: " in words
    eventually(lambda: names(module_box, folder) == [b"old"])
    assert module_box.files.read(f"{folder}/old") == b"as it was"


def test_a_slow_reader_holds_up_the_guest(
    module_box: Sandbox, shared_daemon: DaemonProcess
) -> None:
    """And what nobody reads any more ends there."""
    pieces = module_box.files.stream("/dev/zero")
    assert next(pieces) == b""
    before = _memory(shared_daemon, "VmRSS")
    time.sleep(2)
    assert not any(next(pieces))
    assert _memory(shared_daemon, "VmHWM") - before < 30 * MIB
    pieces.close()  # type: ignore[attr-defined]  # it is a generator
    eventually(lambda: "cat " not in _programs(module_box))


async def test_calls_that_are_given_up_leave_nothing(
    module_box: Sandbox, shared_daemon: DaemonProcess, folder: str
) -> None:
    """At whatever moment: before the guest has begun, in the middle, and near the end."""
    chance = random.Random(8)
    module_box.files.write(f"{folder}/old", b"as it was")

    async with AsyncClient(shared_daemon.address) as client:

        async def endless() -> None:
            async for _ in client.files.stream(module_box.id, "/dev/zero"):
                pass

        async def write() -> None:
            await client.files.write(module_box.id, f"{folder}/old", [NOISE] * 100)

        for _ in range(6):
            tasks = [asyncio.create_task(each()) for each in (endless, write)]
            for task in tasks:
                await asyncio.sleep(chance.random() * 0.3)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    eventually(
        lambda: not any("LC_ALL=C" in each or each == "cat " for each in _programs(module_box))
    )
    eventually(lambda: names(module_box, folder) == [b"old"])
    assert module_box.files.read(f"{folder}/old") in (b"as it was", NOISE * 100)
