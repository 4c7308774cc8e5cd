"""The first command in a guest that goes on from saved memory: it goes by a port of its own.

What a command is over the channel it is over the port, so these are the promises of
`test_exec_streams` again, each in a guest that was just restored.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    ConnectionLostError,
    Image,
    NotFoundError,
    Sandbox,
    Snapshot,
    StrataboxError,
)
from support.daemon import DaemonProcess, daemon
from support.rig import eventually

MIB = 1 << 20
STRATABOX = Path(sys.executable).with_name("stratabox")
WAY = "tr '\\0' ' ' </proc/$PPID/cmdline; "
"""Prints by whom a command was started: a keeper that serves a port, or one that sshd has run."""
PORT, CHANNEL = b" channel ", b" run "
VACATE = """\
port=$(grep -l org.stratabox.exec.0 /sys/class/virtio-ports/*/name)
port=/dev/$(basename "${port%/name}")
for each in /proc/[0-9]*; do
    for file in $each/fd/*; do
        [ "$(readlink $file)" = $port ] || continue
        while read -r name value; do
            [ "$name" != PPid: ] || kill -STOP "$value"
        done <$each/status
        kill -9 "${each#/proc/}"
    done
done 2>/dev/null
echo $port
"""
"""Has nobody serve the port in a guest any more, and prints which file it is."""


def altered(folder: Path, lines: str) -> dict[str, str]:
    """The environment of a daemon that runs these lines of Python first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(lines)
    return {"PYTHONPATH": str(folder)}


def patient(folder: Path) -> dict[str, str]:
    """Of one that hears a guest on the port also on a host that is busy."""
    lines = "from stratabox.daemon.hypervisor.guest import exec_port\nexec_port._PATIENCE = 5\n"
    return altered(folder, lines)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon for these tests: it is to wait for the port, how long is no part of this."""
    folder = tmp_path_factory.mktemp("port")
    with daemon(folder, patient(folder / "patient")) as process:
        yield process


@pytest.fixture(scope="module")
def client(own: DaemonProcess) -> Iterator[Client]:
    with own.start() as client:
        yield client


@pytest.fixture(scope="module")
def tiny(client: Client) -> Image:
    return client.images.build_tiny()


@pytest.fixture(scope="module")
def source(client: Client, tiny: Image) -> Iterator[Sandbox]:
    with client.sandboxes.create(image=tiny.id, memory=128) as box:
        with box.spawn(["true"]) as process:
            assert process.wait().ok
        yield box


@pytest.fixture(scope="module")
def saved(client: Client, source: Sandbox) -> Iterator[Snapshot]:
    snapshot = source.snapshot(level="memory")
    yield snapshot
    client.snapshots.delete(snapshot.id)


@pytest.fixture
def copy(client: Client, saved: Snapshot) -> Iterator[Sandbox]:
    """A guest that goes on from saved memory just now; no command has run in it."""
    with client.snapshots.restore(saved.id, identity="keep") as copy:
        yield copy


def sleepers(box: Sandbox) -> int:
    """How many processes in the guest sleep for one of these tests. Asked by the agent."""
    line = "for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; echo; done 2>/dev/null"
    return box.execute(line).stdout_text.splitlines().count("sleep 77777 ")


def way(box: Sandbox) -> bytes:
    """By which way a command goes now."""
    with box.spawn(WAY) as process:
        said, _ = process.communicate()
    found = [each for each in (PORT, CHANNEL) if each in said]
    assert len(found) == 1, said
    return found[0]


def test_the_first_command_goes_by_it_and_the_channel_is_made_behind_it(copy: Sandbox) -> None:
    with copy.spawn(WAY + "printf 'a\\0b'; printf '\\377' >&2; exit 3") as process:
        out, err = process.communicate()
    assert PORT in out
    assert (out[-3:], err) == (b"a\0b", b"\xff")
    assert process.end is not None
    assert (process.end.exit_code, process.end.timed_out) == (3, False)
    eventually(lambda: way(copy) == CHANNEL)


def test_the_guest_knows_the_time_and_has_its_own_random_numbers(
    client: Client, saved: Snapshot
) -> None:
    random = []
    for _ in range(2):
        with client.snapshots.restore(saved.id, identity="keep") as copy:
            begun = time.time()
            with copy.spawn(f"date +%s; head -c 16 /dev/urandom; {WAY}") as process:
                out, _ = process.communicate()
            now, _, rest = out.partition(b"\n")
            assert PORT in rest
            # The snapshot is older, or gets so.
            assert begun - 3 < int(now) < time.time() + 1
            random.append(rest[:16])
            eventually(lambda copy=copy: not copy.refresh().state_reason)  # type: ignore[misc]
    assert random[0] != random[1]


def test_bytes_both_ways(copy: Sandbox) -> None:
    """More than all queues hold; the input ends before the command does."""
    data = os.urandom(4 * MIB)
    with copy.spawn(WAY + "cat; echo end >&2", stdin=True) as process:
        out, err = process.communicate(data)
    head, _, rest = out.partition(b"/stratabox/")
    assert PORT in out[:200], head
    assert hashlib.sha256(rest[-len(data) :]).digest() == hashlib.sha256(data).digest()
    assert err == b"end\n"


def test_who_where_and_what_cannot_be_run(client: Client, saved: Snapshot, copy: Sandbox) -> None:
    line = f"{WAY} id -u; pwd; echo $ONE; readlink /proc/self/fd/0; umask"
    with copy.spawn(line, user="nobody", cwd="/tmp", env={"ONE": b"1"}) as process:
        out, _ = process.communicate()
    assert PORT in out
    assert out.endswith(b"65534\n/tmp\n1\n/dev/null\n0022\n")
    with client.snapshots.restore(saved.id, identity="keep") as other:
        with other.spawn(["no-such-program"]) as process:
            assert b"not found" in process.communicate()[1]
        assert process.end is not None
        assert process.end.exit_code == 127
    with (
        client.snapshots.restore(saved.id, identity="keep") as third,
        pytest.raises(NotFoundError, match="nobody-at-all"),
    ):
        third.spawn(["true"], user="nobody-at-all")


def test_signals_reach_a_command_that_reads_none_of_its_input(copy: Sandbox) -> None:
    deaf = f"{WAY} trap 'echo got' USR1; echo up; sleep 77777 & while :; do wait; done"
    with copy.spawn(deaf, stdin=True) as process:
        pieces = iter(process)
        said = b""
        while not said.endswith(b"up\n"):
            said += next(pieces).data
        assert PORT in said
        process.write(b"x" * (32 << 10))
        process.send_signal("USR1")
        assert next(pieces).data == b"got\n"
        process.kill()
        assert process.wait().signal == 9
    assert sleepers(copy) == 0


def test_the_time_limit_kills_all_that_it_started(copy: Sandbox) -> None:
    deaf = f"{WAY} trap '' TERM; (setsid sleep 77777 &); sleep 77777 & echo x; sleep 77777"
    with copy.spawn(deaf, timeout=3) as process:
        out, _ = process.communicate()
    assert PORT in out
    assert out.endswith(b"x\n")
    assert process.end is not None
    assert process.end.timed_out
    assert sleepers(copy) == 0


def test_what_is_left_behind_runs_on_and_its_output_is_waited_for(copy: Sandbox) -> None:
    with copy.spawn(f"{WAY} (sleep 1; echo later) & setsid sleep 77777 >/dev/null 2>&1 &") as it:
        out, _ = it.communicate()
    assert PORT in out
    assert out.endswith(b"later\n")
    assert sleepers(copy) == 1


def test_a_client_that_goes_away_ends_its_command(copy: Sandbox, own: DaemonProcess) -> None:
    """Killed, in the middle of a stream that it no longer reads."""
    command = [str(STRATABOX), "sandbox", "exec", copy.id, "sh", "-c",
               f"{WAY} sleep 77777 & yes; sleep 77777"]  # fmt: skip
    environment = os.environ | {"STRATABOX_ADDRESS": own.address}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as cli:
        assert cli.stdout is not None
        assert PORT in cli.stdout.read(500)
        cli.kill()
    eventually(lambda: b" yes" not in copy.execute("ps").stdout and sleepers(copy) == 0)


def test_a_slow_reader_costs_the_guest_and_the_daemon_little(copy: Sandbox) -> None:
    with copy.spawn(f"{WAY} dd if=/dev/zero bs=1M count=1024 2>/dev/null") as process:
        pieces = iter(process)
        first, read = next(pieces).data, 0
        assert PORT in first
        while read < 2 * MIB:
            read += len(next(pieces).data)
        progress = [written(copy), 0]
        while progress[0] != progress[1]:
            progress = [written(copy), progress[0]]
        assert progress[0] < 16 * MIB


def written(box: Sandbox) -> int:
    """How much dd has written."""
    lines = box.execute("cat /proc/$(pidof dd)/io").stdout_text.splitlines()
    (count,) = (int(each.split()[1]) for each in lines if each.startswith("wchar"))
    return count


def test_a_copy_of_a_guest_whose_port_is_in_use_has_its_own(client: Client, copy: Sandbox) -> None:
    """The source's command goes on; in the copy it has nobody any more, and is killed."""
    with copy.spawn(f"{WAY} sleep 77777 & echo up; read line; echo got $line", stdin=True) as it:
        pieces = iter(it)
        said = b""
        while not said.endswith(b"up\n"):
            said += next(pieces).data
        assert PORT in said
        again = copy.snapshot(level="memory")
        with client.snapshots.restore(again.id, identity="keep") as other:
            with other.spawn("echo mine") as mine:
                assert mine.communicate() == (b"mine\n", b"")
            eventually(lambda: sleepers(other) == 0)
        it.write(b"the source's\n")
        assert next(pieces).data == b"got the source's\n"
    client.snapshots.delete(again.id)


def test_who_lies_on_the_port_harms_only_itself(
    client: Client, saved: Snapshot, source: Sandbox
) -> None:
    """It greets, and then makes noise; or there is nobody: then the channel is there."""
    with client.snapshots.restore(saved.id, identity="keep") as liar:
        assert way(liar) == PORT
        eventually(lambda: way(liar) == CHANNEL)
        port = liar.execute(VACATE).stdout_text.strip()
        silent = liar.snapshot(level="memory")
        with client.snapshots.restore(silent.id, identity="keep") as quiet:
            assert way(quiet) == CHANNEL
        liar.execute(
            f"setsid sh -c 'exec 3<>{port}; echo stratabox-exec 1 >&3;"
            " cat /dev/urandom >&3' </dev/null >/dev/null 2>&1 &"
        ).check()
        noisy = liar.snapshot(level="memory")
        with client.snapshots.restore(noisy.id, identity="keep") as loud:
            with pytest.raises(ConnectionLostError), loud.spawn(["true"]) as process:
                process.wait()
            assert way(loud) == CHANNEL
            assert way(source) == CHANNEL
    for snapshot in (silent, noisy):
        client.snapshots.delete(snapshot.id)


def test_older_hardware_and_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """Memory of before there was the port does without; what boots has it from then on."""
    older = altered(
        tmp_path / "older",
        "from dataclasses import replace\n"
        "from stratabox.storage.model.records import Machine\n"
        "now = Machine.up_to_date\n"
        "Machine.up_to_date = lambda self: replace(now(self), exec_port=False)\n",
    )
    with daemon(tmp_path) as process:
        before = process.start(environment=older)
        before.images.build_tiny()
        box = before.sandboxes.create(image="tiny", memory=128)
        old = box.snapshot(level="memory")
        before.close()
        process.stop()
        client = process.start(environment=patient(tmp_path / "patient"))
        box = client.sandboxes.get(box.id)
        assert way(box) == CHANNEL
        with client.snapshots.restore(old.id, identity="keep") as copy:
            assert way(copy) == CHANNEL
        box.stop(force=True)
        box.start()
        assert way(box) == CHANNEL
        new = box.snapshot(level="memory")
        copy = client.snapshots.restore(new.id, identity="keep")
        with copy.spawn(f"{WAY} sleep 77777") as running:
            assert PORT in next(iter(running)).data
            process.kill()
            with pytest.raises(StrataboxError):
                running.wait()
        client.close()
        client = process.start()
        copy = client.sandboxes.get(copy.id)
        eventually(lambda: sleepers(copy) == 0)
        assert way(copy) == CHANNEL
        for each in client.sandboxes.list():
            each.delete()
        client.close()
        process.stop()
