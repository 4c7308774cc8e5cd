"""Copies of a sandbox, and a sandbox put back; what happens when either fails."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import pytest

from stratabox.client import (
    Client,
    DeniedError,
    EventType,
    Image,
    InvalidArgumentError,
    InvalidResourcesError,
    InvalidStateError,
    QemuFailedError,
    Sandbox,
    SandboxState,
    SnapshotDeletion,
    SnapshotEvent,
    SnapshotFailedError,
    SnapshotLevel,
    SnapshotState,
)
from support import disks
from support.agents import kill_agent
from support.daemon import DaemonProcess, daemon
from support.rig import wait_idle
from support.stored import Stored, wait_until

Shell = Callable[[Sandbox, str], str]


@pytest.fixture(scope="module")
def stored(shared_daemon: DaemonProcess) -> Stored:
    return Stored(shared_daemon)


@pytest.fixture(scope="module")
def source(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """What is copied and put back."""
    with client.sandboxes.create(
        image=tiny.id, name="source", cpus=1, memory=160, data_disks=[1], env={"A": "1", "B": "2"}
    ) as box:
        yield box


def put(box: Sandbox, text: str) -> None:
    """Have both disks of the guest hold a text, for certain."""
    box.execute(
        f"echo {text} >/text && sync"
        f" && echo {text} | dd of=/dev/vdb bs=512 conv=sync,notrunc oflag=direct,dsync"
    ).check()


def got(box: Sandbox) -> str:
    """The text that both disks of the guest hold."""
    root, data = box.execute("cat /text; head -n 1 /dev/vdb").check().stdout_text.split()
    assert root == data
    return root


def memory(box: Sandbox) -> int:
    """KiB that the guest's kernel sees."""
    return int(box.execute("sed -n 's/MemTotal: *//p' /proc/meminfo").stdout.split()[0])


def hardware(process: DaemonProcess, sandbox: str) -> tuple[str, str, str]:
    """MAC address, generation id and UUID that a guest's QEMU was really started with."""
    words = Path(f"/proc/{process.guests()[sandbox]}/cmdline").read_text(encoding="utf-8")
    mac = re.search(r'"mac":"([0-9a-f:]{17})"', words)
    guid = re.search(r'"guid":"([0-9a-f-]{36})"', words)
    uuid = re.search(r"-uuid\0([0-9a-f-]{36})\0", words)
    assert mac
    assert guid
    assert uuid
    return mac[1], guid[1], uuid[1]


def clear(client: Client) -> None:
    """Remove all snapshots of a test, and all copies."""
    for sandbox in client.sandboxes.list():
        if sandbox.name != "source":
            sandbox.delete()
    for snapshot in client.snapshots.list():
        client.snapshots.delete(snapshot.id)


