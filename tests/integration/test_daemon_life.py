"""The daemon comes and goes; guests, records and files are what they were, or it says why not."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    CorruptError,
    DaemonEndingError,
    DaemonUnavailableError,
    Sandbox,
    SandboxState,
    SnapshotNotReadyError,
    SnapshotState,
)
from stratabox.daemon.app import GRACE
from support import disks
from support.agents import agent_alone
from support.daemon import DaemonProcess, daemon
from support.rig import Rig, eventually, rig

RUNNING, STOPPED, PAUSED = SandboxState.RUNNING, SandboxState.STOPPED, SandboxState.PAUSED


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("life")) as made:
        yield made


@pytest.fixture(autouse=True)
def _runs_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test that shares the daemon leaves one that runs, with the witness alone."""
    yield
    if "living" in request.fixturenames:
        living: Rig = request.getfixturevalue("living")
        living.calm()
        living.clear()


def create_quickly(client: Client) -> Sandbox:
    return client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)


def refusal(process: DaemonProcess) -> str:
    """Start a daemon that must refuse to run; what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "stratabox.daemon"],
        env=process.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


@contextlib.contextmanager
def catalog_of(process: DaemonProcess) -> Iterator[sqlite3.Connection]:
    """Somebody else's hand in the catalog, while no daemon runs."""
    with contextlib.closing(sqlite3.connect(process.state / "catalog.db")) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        with connection:
            yield connection


def test_a_second_daemon_refuses(living: Rig) -> None:
    process = living.process
    said = refusal(process)
    assert f"another daemon (pid {process.pid})" in said
    assert str(process.state) in said
    assert living.client.host().pid == process.pid


def test_the_socket_of_a_killed_daemon_is_taken_over(living: Rig) -> None:
    process = living.process
    process.kill()
    socket = process.folder / "api.sock"
    assert socket.is_socket()
    with Client(process.address) as late, pytest.raises(DaemonUnavailableError):
        late.host()
    living.restart()
    living.check()
    assert socket.stat().st_mode & 0o777 == 0o660


def test_guests_outlive_the_daemon(living: Rig) -> None:
    process, witness = living.process, living.client.sandboxes.get(living.witness.id)
    before = process.guests()
    mark = living.mark()
    begun = time.monotonic()
    process.stop()
    assert time.monotonic() - begun < GRACE, "there was nobody to wait for"
    assert not (process.folder / "api.sock").exists()
    assert process.guests() == before
    living.restart()
    assert process.guests() == before
    now = living.client.sandboxes.get(witness.id)
    assert (now.state, now.ready, now.started_at) == (RUNNING, True, witness.started_at)
    assert now.execute("cat /marker").stdout.decode().strip() == mark
    living.check()


def test_what_is_under_way_at_the_end_is_finished(living: Rig) -> None:
    """A command and a snapshot get their answers, a watch its end at once."""
    living.restart("snapshot.overlays-made=sleep:1")
    events = living.client.sandboxes.watch()
    assert next(events).sandbox.id == living.witness.id
    with ThreadPoolExecutor() as threads:
        watching = threads.submit(list, events)
        command = threads.submit(
            living.client.sandboxes.execute,
            living.witness.id,
            "touch /begun; sleep 2; echo done",
        )
        eventually(lambda: living.execute("test -e /begun").exit_code == 0)
        snapshot = threads.submit(
            living.client.snapshots.create, living.witness.id, name="late", quick=True
        )
        eventually(
            lambda: bool(living.process.rows("SELECT id FROM snapshots WHERE name = 'late'"))
        )
        living.process.stop()
        assert command.result().stdout == b"done\n"
        assert snapshot.result().state is SnapshotState.READY
        with pytest.raises(DaemonEndingError, match="watch again"):  # not what is late is told
            watching.result()
    living.restart()
    living.check()
    assert living.snapshot_named("late").state is SnapshotState.READY


def test_whoever_does_not_run_stays_as_it_was(living: Rig) -> None:
    paused, stopped, failed, terminated = victims = [living.create() for _ in range(4)]
    paused.pause()
    stopped.stop(force=True)
    living.process.kill_guest(failed.id)
    eventually(lambda: living.client.sandboxes.get(failed.id).state is SandboxState.FAILED)
    terminated.terminate()

    def look() -> list[tuple[SandboxState, str | None]]:
        records = [living.client.sandboxes.get(victim.id) for victim in victims]
        return [(record.state, record.state_reason) for record in records]

    before = look()
    assert [state for state, _ in before] == [
        PAUSED, STOPPED, SandboxState.FAILED, SandboxState.TERMINATED,
    ]  # fmt: skip
    if living.client.host().launcher == "qemu":  # only its parent is told how a process ended
        assert "killed by signal 9" in str(before[2][1])
    living.restart()
    assert look() == before
    living.check()
    assert living.client.sandboxes.resume(paused.id).state is RUNNING
    for victim in (stopped, failed):
        again = living.client.sandboxes.start(victim.id, wait_for_ready=False)
        assert (again.state, again.state_reason) == (RUNNING, None)
    living.check()


