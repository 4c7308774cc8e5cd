"""Commands as streams, in one real guest: bytes, signals, users, limits, terminals, processes."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    Printed,
    ProcessEnd,
    ProcessNotFoundError,
    Sandbox,
    SandboxNotFoundError,
    Terminal,
)
from support.daemon import DaemonProcess
from support.rig import eventually
from support.waiting import killed_at_last

MIB = 1 << 20
STRATABOX = Path(sys.executable).with_name("stratabox")


@pytest.fixture(scope="module")
def box(module_box: Sandbox) -> Iterator[Sandbox]:
    """One guest for all of these; nothing of theirs runs in it at the end."""
    yield module_box
    running = [each.id for each in module_box.processes.list() if each.end is None]
    for process in running:
        module_box.processes.signal(process, "KILL")
        module_box.processes.wait(process)
    assert sleepers(module_box) == 0


def sleepers(box: Sandbox) -> int:
    """How many processes in the guest sleep for one of these tests: 77777 s or more."""
    line = "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; echo; done 2>/dev/null"
    return box.execute(line).stdout_text.splitlines().count("sleep 77777 ")


def run(*arguments: str, at: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [str(STRATABOX), "sandbox", *arguments]
    environment = os.environ | {"STRATABOX_ADDRESS": at}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command, env=environment, capture_output=True, check=False, timeout=120, **options
    )


def test_output_comes_as_it_is_and_apart(box: Sandbox) -> None:
    everything = bytes(range(256))
    with box.spawn(["cat"], stdin=True) as process:
        assert process.communicate(everything * 500) == (everything * 500, b"")
        assert process.end is not None
        assert process.end.ok
    with box.spawn("printf 'a\\0b'; printf '\\377' >&2; exit 3") as process:
        assert process.communicate() == (b"a\0b", b"\xff")
        assert process.end is not None
        assert process.end.exit_code == 3


def test_output_comes_before_the_end_and_input_can_stay_open(box: Sandbox) -> None:
    with box.spawn(
        "echo ready; read line; echo got $line; read more || echo closed", stdin=True
    ) as it:
        pieces = iter(it)
        assert next(pieces).data == b"ready\n"
        it.write(b"one\n")
        assert next(pieces).data == b"got one\n"
        it.close_stdin()
        assert next(pieces) == Printed("stdout", b"closed\n")
        assert list(pieces) == []
        assert it.end is not None
        assert it.end.exit_code == 0


def test_there_is_no_input_unless_asked_for(box: Sandbox) -> None:
    with box.spawn("readlink /proc/self/fd/0; cat") as process:
        assert process.communicate() == (b"/dev/null\n", b"")


def test_who_where_and_with_what(box: Sandbox) -> None:
    line = "id -u; id -g; pwd; echo $ONE $HOME $USER"
    with box.spawn(line, user="nobody", cwd="/tmp", env={"ONE": b"1"}) as process:
        assert process.communicate()[0] == b"65534\n65534\n/tmp\n1 / nobody\n"
    with box.spawn(line, env={"HOME": "/x"}) as process:
        assert process.communicate()[0] == b"0\n0\n/root\n/x root\n"
    with box.spawn("id -u; id -g", user="4711") as process:
        assert process.communicate()[0] == b"4711\n4711\n"
    with pytest.raises(NotFoundError, match="nobody-at-all"):
        box.spawn(["true"], user="nobody-at-all")


@pytest.mark.parametrize(
    ("argv", "cwd", "code", "words"),
    [
        (["no-such-program"], None, 127, b"no-such-program: not found"),
        (["/etc/passwd"], None, 126, b"Permission denied"),
        (["true"], "/no/such", 126, b"/no/such: No such file"),
    ],
)
def test_what_cannot_be_run_ends_as_by_a_shell(
    box: Sandbox, argv: list[str], cwd: str | None, code: int, words: bytes
) -> None:
    with box.spawn(argv, cwd=cwd) as process:
        out, err = process.communicate()
    assert (out, process.end and process.end.exit_code, process.pid) == (b"", code, 0)
    assert words in err


def test_as_many_arguments_as_linux_takes(box: Sandbox) -> None:
    words = [f"{number:07d}" for number in range(100_000)]
    with box.spawn(["printf", "%s\n", *words]) as process:
        out, _ = process.communicate()
    assert out == "".join(f"{word}\n" for word in words).encode()
    with pytest.raises(InvalidArgumentError, match="longer than"):
        box.spawn(["true", "x" * (128 << 10)])
    with pytest.raises(InvalidArgumentError, match="NUL"):
        box.spawn(["true", "a\0b"])


@pytest.mark.parametrize(("name", "number"), [("USR1", 10), ("USR2", 12), ("INT", 2), ("HUP", 1)])
def test_signals_arrive(box: Sandbox, name: str, number: int) -> None:
    line = f"trap 'echo got {name}; exit 9' {name}; echo up; while :; do sleep 0.05; done"
    with box.spawn(line) as process:
        pieces = iter(process)
        assert next(pieces).data == b"up\n"
        process.send_signal(name)
        assert b"".join(p.data for p in pieces if p.stream == "stdout") == f"got {name}\n".encode()
        assert process.end is not None
        assert process.end.exit_code == 9
    with box.spawn(["sleep", "77777"]) as process:
        process.send_signal(name)
        assert process.wait().signal == number


def test_a_command_that_ignores_everything_is_killed_with_all_that_it_started(
    box: Sandbox,
) -> None:
    deaf = "trap '' TERM INT HUP; (setsid sleep 77777 &); sleep 77777 & echo x; sleep 77777"
    with box.spawn(deaf, timeout=3) as process:
        assert process.communicate() == (b"x\n", b"")
        assert process.end is not None
        assert process.end.timed_out
        assert process.end.exit_code is None
    assert sleepers(box) == 0
    with box.spawn(deaf) as process:
        assert next(iter(process)).data == b"x\n"
        process.send_signal("TERM")
        process.kill()
        assert process.wait().signal == 9
    assert sleepers(box) == 0


def test_the_time_limit_is_the_guests_own(client: Client, box: Sandbox) -> None:
    """A guest that stands still for longer than the limit loses nothing of it."""
    with box.spawn("echo up; sleep 1; echo done", timeout=20) as process:
        pieces = iter(process)
        assert next(pieces).data == b"up\n"
        box.pause()
        with pytest.raises(InvalidStateError):
            box.spawn(["true"])
        box.resume()
        assert b"".join(piece.data for piece in pieces) == b"done\n"
        assert process.end is not None
        assert process.end.ok
        assert process.end.duration.seconds < 20


def test_a_client_that_goes_away_ends_its_command(
    box: Sandbox, shared_daemon: DaemonProcess
) -> None:
    with box.spawn("echo up; sleep 77777 & sleep 77777") as process:
        assert next(iter(process)).data == b"up\n"
        eventually(lambda: sleepers(box) == 2)
    eventually(lambda: sleepers(box) == 0)
    # Killed, in the middle of a stream that it no longer reads.
    command = [str(STRATABOX), "sandbox", "exec", box.id, "sh", "-c", "yes; sleep 77777"]
    environment = os.environ | {"STRATABOX_ADDRESS": shared_daemon.address}
    cli = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    with killed_at_last(cli):
        assert cli.stdout is not None
        assert cli.stdout.read(10) == b"y\n" * 5
    eventually(lambda: b" yes" not in box.execute("ps").stdout and sleepers(box) == 0)


def test_a_slow_reader_costs_the_daemon_little(box: Sandbox, shared_daemon: DaemonProcess) -> None:
    """The guest would print a GB; only what is on the way is ever held."""
    before = resident(shared_daemon.pid)
    with box.spawn("dd if=/dev/zero bs=1M count=1024 2>/dev/null") as process:
        pieces = iter(process)
        read = 0
        while read < 4 * MIB:
            read += len(next(pieces).data)
        progress = [written(box), 0]
        while progress[0] != progress[1]:
            progress = [written(box), progress[0]]
        assert progress[0] < 16 * MIB
        assert resident(shared_daemon.pid) - before < 32 * MIB


def written(box: Sandbox) -> int:
    """How much dd has written."""
    line = "cat /proc/$(pidof dd)/io"
    (count,) = (
        int(each.split()[1])
        for each in box.execute(line).stdout_text.splitlines()
        if each.startswith("wchar")
    )
    return count


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_large_stream_is_whole(box: Sandbox) -> None:
    line = "i=0; while [ $i -lt 8 ]; do cat; i=$((i+1)); done"
    data = os.urandom(4 * MIB)
    with box.spawn(line, stdin=True) as process:
        out, _ = process.communicate(data)
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_a_terminal(box: Sandbox) -> None:
    with box.spawn(["sh"], terminal=Terminal(term="vt100", columns=97, rows=31)) as process:
        said = b""
        pieces = iter(process)

        def until(words: bytes) -> None:
            nonlocal said
            while words not in said:
                said += next(pieces).data
            said = said.partition(words)[2]

        process.write(b"stty size; echo $TERM; tty\n")
        until(b"31 97\r\nvt100\r\n/dev/pts/")
        process.resize(80, 24)
        process.write(b"stty size; sleep 77777\n")
        until(b"24 80\r\n")
        eventually(lambda: sleepers(box) == 1)
        process.write(b"\x03")
        until(b"^C")
        process.write(b"exit 5\n")
        assert process.wait().exit_code == 5
    with box.spawn(["sleep", "77777"], terminal=True) as process:
        assert process.pid > 0
    eventually(lambda: sleepers(box) == 0)


def test_what_the_guests_kernel_kills_for_memory_says_so(box: Sandbox) -> None:
    # Most of what there is: the kernel grants it, and cannot keep to that.
    total = "sed -n 's/MemTotal: *\\([0-9]*\\) .*/\\1/p' /proc/meminfo"
    line = f"dd if=/dev/zero of=/dev/null bs=$(($({total}) * 9 / 10))k count=1"
    for shell, code, signal in ((f"exec {line}", None, 9), (f"{line}; exit $?", 137, None)):
        with box.spawn(shell) as process:
            process.communicate()
        assert process.end is not None
        assert process.end.out_of_memory, process.end
        assert (process.end.exit_code, process.end.signal) == (code, signal)
    with box.spawn("kill -9 $$") as process:
        assert not process.wait().out_of_memory


def test_what_fails_on_a_full_disk_says_so(box: Sandbox) -> None:
    box.execute("mkdir /small; mount -t tmpfs -o size=64k none /small").check()
    try:
        with box.spawn("cat >much", cwd="/small", stdin=True) as process:
            _, words = process.communicate(b"x" * MIB)
        assert process.end is not None
        assert process.end.exit_code == 1, words
        assert process.end.disk_full
        for line, code in (("true", 0), ("rm much; false", 1)):  # fine; and there is room again
            with box.spawn(line, cwd="/small") as process:
                end = process.wait()
            assert (end.exit_code, end.disk_full) == (code, False)
    finally:
        box.execute("umount /small; rmdir /small").check()


def test_many_at_once_lose_nothing(box: Sandbox) -> None:
    results: dict[int, tuple[bytes, bytes]] = {}

    def one(number: int) -> None:
        line = f"echo {number}; i=0; while [ $i -lt 50 ]; do echo $i; i=$((i+1)); done >&2"
        with box.spawn(line) as process:
            results[number] = process.communicate()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = "".join(f"{number}\n" for number in range(50)).encode()
    assert results == {number: (f"{number}\n".encode(), counted) for number in range(20)}


async def test_the_same_with_await(box: Sandbox, shared_daemon: DaemonProcess) -> None:
    async with AsyncClient(shared_daemon.address) as client:
        same = await client.sandboxes.get(box.id)
        async with await same.spawn(["cat"], stdin=True) as process:
            assert await process.communicate(b"x" * MIB) == (b"x" * MIB, b"")
        async with await same.spawn("echo up; sleep 77777") as process:
            async for piece in process:
                assert piece.data == b"up\n"
                await process.kill()
            assert process.end is not None
            assert process.end.signal == 9
        several = await asyncio.gather(*(same.spawn(f"echo {n}") for n in range(8)))
        outputs = [(await each.communicate())[0] for each in several]
        assert outputs == [f"{n}\n".encode() for n in range(8)]
        name = await same.processes.start("echo async; exit 4")
        followed = [heard async for heard in same.processes.attach(name)]
        assert followed[0] == Printed("stdout", b"async\n", 6)
        assert (await same.processes.wait(name)).exit_code == 4
        with pytest.raises(SandboxNotFoundError):
            await client.processes.spawn("no-such-sandbox", ["true"])


def test_a_detached_process_is_found_and_followed(box: Sandbox) -> None:
    processes = box.processes
    name = processes.start("echo one; echo two >&2; sleep 0.3; echo three; exit 6")
    heard = list(processes.attach(name))
    assert b"".join(h.data for h in heard if isinstance(h, Printed) and h.stream == "stdout") == (
        b"one\nthree\n"
    )
    end = heard[-1]
    assert isinstance(end, ProcessEnd)
    assert end.exit_code == 6
    assert processes.wait(name[:10]).exit_code == 6
    (found,) = [each for each in processes.list() if each.id == name]
    assert found.end == end
    assert not found.inherited
    assert found.started_in == box.id
    assert found.argv[:2] == (b"/bin/sh", b"-c")
    tail = next(iter(processes.attach(name, offset=-4, follow=False)))
    assert tail == Printed("stdout", b"ree\n", found.printed_bytes)
    with pytest.raises(ProcessNotFoundError):
        processes.wait("0" * 16)


def test_of_a_lot_of_output_the_last_is_kept(box: Sandbox) -> None:
    many = "i=0; while [ $i -lt 6000 ]; do echo $i; i=$((i+1)); done"
    name = box.processes.start(f"{many}; dd if=/dev/zero bs=64k count=20 2>/dev/null; echo end")
    box.processes.wait(name)
    first, *rest = box.processes.attach(name)
    assert isinstance(first, Printed)
    assert first.stream == "gap"
    assert first.lost > 0
    kept = b"".join(each.data for each in rest if isinstance(each, Printed))
    (found,) = [each for each in box.processes.list() if each.id == name]
    assert first.lost == found.kept_from
    assert first.lost + len(kept) == found.printed_bytes
    assert kept.endswith(b"\0end\n")
    assert MIB // 2 < len(kept) <= MIB


def test_a_detached_process_is_ended(box: Sandbox) -> None:
    name = box.processes.start("trap '' TERM; sleep 77777 & sleep 77777")
    eventually(lambda: sleepers(box) == 2)
    box.processes.signal(name, "TERM")
    box.processes.signal(name, "KILL")
    assert box.processes.wait(name).signal == 9
    assert sleepers(box) == 0
    limited = box.processes.start("sleep 77777", timeout=0.3)
    assert box.processes.wait(limited).timed_out
    with pytest.raises(InvalidArgumentError, match="not found"):
        box.processes.start(["no-such-program"])


def test_the_command_line(box: Sandbox, shared_daemon: DaemonProcess) -> None:
    at = shared_daemon.address
    data = bytes(range(256)) * 100
    assert run("exec", "-i", box.id, "cat", at=at, input=data).stdout == data
    assert run("exec", box.id, "cat", at=at, input=data).stdout == b""
    user = run("exec", "-u", "nobody", "-w", "/tmp", "-e", "A=b", box.id, "sh", "-c",
               "id -u; pwd; echo $A; exit 4", at=at)  # fmt: skip
    assert (user.stdout, user.returncode) == (b"65534\n/tmp\nb\n", 4)
    timed = run("exec", "--timeout", "300ms", box.id, "sleep", "77777", at=at)
    assert timed.returncode == 124
    name = run("exec", "-d", box.id, "sh", "-c", "echo x; exit 7", at=at).stdout.decode().strip()
    attached = run("process", "attach", box.id, name, at=at)
    assert (attached.stdout, attached.returncode) == (b"x\n", 7)
    assert name in run("process", "list", box.id, at=at).stdout.decode()
    assert run("process", "wait", box.id, "f" * 16, at=at).returncode == 3
    assert run("exec", "-di", box.id, "true", at=at).returncode == 2


def test_the_command_line_on_a_terminal(box: Sandbox, shared_daemon: DaemonProcess) -> None:
    """Keys go through, also ^C; the size follows; the terminal is as it was, whatever ends it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))
    before = termios.tcgetattr(theirs)
    # These two are of some other moment, always.
    stale = {"COLUMNS": "80", "LINES": "24"}
    environment = os.environ | stale | {"STRATABOX_ADDRESS": shared_daemon.address}
    command = [str(STRATABOX), "sandbox", "exec", "-it", box.id, "sh"]
    said = b""

    def until(words: bytes) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while words not in said:
            assert time.monotonic() < deadline, said
            if select.select([ours], [], [], 1)[0]:
                said += os.read(ours, 1024)
        said = said.partition(words)[2]

    def begin() -> AbstractContextManager[subprocess.Popen[bytes]]:
        return killed_at_last(
            subprocess.Popen(
                command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
                start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        )  # fmt: skip

    try:
        with begin() as cli:
            until(b"# ")
            os.write(ours, b"stty size; sleep 77777\n")
            until(b"20 70\r\n")
            eventually(lambda: sleepers(box) == 1)
            os.write(ours, b"\x03")
            until(b"^C")
            until(b"# ")
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 22, 77, 0, 0))
            os.write(ours, b"until [ \"$(stty size)\" = '22 77' ]; do sleep 0.05; done; exit 6\n")
            assert cli.wait(60) == 6
        assert termios.tcgetattr(theirs) == before
        with begin() as cli:
            eventually(lambda: termios.tcgetattr(theirs) != before)
            until(b"# ")
            cli.terminate()
            assert cli.wait(60) == 128 + 15
        assert termios.tcgetattr(theirs) == before
    finally:
        os.close(ours)
        os.close(theirs)
