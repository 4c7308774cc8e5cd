"""Freezes that fail: each is told with its reason, none is passed off as something weaker, and the
guest goes on writing.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from stratabox.client import (
    Client,
    DeadlineExceededError,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotFailedError,
    SnapshotLevel,
    SnapshotState,
)
from stratabox.daemon.hypervisor.sockets import connect
from stratabox.daemon.lifecycle.running.thawing import THAW_SECONDS
from support import disks
from support.daemon import DaemonProcess, daemon
from support.rig import standing
from support.stored import Stored, wait_until
from support.waiting import until

Shell = Callable[[Sandbox, str], str]

FREEZE_TIMEOUT = 3
WRITES_WITHIN = 30
"""Whatever holds up a host: of itself a freeze never ends."""
FROZEN = "/run/qga.state.isfrozen"
"""The agent keeps this file for as long as it holds file systems frozen."""
HOOK = "/etc/qemu/fsfreeze-hook.d/test"


class Lab:
    """A daemon, and one guest with two file systems in it."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.stored = Stored(process)
        self.mark = process.folder / "frozen"
        """It is there while the daemon waits in the window."""
        self._acted = 0
        self.client = self.start()
        self.client.images.build_tiny()
        self.box = self.client.sandboxes.create(image="tiny", memory=192, data_disks=[1, 1])
        self.run("mke2fs /dev/vdb >/dev/null 2>&1 && mount -t ext4 /dev/vdb /mnt")

    def start(self, failpoints: str = "", **settings: str) -> Client:
        environment = {f"STRATABOX_{key}": value for key, value in settings.items()}
        return self.process.start(failpoints=failpoints, environment=environment)

    def restart(self, failpoints: str = "", **settings: str) -> None:
        """A new daemon, with these failpoints; the guest runs on and is ready on return."""
        self.client.close()
        self.process.stop()
        self.client = self.start(failpoints, **settings)
        self.box = self.client.sandboxes.wait_ready(self.box.id, timeout=60)

    def run(self, line: str) -> str:
        result = self.client.sandboxes.execute(self.box.id, line, timeout=30)
        assert result.exit_code == 0, (line, result)
        return result.stdout_text.rstrip("\n")

    def in_background(self, script: str) -> None:
        """Leave something running in the guest."""
        self.run(f"setsid /bin/sh -c '{script}' >/dev/null 2>&1 </dev/null &")

    def once_frozen(self, action: str) -> Callable[[], bool]:
        """Have the guest itself do something as soon as its file systems are frozen.

        :return: tells whether it has, by a disk of the guest's without a file system.
        """
        self._acted += 1
        mark = f"acted-{self._acted}"
        # The file is there a moment before they are frozen.
        self.in_background(
            f"until [ -e {FROZEN} ]; do usleep 20000; done; usleep 500000;"
            f" until {action}; do usleep 20000; done;"
            f" echo {mark} | dd of=/dev/vdc bs=512 seek=1 conv=sync,notrunc oflag=direct,dsync"
        )

        def acted() -> bool:
            sector = disks.read(self.stored.of_sandbox(self.box.id, 2), offset=512)
            return sector.startswith(f"{mark}\n".encode())

        return acted

    @contextlib.contextmanager
    def held_until(self, fact: Callable[[], bool]) -> Iterator[None]:
        """The daemon stands still between freeze and disks until that is so."""

        over = threading.Event()

        def hold() -> None:
            # What the guest does may end the freeze before it is done.
            wait_until(lambda: self.mark.exists() or over.is_set())
            if not over.is_set():
                with standing(self.mark):
                    wait_until(fact)

        with ThreadPoolExecutor(1) as pool:
            holding = pool.submit(hold)
            try:
                yield
            finally:
                over.set()
            holding.result()

    def hook(self, script: str) -> None:
        self.run(f"printf '#!/bin/sh\\n%s\\n' '{script}' >{HOOK} && chmod 755 {HOOK}")

    def snapshot_fails(self, level: SnapshotLevel | None = None) -> Snapshot:
        """Take one, which must fail and say so everywhere; the failed record."""
        with pytest.raises(SnapshotFailedError) as caught:
            self.client.snapshots.create(self.box.id, level=level)
        assert caught.value.snapshot_id
        record = self.client.snapshots.get(caught.value.snapshot_id)
        assert record.state is SnapshotState.FAILED
        assert record.consistency is None
        assert record.failure_reason
        assert record.failure_reason in str(caught.value)
        assert record.source_sandbox_id == self.box.id
        return record

    def assert_writes(self) -> None:
        """Both file systems take a write, and keep it."""
        for place in ("/probe", "/mnt/probe"):
            result = self.client.sandboxes.execute(
                self.box.id,
                f"dd if=/dev/zero of={place} bs=4096 count=1 conv=fsync",
                timeout=WRITES_WITHIN,
            )
            assert result.exit_code == 0, (place, result)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with daemon(tmp_path_factory.mktemp("freeze")) as process:
        lab = Lab(process)
        yield lab
        # Whatever failed here left nothing half-made, and nothing in the way.
        assert lab.client.snapshots.create(lab.box.id).frozen_filesystems == 2
        process.check_consistent()
        lab.client.close()