class TestClone:
    def test_four_asked_for_at_once(
        self, client: Client, shared_daemon: DaemonProcess, source: Sandbox
    ) -> None:
        """Each captures, each is a guest of its own, and the source runs on."""
        put(source, "original")
        uptime = float(source.execute("cat /proc/uptime").check().stdout.split()[0])
        with ThreadPoolExecutor(4) as pool:
            results = list(
                pool.map(lambda name: source.clone(name=name, memory=128), ("a", "b", "c", "d"))
            )
        assert len({result.snapshot.id for result in results}) == 4
        copies = [result.sandbox for result in results]
        assert [copy.name for copy in copies] == ["a", "b", "c", "d"]
        for copy, result in zip(copies, results, strict=True):
            assert (copy.state, copy.ready) == (SandboxState.RUNNING, True)
            assert copy.source_snapshot_id == result.snapshot.id
            assert result.snapshot.consistency is SnapshotLevel.APPLICATION
            assert got(copy) == "original"
            put(copy, f"own-{copy.name}")
        put(source, "original-2")
        assert [got(copy) for copy in copies] == [f"own-{copy.name}" for copy in copies]
        assert got(source) == "original-2"
        seen = [hardware(shared_daemon, each.id) for each in (source, *copies)]
        for values in zip(*seen, strict=True):
            assert len(set(values)) == 5
        assert float(source.execute("cat /proc/uptime").check().stdout.split()[0]) > uptime
        clear(client)

    def test_several_in_one_call(self, client: Client, source: Sandbox) -> None:
        put(source, "several")
        result = source.clone(
            count=2,
            name="worker",
            snapshot_name="fork point",
            cpus=2,
            memory=144,
            env={"B": "two", "C": "3"},
            quick=True,
        )
        assert result.errors == ()
        assert [copy.name for copy in result.sandboxes] == ["worker-1", "worker-2"]
        assert result.snapshot.name == "fork point"
        assert result.snapshot.consistency is SnapshotLevel.CRASH
        assert (result.snapshot.cpus, result.snapshot.memory) == (1, 160)
        for copy in result.sandboxes:
            assert (copy.cpus, copy.memory) == (2, 144)
            assert copy.env == {"A": "1", "B": "two", "C": "3"}
            assert copy.execute("echo $A $B $C; nproc").stdout == b"1 two 3\n2\n"
            assert 14 << 10 < memory(source) - memory(copy) < 18 << 10
            assert got(copy) == "several"
        assert source.refresh().env == {"A": "1", "B": "2"}

        # The snapshot is one like any other: it outlives them, and gives more.
        for copy in result.sandboxes:
            copy.delete()
        with client.snapshots.restore(result.snapshot.id, storage=3) as larger:
            assert larger.storage == 3
            assert int(larger.execute("cat /sys/block/vda/size").stdout) * 512 == 3 << 30
            blocks = int(larger.execute("df -k / | tail -n 1").stdout.split()[1])
            assert blocks > 2.5 * (1 << 20)
            assert got(larger) == "several"
        with pytest.raises(InvalidResourcesError):
            client.snapshots.restore(result.snapshot.id, storage=0x7FFFFFFF)
        clear(client)

    def test_bad_requests_make_nothing(self, client: Client, source: Sandbox) -> None:
        before = client.snapshots.list(), len(client.sandboxes.list())
        for error, wrong in (
            (InvalidArgumentError, {"count": 0}),
            (InvalidArgumentError, {"count": 65}),
            (InvalidResourcesError, {"cpus": 33}),
            (InvalidResourcesError, {"memory": 127}),
            (InvalidArgumentError, {"name": "a/b"}),
            (InvalidArgumentError, {"env": {"=": ""}}),
        ):
            with pytest.raises(error):
                source.clone(**wrong)
        assert (client.snapshots.list(), len(client.sandboxes.list())) == before

    def test_of_a_paused_and_of_a_stopped_one(
        self, client: Client, source: Sandbox, stored: Stored
    ) -> None:
        put(source, "at-rest")
        source.pause()
        paused = source.clone(wait_for_ready=False)
        paused.sandbox.pause()
        assert paused.snapshot.consistency is SnapshotLevel.MEMORY
        assert source.refresh().state is SandboxState.PAUSED
        with pytest.raises(InvalidStateError):
            source.clone(level="application")
        source.resume()
        source.stop()
        stopped = source.clone()
        assert stopped.snapshot.consistency is SnapshotLevel.APPLICATION
        assert source.refresh().state is SandboxState.STOPPED
        assert got(stopped.sandbox) == "at-rest"
        assert disks.marker_of(lambda: stored.of_sandbox(paused.sandbox.id, 1)) == "at-rest"
        source.start()
        clear(client)

    def test_restores_of_one_snapshot_at_once(
        self, client: Client, source: Sandbox, shared_daemon: DaemonProcess
    ) -> None:
        put(source, "shared")
        snapshot = source.snapshot()
        with ThreadPoolExecutor(4) as pool:
            copies = list(
                pool.map(
                    lambda number: client.snapshots.restore(
                        snapshot.id, name=f"copy-{number}", memory=128
                    ),
                    range(4),
                )
            )
        for copy in copies:
            put(copy, copy.name)
        assert [got(copy) for copy in copies] == [copy.name for copy in copies]
        assert len({hardware(shared_daemon, copy.id) for copy in copies}) == 4
        clear(client)


def deletion(client: Client, snapshot: str) -> tuple[SnapshotDeletion, SnapshotEvent]:
    """Delete a snapshot: the answer's estimate, and what the event tells afterwards."""
    events = client.snapshots.watch(snapshots=[snapshot])
    with closing(cast("closing[Iterator[SnapshotEvent]]", events)):  # type: ignore[type-var]
        assert next(events).type is EventType.PRESENT
        answer = client.snapshots.delete(snapshot)
        return answer, next(event for event in events if event.type is EventType.DELETED)


