"""Which level a snapshot gets, what its record says, and how long it lives.

The tests share one guest and bring it through its states in the order of this file.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    EventType,
    Image,
    InvalidArgumentError,
    InvalidStateError,
    Sandbox,
    SandboxNotFoundError,
    SandboxState,
    Snapshot,
    SnapshotFailedError,
    SnapshotLevel,
    SnapshotNotFoundError,
    SnapshotNotReadyError,
    SnapshotState,
)
from support import disks
from support.agents import kill_agent
from support.daemon import DaemonProcess
from support.stored import Stored, assert_ext4_is_clean, to_raw
from support.waiting import until

Shell = Callable[[Sandbox, str], str]

CRASH, APPLICATION = SnapshotLevel.CRASH, SnapshotLevel.APPLICATION


@pytest.fixture(scope="module")
def stored(shared_daemon: DaemonProcess) -> Stored:
    return Stored(shared_daemon)


@pytest.fixture(scope="module")
def box(client: Client, tiny: Image) -> Iterator[Sandbox]:
    with client.sandboxes.create(
        image=tiny.id,
        name="many-levels",
        cpus=2,
        memory=200,
        storage=2,
        data_disks=[1],
        env={"COLOUR": "red"},
        metadata={"of": "sandbox"},
    ) as sandbox:
        yield sandbox


@pytest.fixture
def running(client: Client, box: Sandbox) -> Sandbox:
    """The guest, running and ready, whatever the test before has left."""
    state = box.refresh().state
    if state is SandboxState.PAUSED:
        return box.resume()
    if state in (SandboxState.STOPPED, SandboxState.FAILED):
        return box.start()
    return client.sandboxes.wait_ready(box.id, timeout=60)


def assert_refused(client: Client, box: Sandbox, level: SnapshotLevel) -> None:
    """A level that is named and impossible: told at once, and not even a record is made."""
    before = {snapshot.id for snapshot in client.snapshots.list(sandbox=box.id)}
    with pytest.raises(InvalidStateError):
        box.snapshot(level=level)
    assert {snapshot.id for snapshot in client.snapshots.list(sandbox=box.id)} == before


def put(box: Sandbox, text: str) -> None:
    """Have both disks of the guest hold a text, for certain."""
    box.execute(
        f"echo {text} >/text && sync"
        f" && echo {text} | dd of=/dev/vdb bs=512 conv=sync,notrunc oflag=direct,dsync"
    ).check()


def assert_restores(client: Client, snapshot: Snapshot, text: str, sh: Shell) -> None:
    with client.snapshots.restore(snapshot.id, memory=128, cpus=1) as restored:
        assert sh(restored, "cat /text") == text
        assert sh(restored, "head -n 1 /dev/vdb") == text


def test_running(client: Client, running: Sandbox, sh: Shell) -> None:
    """No level named: the strongest. The source notices nothing but a stall."""
    sh(running, "echo alive >/run/alive")
    snapshot = running.snapshot()
    assert snapshot.consistency is APPLICATION
    assert snapshot.requested_level is None
    for level in (APPLICATION, CRASH):
        named = running.snapshot(level=level)
        assert (named.consistency, named.requested_level) == (level, level)
        assert named.stall is not None
        assert named.stall > timedelta()
    now = running.refresh()
    assert (now.state, now.ready) == (SandboxState.RUNNING, True)
    assert now.started_at == running.started_at
    assert sh(running, "cat /run/alive") == "alive"


def test_record(client: Client, running: Sandbox, tiny: Image) -> None:
    first = running.snapshot(quick=True)
    begun = datetime.now(UTC)
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    put(running, "recorded")
    snapshot = running.snapshot(name="baseline", expires_at=expires, metadata={"why": "test"})
    assert (snapshot.name, snapshot.state) == ("baseline", SnapshotState.READY)
    assert snapshot.source_sandbox_id == running.id
    assert snapshot.source_sandbox_name == "many-levels"
    assert snapshot.image_id == tiny.id
    assert snapshot.parent_snapshot_id == first.id
    assert (snapshot.cpus, snapshot.memory, snapshot.storage) == (2, 200, 2)
    assert snapshot.env == {"COLOUR": "red"}
    assert snapshot.metadata == {"why": "test"}
    assert snapshot.size_bytes == 3 << 30
    assert 0 < snapshot.layer_bytes < 64 << 20
    assert snapshot.expires_at == expires
    assert snapshot.ready_at is not None
    assert begun <= snapshot.created_at <= snapshot.ready_at <= datetime.now(UTC)
    assert snapshot.failure_reason is None
    assert client.snapshots.get("baseline") == snapshot

    # It is what the sandbox was, whatever becomes of that.
    running.update(env={"COLOUR": "blue"}, name="renamed")
    assert client.snapshots.get(snapshot.id) == snapshot
    assert running.snapshot(quick=True).env == {"COLOUR": "blue"}
    running.update(name="many-levels")


def test_update(client: Client, running: Sandbox) -> None:
    snapshot = running.snapshot(quick=True, metadata={"a": "1", "b": "2"})
    assert snapshot.expires_at is None
    later = datetime(2100, 1, 1, tzinfo=UTC)
    changed = client.snapshots.update(snapshot.id, name="new name", expires_at=later)
    assert (changed.name, changed.expires_at) == ("new name", later)
    assert changed.metadata == {"a": "1", "b": "2"}
    assert changed.generation > snapshot.generation
    changed = client.snapshots.update(snapshot.id, metadata={"c": "3"})
    assert (changed.metadata, changed.expires_at) == ({"c": "3"}, later)
    changed = client.snapshots.update(snapshot.id, expires_at=None)
    assert changed.expires_at is None
    past = datetime.now(UTC) - timedelta(seconds=1)
    with pytest.raises(InvalidArgumentError):
        client.snapshots.update(snapshot.id, expires_at=past)
    with pytest.raises(InvalidArgumentError):
        running.snapshot(expires_at=past)
    assert client.snapshots.get(snapshot.id) == changed
    client.snapshots.delete(snapshot.id)


def test_expiry(client: Client, running: Sandbox) -> None:
    """It deletes itself; one whose expiry was cleared in time does not."""
    later = datetime.now(UTC) + timedelta(hours=1)
    doomed = running.snapshot(quick=True, expires_at=later)
    saved = running.snapshot(quick=True, expires_at=later)
    events = client.snapshots.watch(snapshots=[doomed.id, saved.id])
    with closing(events):  # type: ignore[type-var]
        assert next(events).type is EventType.PRESENT
        soon = datetime.now(UTC) + timedelta(seconds=5)
        for snapshot in (doomed, saved):
            client.snapshots.update(snapshot.id, expires_at=soon)
        client.snapshots.update(saved.id, expires_at=None)
        gone = next(event for event in events if event.type is EventType.DELETED)
    assert gone.snapshot.id == doomed.id
    assert gone.time >= soon
    with pytest.raises(SnapshotNotFoundError):
        client.snapshots.get(doomed.id)
    assert client.snapshots.get(saved.id).state is SnapshotState.READY


def test_many_at_once_queue_and_all_succeed(
    client: Client, running: Sandbox, stored: Stored
) -> None:
    put(running, "together")
    levels = [CRASH, APPLICATION] * 4
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda level: running.snapshot(level=level), levels))
    assert [snapshot.consistency for snapshot in taken] == levels
    assert {disks.marker(stored.of_snapshot(snapshot.id, 1)) for snapshot in taken} == {"together"}
    # One after the other: each stands on the one before.
    queue = sorted(taken, key=lambda snapshot: snapshot.ready_at or snapshot.created_at)
    assert [snapshot.parent_snapshot_id for snapshot in queue[1:]] == [
        snapshot.id for snapshot in queue[:-1]
    ]
    for snapshot in taken:
        client.snapshots.delete(snapshot.id)


def test_not_waited_for(client: Client, running: Sandbox) -> None:
    snapshot = running.snapshot(wait=False)
    assert snapshot.consistency is None
    assert client.snapshots.wait_ready(snapshot.id, timeout=60).consistency is APPLICATION


def test_failed_record_stays_until_it_is_deleted(
    client: Client, running: Sandbox, sh: Shell
) -> None:
    sh(running, "printf '#!/bin/sh\\nexit 1\\n' >/etc/qemu/fsfreeze-hook.d/no")
    sh(running, "chmod 755 /etc/qemu/fsfreeze-hook.d/no")
    with pytest.raises(SnapshotFailedError) as caught:
        running.snapshot(name="never")
    sh(running, "rm /etc/qemu/fsfreeze-hook.d/no")
    failed = client.snapshots.get("never")
    assert caught.value.snapshot_id == failed.id
    assert failed.state is SnapshotState.FAILED
    assert failed.failure_reason
    assert (failed.consistency, failed.ready_at, failed.layer_bytes) == (None, None, 0)
    assert failed in client.snapshots.list(sandbox=running.id, states=["failed"])
    with pytest.raises(SnapshotNotReadyError):
        client.snapshots.restore(failed.id)
    with pytest.raises(SnapshotFailedError):
        client.snapshots.wait_ready(failed.id)
    assert client.snapshots.delete(failed.id).freed_bytes == 0
    assert failed.id not in {snapshot.id for snapshot in client.snapshots.list()}


def test_paused(client: Client, running: Sandbox, sh: Shell) -> None:
    put(running, "before-pause")
    running.pause()
    assert_refused(client, running, APPLICATION)
    snapshot = running.snapshot()
    assert (snapshot.consistency, snapshot.requested_level) == (CRASH, None)
    assert running.refresh().state is SandboxState.PAUSED
    running.resume()
    put(running, "after-pause")
    assert_restores(client, snapshot, "before-pause", sh)


def test_agent_gone_and_power_cut(
    client: Client, shared_daemon: DaemonProcess, running: Sandbox, stored: Stored
) -> None:
    put(running, "agentless")
    kill_agent(shared_daemon, running)
    without_agent = running.snapshot()
    assert (without_agent.consistency, without_agent.requested_level) == (CRASH, None)

    running.stop(force=True)
    assert_refused(client, running, APPLICATION)
    without_power = running.snapshot()
    assert (without_power.consistency, without_power.requested_level) == (CRASH, None)
    assert without_power.stall is None
    for snapshot in (without_agent, without_power):
        assert disks.marker(stored.of_snapshot(snapshot.id, 1)) == "agentless"


def test_stopped_cleanly(
    client: Client, running: Sandbox, stored: Stored, sh: Shell, tmp_path: Path
) -> None:
    put(running, "shut-down")
    running.stop()
    snapshot = running.snapshot()
    assert (snapshot.consistency, snapshot.requested_level) == (APPLICATION, None)
    assert_ext4_is_clean(to_raw(stored.of_snapshot(snapshot.id), tmp_path / "root.raw"))
    for level in (CRASH, APPLICATION):
        assert running.snapshot(level=level).consistency is level
    assert running.refresh().state is SandboxState.STOPPED
    assert_restores(client, snapshot, "shut-down", sh)
    # That was of the last shutdown. It says nothing about the disks once the guest has run again.
    running.start()
    running.stop(force=True)
    assert_refused(client, running, APPLICATION)


def test_qemu_killed(
    client: Client, shared_daemon: DaemonProcess, running: Sandbox, stored: Stored, sh: Shell
) -> None:
    put(running, "killed")
    os.kill(shared_daemon.guests()[running.id], signal.SIGKILL)
    until(client, running.id, lambda box: box.state is SandboxState.FAILED)
    assert_refused(client, running, APPLICATION)
    snapshot = running.snapshot()
    assert snapshot.consistency is CRASH
    assert disks.marker(stored.of_snapshot(snapshot.id, 1)) == "killed"
    running.start()
    assert sh(running, "cat /text") == "killed"


def test_snapshots_outlive_their_sandbox(
    client: Client, running: Sandbox, shared_daemon: DaemonProcess, sh: Shell
) -> None:
    put(running, "outlives")
    last = running.snapshot(name="the last")
    running.terminate()
    for level in (None, CRASH):
        with pytest.raises(InvalidStateError):
            running.snapshot(level=level)
    listed = client.snapshots.list(sandbox=running.id)
    assert last in listed
    running.delete()
    assert client.snapshots.list(sandbox=running.id) == listed
    assert client.snapshots.list(sandbox=running.id, name="the last") == [last]
    assert_restores(client, last, "outlives", sh)
    for snapshot in listed:
        client.snapshots.delete(snapshot.id)
    with pytest.raises(SandboxNotFoundError):
        client.snapshots.list(sandbox=running.id)


def test_default_level(own_daemon: DaemonProcess) -> None:
    """The configured one is a ceiling where none is named."""
    client = own_daemon.start(environment={"STRATABOX_DEFAULT_LEVEL": "crash"})
    client.images.build_tiny()
    with client.sandboxes.create(image="tiny", memory=128) as box:
        assert box.snapshot().consistency is CRASH
        assert box.snapshot(level="application").consistency is APPLICATION
    client.close()