@pytest.fixture(autouse=True)
def _still_works(lab: Lab) -> Iterator[None]:
    """After each failure the guest writes."""
    yield
    lab.assert_writes()
    lab.run(f"rm -f {HOOK}")


@pytest.fixture
def hasty(lab: Lab) -> Iterator[None]:
    """The daemon has little patience, which the others here must not depend on."""
    lab.restart(FREEZE_TIMEOUT=f"{FREEZE_TIMEOUT}s")
    yield
    lab.restart()


def test_every_file_system_is_frozen_and_counted(lab: Lab) -> None:
    lab.run("echo kept >/mnt/file")
    snapshot = lab.client.snapshots.create(lab.box.id)
    assert snapshot.consistency is SnapshotLevel.APPLICATION
    assert snapshot.frozen_filesystems == 2
    for index in (0, 1):
        assert not disks.needs_recovery(lab.stored.of_snapshot(snapshot.id, index))


def test_hook_that_fails(lab: Lab) -> None:
    lab.hook("exit 3")
    # Neither the level that was named nor, where none was, the weaker one without the freeze.
    for level in (SnapshotLevel.APPLICATION, None):
        record = lab.snapshot_fails(level)
        assert record.requested_level is level
        assert record.failure_reason is not None
        assert "hook" in record.failure_reason
    lab.client.snapshots.delete(record.id)
    crash = lab.client.snapshots.create(lab.box.id, quick=True)
    assert crash.consistency is SnapshotLevel.CRASH


@pytest.mark.usefixtures("hasty")
def test_hook_that_sleeps(lab: Lab) -> None:
    # In the guest's own words: when it wrote last, and the longest time in which it could not.
    lab.in_background(
        "last=$(cut -d. -f1 /proc/uptime) longest=0;"
        "while :; do dd if=/dev/zero of=/beat bs=512 count=1 conv=fsync;"
        "now=$(cut -d. -f1 /proc/uptime); gap=$((now - last)); last=$now;"
        "[ $gap -le $longest ] || longest=$gap; echo $longest >/run/longest; usleep 50000; done"
    )
    lab.hook(f"[ $1 = thaw ] || sleep {FREEZE_TIMEOUT + 2}")
    record = lab.snapshot_fails()
    assert record.failure_reason is not None
    assert f"guest-fsfreeze-freeze within {FREEZE_TIMEOUT} s" in record.failure_reason
    lab.assert_writes()
    assert int(lab.run("cat /run/longest")) < WRITES_WITHIN


def test_file_system_frozen_by_hand(lab: Lab) -> None:
    lab.run("fsfreeze --freeze /mnt")
    record = lab.snapshot_fails()
    assert record.failure_reason is not None
    assert "frozen already" in record.failure_reason


def test_frozen_through_the_agent_by_somebody_else(lab: Lab) -> None:
    lab.client.close()
    lab.process.stop()
    folder = lab.process.state / "sandboxes" / lab.box.id
    with connect(folder, "agent.sock") as agent:
        agent.settimeout(30)
        agent.sendall(b"\xff" + json.dumps({"execute": "guest-fsfreeze-freeze"}).encode() + b"\n")
        with agent.makefile("rb") as stream:
            while (reply := json.loads(stream.readline())) != {"return": 2}:
                assert "error" in reply, reply  # the agent's opinion of 0xFF
    lab.client = lab.start()
    lab.box = lab.client.sandboxes.wait_ready(lab.box.id, timeout=60)
    record = lab.snapshot_fails()
    assert record.failure_reason is not None
    assert "frozen already" in record.failure_reason


