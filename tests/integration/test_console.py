"""Serial consoles of real guests: kept, harmless, two-way, and no way to hurt the daemon."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    ConsoleNotReadError,
    ConsoleOutput,
    Image,
    InvalidArgumentError,
    InvalidStateError,
    Sandbox,
    SnapshotLevel,
    UnavailableError,
)
from support.agents import agent_alone
from support.daemon import DaemonProcess
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]

NASTY = "\x1b[2J\x1b[31mred\x07"
STRATABOX = [sys.executable, "-m", "stratabox.client.cli"]


@contextlib.contextmanager
def listening(box: Sandbox) -> Iterator[Iterator[ConsoleOutput]]:
    """A watch of a console that misses nothing from here on."""
    output = box.watch_console()
    assert next(output).data == b""
    try:
        yield output
    finally:
        output.close()  # type: ignore[attr-defined]


def heard_until(output: Iterator[ConsoleOutput], word: bytes) -> bytes:
    heard = b""
    for each in output:
        heard += each.data
        if word in heard:
            return heard
    raise AssertionError(f"the console ended after {heard!r}")


def cli(process: DaemonProcess, *words: str) -> subprocess.CompletedProcess[bytes]:
    command = [*STRATABOX, "--address", process.address, "sandbox", "console", *words]
    return subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)


def test_the_log_is_kept_and_printed_harmlessly(
    shared_daemon: DaemonProcess, module_box: Sandbox, sh: Shell
) -> None:
    with listening(module_box) as output:
        sh(module_box, f"printf '{NASTY} and so on\\n' >/dev/ttyS0")
        heard_until(output, b"and so on\r\n")
    kept = module_box.console_log()
    assert kept.endswith(f"{NASTY} and so on\r\n".encode())
    assert b"SeaBIOS" in kept  # from the first instant on
    printed = cli(shared_daemon, module_box.id, "--log")
    assert (printed.returncode, printed.stderr) == (0, b"")
    assert printed.stdout.decode().endswith("\\x1b[2J\\x1b[31mred\\x07 and so on\n")
    assert b"\x1b" not in printed.stdout
    assert cli(shared_daemon, module_box.id, "--log", "--raw").stdout == kept
    told = json.loads(cli(shared_daemon, module_box.id, "--log", "--json").stdout)
    assert told["log"].encode() == kept
    files = sorted((shared_daemon.state / "sandboxes" / module_box.id).glob("console.log*"))
    assert [(path.name, path.stat().st_mode & 0o777) for path in files] == [("console.log", 0o600)]


def test_attached_by_a_terminal(
    shared_daemon: DaemonProcess, module_box: Sandbox, sh: Shell
) -> None:
    words = ["--address", shared_daemon.address, "sandbox", "console", module_box.id, "--shell"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*STRATABOX, *words])
    shown = b""

    def until(word: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while word not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 4096)

    try:
        until(b"^] detaches")
        until(b"# ")
        with listening(module_box) as other:
            os.write(terminal, b"echo $((6 * 7)); tty\r")
            until(b"42\r\n/dev/ttyS0\r\n")
            # Whoever else is attached sees the same.
            heard_until(other, b"42\r\n/dev/ttyS0\r\n")
        os.write(terminal, b"sleep 4321\r")
        # A ^C that comes before it is the shell's, which does not mind it.
        eventually(lambda: " sleep 4321\n" in sh(module_box, "ps") + "\n", 60)
        os.write(terminal, b"\x03echo inter''rupted\r")
        until(b"interrupted")
        os.write(terminal, b"exit\r\x1d")
        until(b"detached")
        assert os.waitpid(pid, 0)[1] == 0
        pid = 0
    finally:
        os.close(terminal)
        if pid:
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def test_a_flood_hurts_nobody(
    shared_daemon: DaemonProcess, client: Client, module_box: Sandbox, sh: Shell
) -> None:
    folder = shared_daemon.state / "sandboxes" / module_box.id
    with client.sandboxes.clone(module_box.id).sandboxes[0] as other:
        sh(module_box, "cat /dev/urandom >/dev/ttyS0 2>/dev/null &")
        # It goes on until the log has turned over.
        eventually((folder / "console.log.1").exists, 300)
        for number in range(10):
            assert sh(other, f"echo {number}") == str(number)
            assert sh(module_box, f"echo {number}") == str(number)
        assert sum(sizes(folder)) <= 512 << 10
        assert sh(module_box, "pidof cat")  # and it still floods
        # An attached terminal sees the flood as it comes, and what is typed there still arrives.
        with listening(module_box) as output:
            assert sum(len(each.data) for each, _ in zip(output, range(5), strict=False)) > 0
        sh(module_box, "kill $(pidof cat)")
    assert len(module_box.console_log()) <= 512 << 10


def sizes(folder: Path) -> Iterator[int]:
    """Of the files of a log, which may just turn over: the older one's first."""
    for name in ("console.log.1", "console.log"):
        with contextlib.suppress(FileNotFoundError):
            yield (folder / name).stat().st_size