def test_deleting_what_others_stand_on(
    client: Client, shared_daemon: DaemonProcess, source: Sandbox, stored: Stored, sh: Shell
) -> None:
    """They go on working; the answer says who keeps what, the event what really came free."""
    fill = "dd if=/dev/urandom of=/fill bs=1M count=4 conv=fsync 2>/dev/null"
    sh(source, fill)
    put(source, "first")
    first = source.snapshot(quick=True)
    sh(source, fill)
    put(source, "second")
    second = source.snapshot(quick=True)
    copy = client.snapshots.restore(first.id, wait_for_ready=False)
    source.pause()
    copy.pause()
    wait_idle(shared_daemon)  # so that all figures stand still

    # All of the first is needed: by the second, by the copy and by the source.
    space = stored.bytes_on_disk()
    answer, event = deletion(client, first.id)
    assert (answer.id, answer.freed_bytes) == (first.id, 0)
    assert answer.kept_bytes >= 4 << 20
    assert set(answer.kept_for) == {second.id, copy.id, source.id}
    assert event.freed_bytes == 0
    assert stored.bytes_on_disk() == space

    # The second is still needed by the source, which has written on top of it.
    answer, event = deletion(client, second.id)
    assert (answer.freed_bytes, event.freed_bytes) == (0, 0)
    assert answer.kept_bytes >= 4 << 20
    assert answer.kept_for == (source.id,)

    # What nobody needs comes free, exactly as told.
    copy.resume()
    copy = client.sandboxes.wait_ready(copy.id, timeout=60)
    assert got(copy) == "first"
    sh(copy, fill)
    last = copy.snapshot(quick=True)
    copy.delete()
    own = [stored.of_snapshot(last.id, index) for index in (0, 1)]
    space = sum(path.stat().st_blocks * 512 for path in own)
    answer, event = deletion(client, last.id)
    assert answer.freed_bytes >= 4 << 20
    assert answer.freed_bytes == event.freed_bytes == space
    assert not any(path.exists() for path in own)
    assert set(answer.kept_for) <= {source.id}
    source.resume()
    assert got(source) == "second"
    wait_until(lambda: stored.unneeded() == set())  # what remains is merged now


class TestRevert:
    def test_back_and_forth(
        self, client: Client, shared_daemon: DaemonProcess, source: Sandbox
    ) -> None:
        put(source, "then")
        target = source.snapshot(name="then")
        put(source, "now")
        generation = hardware(shared_daemon, source.id)
        begun = datetime.now(UTC)
        done = source.revert("then")
        assert done.sandbox.id == source.id
        assert (done.sandbox.state, done.sandbox.ready) == (SandboxState.RUNNING, True)
        assert done.sandbox.source_snapshot_id == target.id
        assert got(source) == "then"
        mac, guid, uuid = hardware(shared_daemon, source.id)
        assert (mac, uuid) == (generation[0], generation[2])
        assert guid != generation[1]
        safety = done.safety_snapshot
        assert safety.state is SnapshotState.READY
        assert safety.source_sandbox_id == source.id
        assert safety.expires_at is not None
        day = timedelta(hours=24)
        assert begun + day <= safety.expires_at <= datetime.now(UTC) + day
        assert client.snapshots.get(safety.id) == safety

        # The way back is one more revert.
        source.revert(safety.id)
        assert got(source) == "now"
        clear(client)

    def test_dead_agent_and_paused(
        self, client: Client, shared_daemon: DaemonProcess, source: Sandbox, stored: Stored
    ) -> None:
        put(source, "sound")
        target = source.snapshot()
        put(source, "agentless")
        kill_agent(shared_daemon, source)
        done = source.revert(target.id)
        assert done.safety_snapshot.consistency is SnapshotLevel.CRASH
        safety = done.safety_snapshot.id
        assert disks.marker_of(lambda: stored.of_snapshot(safety, 1)) == "agentless"
        assert got(source) == "sound"

        put(source, "in-pause")
        source.pause()
        done = source.revert(target.id)
        assert done.sandbox.state is SandboxState.RUNNING
        second = done.safety_snapshot.id
        assert disks.marker_of(lambda: stored.of_snapshot(second, 1)) == "in-pause"
        assert got(source) == "sound"
        clear(client)

    def test_stopped_stays_stopped(
        self, client: Client, shared_daemon: DaemonProcess, source: Sandbox, stored: Stored
    ) -> None:
        put(source, "earlier")
        target = source.snapshot()
        put(source, "later")
        source.stop()
        done = source.revert(target.id)
        assert done.sandbox.state is SandboxState.STOPPED
        assert done.safety_snapshot.consistency is SnapshotLevel.APPLICATION
        assert source.id not in shared_daemon.guests()
        assert disks.marker_of(lambda: stored.of_sandbox(source.id, 1)) == "earlier"
        safety = done.safety_snapshot.id
        assert disks.marker_of(lambda: stored.of_snapshot(safety, 1)) == "later"
        source.start()
        assert got(source) == "earlier"
        clear(client)

    def test_foreign_snapshot_is_refused(self, client: Client, source: Sandbox) -> None:
        own = source.snapshot(quick=True)
        with client.snapshots.restore(own.id, wait_for_ready=False, memory=128) as other:
            before = client.snapshots.list()
            with pytest.raises(DeniedError) as caught:
                other.revert(own.id)
            assert caught.value.reason == "NOT_ITS_SNAPSHOT"
            assert other.refresh().state is SandboxState.RUNNING
            assert client.snapshots.list() == before
        clear(client)