def test_a_guest_that_ended_while_nobody_looked(living: Rig) -> None:
    victim = living.create()
    living.process.kill()
    living.process.kill_guest(victim.id)
    living.restart()
    now = living.client.sandboxes.get(victim.id)
    assert now.state is STOPPED
    assert "ended while the daemon was away" in str(now.state_reason)
    living.check()
    assert living.client.sandboxes.start(victim.id, wait_for_ready=False).state is RUNNING


def test_after_a_reboot_of_the_host(tmp_path: Path) -> None:
    with daemon(tmp_path) as process:
        client = process.start()
        client.images.build_tiny()
        running, paused, stopped = (create_quickly(client) for _ in range(3))
        paused.pause()
        stopped.stop(force=True)
        process.kill()
        for sandbox in (running, paused):
            process.kill_guest(sandbox.id)
        with catalog_of(process) as catalog:
            catalog.execute("UPDATE store SET boot_id = 'the one before'")
        client = process.start()
        process.check_consistent()
        for sandbox in (running, paused):
            now = client.sandboxes.get(sandbox.id)
            assert (now.state, now.state_reason) == (STOPPED, "the host was restarted")
        assert "power cut" in str(client.sandboxes.get(stopped.id).state_reason)
        again = client.sandboxes.start(running.id, wait_for_ready=False)
        assert again.state is RUNNING
        process.kill()
        # It was noted: the same start is no reboot any more.
        assert process.start().sandboxes.get(running.id).state is RUNNING


def test_what_no_record_knows_goes(living: Rig) -> None:
    """An orphaned QEMU is ended, stray files are removed; nothing else is touched."""
    living.idle()
    orphan, layers = living.create(), living.process.layers()
    layer = living.layer_of(orphan.id)
    living.process.kill()
    with catalog_of(living.process) as catalog:
        catalog.execute("DELETE FROM sandboxes WHERE id = ?", (orphan.id,))
        catalog.execute("DELETE FROM layers WHERE id = ?", (layer,))
    stray = living.path("00000000-0000-4000-8000-000000000000")
    shutil.copy(living.path(layer), stray)
    (living.process.state / "work" / "unfinished").mkdir()
    (living.process.state / "work" / "unfinished" / "disk.raw").write_bytes(b"half")
    blob = living.process.state / "blobs" / ("0" * 64)
    blob.write_bytes(b"nobody needs this")
    living.restart()
    assert orphan.id not in living.process.guests()
    assert living.process.layers() == layers - {f"{layer}.qcow2"}
    assert not blob.exists()
    living.check()


def test_a_layer_that_is_gone_is_said_so(living: Rig) -> None:
    stopped, base = living.create(), living.create()
    stopped.stop(force=True)
    snapshot = base.snapshot(quick=True)
    (lost,) = living.disks_of(snapshot.id)
    living.process.kill()
    living.path(living.layer_of(stopped.id)).unlink()
    lost.rename(living.process.folder / "lost")
    living.restart()
    with pytest.raises(CorruptError, match="gone") as told:
        living.client.sandboxes.start(stopped.id)
    assert told.value.reason == "LAYER_MISSING"
    with pytest.raises(SnapshotNotReadyError, match=r"lost: .* gone"):
        living.client.snapshots.restore(snapshot.id)
    assert living.client.sandboxes.get(stopped.id).state is SandboxState.FAILED
    # The other guest has its files open and does not mind; with the file back all is well.
    assert living.client.sandboxes.get(base.id).state is RUNNING
    (living.process.folder / "lost").rename(lost)
    living.restart()
    assert living.client.snapshots.restore(snapshot.id, wait_for_ready=False).state is RUNNING
    living.client.sandboxes.delete(stopped.id)
    living.check()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("newer", "written by a newer Stratabox"),
        ("damaged", "is damaged"),
        ("emptied", "is gone or empty"),
        ("no database", "is damaged"),
    ],
)
def test_a_wrong_catalog_is_refused(own_daemon: DaemonProcess, harm: str, says: str) -> None:
    own_daemon.start().images.build_tiny()
    own_daemon.stop()
    layers, path = own_daemon.layers(), own_daemon.state / "catalog.db"
    match harm:
        case "newer":
            with catalog_of(own_daemon) as catalog:
                catalog.execute("PRAGMA user_version = 9999")
        case "damaged":
            with path.open("r+b") as file:
                file.seek(4096)
                file.write(os.urandom(path.stat().st_size - 4096))
        case "emptied":
            path.unlink()
        case "no database":
            path.write_bytes(b"never a database" * 512)
    said = refusal(own_daemon)
    assert says in said
    assert str(path) in said
    assert own_daemon.layers() == layers
    path.unlink(missing_ok=True)  # there are no guests to be found by it