def test_agent_killed_during_the_freeze(lab: Lab) -> None:
    lab.hook("[ $1 = thaw ] || kill -9 $(pidof qemu-ga)")
    record = lab.snapshot_fails()
    assert record.failure_reason is not None
    assert "agent" in record.failure_reason


@pytest.fixture
def window(lab: Lab) -> None:
    """The daemon waits once between freeze and disks, so that something can happen in the guest."""
    lab.restart(f"snapshot.frozen=hold:{lab.mark}")


@pytest.mark.usefixtures("window")
class TestWhileFrozen:
    def test_something_thaws_early(self, lab: Lab) -> None:
        with lab.held_until(lab.once_frozen("fsfreeze --unfreeze /mnt")):
            record = lab.snapshot_fails()
        assert record.failure_reason is not None
        assert "2 file systems were frozen but 1 were thawed" in record.failure_reason

    def test_agent_killed_while_frozen(self, lab: Lab) -> None:
        """It comes back and knows. Only counts that agree make a snapshot, and a clean one."""
        acted = lab.once_frozen("kill -9 $(pidof qemu-ga)")
        with lab.held_until(acted), contextlib.suppress(SnapshotFailedError):
            lab.client.snapshots.create(lab.box.id, name="agent killed")
        record = lab.client.snapshots.get("agent killed")
        if record.state is SnapshotState.FAILED:
            assert record.failure_reason is not None
            assert "agent" in record.failure_reason
        else:
            assert record.consistency is SnapshotLevel.APPLICATION
            assert record.frozen_filesystems == 2
            assert not disks.needs_recovery(lab.stored.of_snapshot(record.id))

    def test_caller_who_leaves_ends_only_the_waiting(self, lab: Lab) -> None:
        with ThreadPoolExecutor(1) as pool, Client(lab.process.address, timeout=2) as hasty:
            call = pool.submit(hasty.snapshots.create, lab.box.id, name="left alone")
            with standing(lab.mark), pytest.raises(DeadlineExceededError):
                call.result()
        snapshot = lab.client.snapshots.wait_ready("left alone", timeout=60)
        assert snapshot.consistency is SnapshotLevel.APPLICATION

    def test_guest_that_powers_off(self, lab: Lab) -> None:
        lab.run("echo safe >/mnt/file && sync")
        # poweroff(8) writes a log first, and would wait for the thaw with that.
        lab.once_frozen("echo o >/proc/sysrq-trigger")
        begun = time.monotonic()
        with lab.held_until(lambda: lab.box.id not in lab.process.guests()):
            record = lab.snapshot_fails()
        # Nobody waits for the thaw of a guest that is gone.
        assert time.monotonic() - begun < THAW_SECONDS
        assert record.failure_reason is not None
        assert "The guest powered itself off." in record.failure_reason
        stopped = until(lab.client, lab.box.id, lambda box: box.state is SandboxState.STOPPED)
        assert stopped.state_reason == "The guest powered itself off."
        lab.client.sandboxes.start(lab.box.id)
        lab.run("mount -t ext4 /dev/vdb /mnt")
        assert lab.run("cat /mnt/file") == "safe"


@pytest.mark.usefixtures("hasty")
def test_agent_that_stands_still(lab: Lab) -> None:
    """Its port is open and it does not answer."""
    lab.in_background(
        "kill -STOP $(pidof qemu-ga); beat=0;"
        "while :; do beat=$((beat + 1)); echo $beat"
        " | dd of=/dev/vdc bs=512 conv=sync,notrunc oflag=direct,dsync; done"
    )

    def beat() -> int:
        return int(disks.marker(lab.stored.of_sandbox(lab.box.id, 2)) or 0)

    wait_until(lambda: beat() > 0)
    crash = lab.client.snapshots.create(lab.box.id)
    assert crash.consistency is SnapshotLevel.CRASH
    assert crash.requested_level is None
    begun = time.monotonic()
    record = lab.snapshot_fails(SnapshotLevel.APPLICATION)
    # Nothing was frozen: that a deaf agent thaws it is not waited for.
    assert time.monotonic() - begun < THAW_SECONDS
    assert record.failure_reason is not None
    assert "agent did not answer" in record.failure_reason
    before = beat()
    wait_until(lambda: beat() > before, seconds=WRITES_WITHIN)
    lab.client.sandboxes.stop(lab.box.id, force=True)
    lab.client.sandboxes.start(lab.box.id)
    lab.run("mount -t ext4 /dev/vdb /mnt")