class Lab:
    """A daemon of its own whose QEMU can be told to fail, and one guest."""

    def __init__(self, process: DaemonProcess, public: Path) -> None:
        self.process = process
        # Where QEMU's own user may look too.
        public.chmod(0o777)
        self.broken = public / "broken"
        self.broken_once = public / "broken-once"
        wrapper = public / "qemu"
        # "-version" and the like go on working: only guests do not start. One mkdir is the first.
        wrapper.write_text(
            "#!/bin/sh\n"
            f"[ -e {self.broken} ] || {{ [ -e {self.broken_once} ] && mkdir {public}/first; }}"
            " && case \" $* \" in *' -uuid '*) echo out of order >&2; exit 7;; esac\n"
            'exec qemu-system-x86_64 "$@"\n'
        )
        wrapper.chmod(0o755)
        process.environment["STRATABOX_QEMU_BINARY"] = str(wrapper)
        self.stored = Stored(process)
        self.client = process.start()
        self.client.images.build_tiny()
        self.box = self.client.sandboxes.create(image="tiny", memory=128, data_disks=[1])

    def restart(self, failpoints: str = "") -> None:
        """A new daemon, with these failpoints."""
        self.client.close()
        self.process.stop()
        self.client = self.process.start(failpoints=failpoints)
        self.box = self.client.sandboxes.wait_ready(self.box.id, timeout=60)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with (
        tempfile.TemporaryDirectory() as public,
        daemon(tmp_path_factory.mktemp("clone")) as process,
    ):
        lab = Lab(process, Path(public))
        yield lab
        lab.client.close()


def test_clone_that_fails_leaves_nothing(lab: Lab) -> None:
    layers = lab.process.layers()
    lab.broken.touch()
    with pytest.raises(QemuFailedError, match="out of order"):
        lab.box.clone(count=3)
    with pytest.raises(QemuFailedError, match="out of order"):
        lab.client.sandboxes.create(image="tiny")
    lab.broken.unlink()
    assert [box.id for box in lab.client.sandboxes.list(include_terminated=True)] == [lab.box.id]
    assert lab.client.snapshots.list() == []
    lab.process.check_consistent()
    assert lab.stored.unneeded() == set()
    # The source has been captured: its chain is longer by one layer a disk, and that is all.
    assert len(lab.process.layers()) == len(layers) + 2
    put(lab.box, "unharmed")


def test_clone_that_fails_in_part_tells_which(lab: Lab) -> None:
    put(lab.box, "partly")
    lab.broken_once.touch()
    result = lab.box.clone(count=2)
    lab.broken_once.unlink()
    (copy,) = result.sandboxes
    (error,) = result.errors
    assert isinstance(error, QemuFailedError)
    assert got(copy) == "partly"
    assert {box.id for box in lab.client.sandboxes.list()} == {lab.box.id, copy.id}
    lab.process.check_consistent()
    copy.delete()
    lab.client.snapshots.delete(result.snapshot.id)
    assert lab.stored.unneeded() == set()


def test_revert_whose_safety_snapshot_fails_changes_nothing(lab: Lab) -> None:
    put(lab.box, "target")
    target = lab.box.snapshot()
    put(lab.box, "current")
    pid = lab.process.guests()[lab.box.id]
    lab.restart("snapshot.overlays-made=error")
    with pytest.raises(SnapshotFailedError) as caught:
        lab.box.revert(target.id)
    lab.restart()
    assert lab.process.guests()[lab.box.id] == pid
    assert lab.box.refresh().state is SandboxState.RUNNING
    assert got(lab.box) == "current"
    failed = lab.client.snapshots.get(caught.value.snapshot_id or "")
    assert failed.state is SnapshotState.FAILED
    assert failed.expires_at is not None
    lab.process.check_consistent()
    assert lab.stored.unneeded() == set()


def test_revert_whose_guest_does_not_start_again(lab: Lab) -> None:
    """It has been put back, it is stopped and says why, and starts when it can."""
    put(lab.box, "good")
    target = lab.box.snapshot()
    put(lab.box, "bad")
    lab.broken.touch()
    with pytest.raises(QemuFailedError, match="out of order"):
        lab.box.revert(target.id)
    stopped = lab.box.refresh()
    assert stopped.state is SandboxState.STOPPED
    assert stopped.state_reason is not None
    assert "out of order" in stopped.state_reason
    lab.process.check_consistent()
    lab.broken.unlink()
    lab.box.start()
    assert got(lab.box) == "good"
    (safety,) = lab.client.snapshots.list(metadata={"stratabox.safety": "true"}, states=["ready"])
    assert disks.marker_of(lambda: lab.stored.of_snapshot(safety.id, 1)) == "bad"