# What a QEMU can do


def test_qemu_can_write_its_overlay_and_nothing_else(living: Rig) -> None:
    snapshot = living.client.snapshots.create(living.witness.id)
    living.idle()  # what earlier ones have left is merged into its layers
    pid = living.process.guests()[living.witness.id]
    writable, known = set(), set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = entry.readlink()
            flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1]
        except FileNotFoundError:  # open for a moment only
            continue
        if target.is_relative_to(living.process.state):
            known.add(target)
            if int(flags.split()[0], 8) & os.O_ACCMODE != os.O_RDONLY:
                writable.add(target)
    active = {living.path(living.layer_of(living.witness.id, index)) for index in (0, 1)}
    assert {path for path in writable if path.suffix == ".qcow2"} == active
    assert {path.name for path in writable - active} <= {"qemu.log"}
    chains = {
        living.path(str(row[0]))
        for row in living.process.rows(
            "WITH RECURSIVE chain (id) AS (SELECT layer FROM disks WHERE sandbox ="
            f" '{living.witness.id}' UNION SELECT parent FROM layers JOIN chain USING (id)"
            " WHERE parent IS NOT NULL) SELECT id FROM chain"
        )
    }
    assert {path for path in known if path.suffix == ".qcow2"} == chains
    # Not even when it is told to: the node is read-only, and cannot be made otherwise.
    folder = living.process.state / "sandboxes" / living.witness.id
    for sealed in living.disks_of(snapshot.id):
        before = disks.digest(sealed)
        node = "L" + sealed.stem.replace("-", "")[:28]
        command = {"command-line": f'qemu-io {node} "write -P 7 0 4096"'}
        answer = str(disks.ask_qemu(folder, "human-monitor-command", **command))
        assert "ermission" in answer, answer
        assert disks.digest(sealed) == before


def test_qemu_is_confined(living: Rig) -> None:
    other = living.create()
    pid = living.process.guests()[living.witness.id]
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert status["Seccomp"].strip() == "2"
    assert status["CoreDumping"].strip() == "0"
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
    uids = {int(uid) for uid in status["Uid"].split()}
    if os.geteuid() != 0:
        assert uids == {os.geteuid()}
        return
    ((uid,), (other_uid,)) = (
        living.process.rows(f"SELECT uid FROM sandboxes WHERE id = '{each}'")[0]
        for each in (living.witness.id, other.id)
    )
    assert isinstance(uid, int)
    assert uid != other_uid
    assert uids == {int(gid) for gid in status["Gid"].split()} == {uid}
    assert uid >= 65536
    groups = status["Groups"].split()
    assert set(groups) <= {str(uid)} or living.client.host().accelerator == "kvm"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0
    secrets = [
        living.path(living.layer_of(other.id)),
        living.path(living.layer_of(living.witness.id)),
        living.process.state / "catalog.db",
        living.process.state / "sandboxes" / other.id / "qmp.sock",
        living.process.state / "layers",
    ]
    for secret in secrets:
        assert secret.exists()
        for right in ("-r", "-w", "-x"):
            tried = subprocess.run(
                ["test", right, secret], user=uid, group=uid, extra_groups=[], check=False
            )
            assert tried.returncode == 1, (right, secret)


def test_the_daemon_leaves_no_core_either(living: Rig) -> None:
    assert resource.prlimit(living.process.pid, resource.RLIMIT_CORE) == (0, 0)


# What QEMU stops while nobody looks


def test_a_panic_while_nobody_looked(living: Rig) -> None:
    victim = living.create().wait_ready(timeout=120)
    folder = living.process.state / "sandboxes" / victim.id
    living.process.kill()
    with agent_alone(folder) as agent:
        agent.send("guest-exec", path="/bin/sh", arg=["-c", "echo c > /proc/sysrq-trigger"])
        eventually(lambda: disks.status(folder) == "guest-panicked")
    living.restart()
    now = living.client.sandboxes.get(victim.id)
    assert now.state is SandboxState.FAILED
    assert "panicked" in str(now.state_reason)
    living.check()