def test_a_copy_has_a_console_of_its_own(client: Client, module_box: Sandbox, sh: Shell) -> None:
    shot = module_box.snapshot(level=SnapshotLevel.MEMORY)
    with client.snapshots.restore(shot.id) as copy:
        with listening(copy) as output:
            sh(copy, "echo only here >/dev/ttyS0")
            heard_until(output, b"only here\r\n")
        assert copy.console_log().endswith(b"only here\r\n")
        assert b"only here" not in module_box.console_log()
        # A guest that runs takes all that is typed; one that stands still takes nothing.
        copy.write_console(b"x" * (64 << 10))
        copy.pause()
        with pytest.raises(ConsoleNotReadError, match="nothing in the guest reads"):
            copy.write_console(b"x" * (64 << 10))
        with pytest.raises(InvalidArgumentError):
            copy.write_console(b"x" * ((64 << 10) + 1))
    client.snapshots.delete(shot.id)


def test_copies_of_a_guest_in_a_flood_go_on(client: Client, module_box: Sandbox, sh: Shell) -> None:
    """Captured while its console waits for QEMU to take a byte, which QEMU must know at a load."""
    sh(module_box, "cat /dev/zero >/dev/ttyS0 2>/dev/null &")
    try:
        for copy in client.sandboxes.clone(module_box.id, count=3).sandboxes:
            with copy, listening(copy) as output:
                heard_until(output, bytes(100))
                sh(copy, "kill $(pidof cat); echo calm >/dev/ttyS0")
                heard_until(output, b"calm\r\n")
    finally:
        sh(module_box, "kill $(pidof cat)")


def test_restarts_of_the_daemon_and_the_end_of_the_guest(
    own_daemon: DaemonProcess, sh: Shell
) -> None:
    client = own_daemon.start()
    client.images.build_tiny()
    box = client.sandboxes.create(image="tiny", memory=128)
    sh(box, "echo one >/dev/ttyS0")
    with listening(box) as output:
        own_daemon.stop()
        with pytest.raises(UnavailableError, match="ending"):
            heard_until(output, b"never")
    client.close()
    # A guest that talks on while there is no daemon: it does not notice.
    with agent_alone(own_daemon.state / "sandboxes" / box.id) as agent:
        agent.run("echo lost >/dev/ttyS0")
    client = own_daemon.start()
    box = client.sandboxes.get(box.id)
    with listening(box) as output:
        sh(box, "echo two >/dev/ttyS0")
        heard_until(output, b"two\r\n")
    assert box.console_log().endswith(b"two\r\n")  # by now it is on the disk, too
    own_daemon.kill()
    client.close()
    client = own_daemon.start()
    box = client.sandboxes.get(box.id)
    with listening(box) as output:
        sh(box, "echo three >/dev/ttyS0")
        heard_until(output, b"three\r\n")
        # The stream ends with the guest, and what it said stays.
        box.stop(force=True)
        assert b"".join(each.data for each in output) == b""
    lines = [line for line in box.console_log().decode().split("\r\n") if line]
    gap = "[stratabox: no daemon was running here; what the guest wrote meanwhile is missing]"
    assert lines[-5].endswith("one")  # where the firmware had ended
    assert lines[-4:] == [gap, "two", gap, "three"]
    with pytest.raises(InvalidStateError):
        next(box.watch_console())
    with pytest.raises(InvalidStateError):
        box.write_console("x")
    box.terminate()
    assert box.console_log() == b""
    client.close()


def test_followed_by_the_command_line(
    shared_daemon: DaemonProcess, module_box: Sandbox, sh: Shell
) -> None:
    words = ["--address", shared_daemon.address, "sandbox", "console", module_box.id]
    following = subprocess.Popen(
        [*STRATABOX, *words, "--log", "--follow"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        assert following.stdout is not None
        sh(module_box, "printf '\\nfollowed \\033[1m\\n' >/dev/ttyS0")
        line = b""
        while not line.startswith(b"followed"):
            line = following.stdout.readline()
            assert line
        assert line == b"followed \\x1b[1m\n"
    finally:
        following.terminate()
        following.communicate()


def test_an_image_that_does_not_come_up_says_why(client: Client, tmp_path: Path) -> None:
    from support.boot_disks import boot_disk, say

    boot_disk(tmp_path / "mute.raw", say("cannot find my root \x1b[2J"))
    image: Image = client.images.import_file(tmp_path / "mute.raw", name="mute")
    try:
        with client.sandboxes.create(image=image.id, memory=128, wait_for_ready=False) as box:
            eventually(lambda: b"cannot find my root \x1b" in box.console_log(), 120)
            box.pause()
            with pytest.raises(UnavailableError, match="cannot find my root") as caught:
                box.resume(identity="renew", ready_timeout=0.1)
            assert "\x1b" not in caught.value.message
    finally:
        client.images.delete(image.id)
