"""Memory snapshots through the API: a restore goes on at the very instant that was frozen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from stratabox.client import (
    AgentUnavailableError,
    Client,
    GuestBootingError,
    Image,
    InvalidStateError,
    PageTracking,
    ResourcesFixedError,
    Sandbox,
    SandboxState,
    SnapshotLevel,
    SnapshotState,
)
from support import counting as counter
from support.daemon import DaemonProcess
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]


@pytest.fixture
def counting(box: Sandbox, sh: Shell) -> Sandbox:
    """A guest in which a process counts, with a nonce that only its memory holds."""
    counter.start(box)
    return box


def now(sh: Shell, sandbox: Sandbox) -> tuple[str, str, int]:
    """(pid, nonce, count) of the counting process."""
    pid, nonce, count = sh(sandbox, "cat /mnt/test/now").split()
    return pid, nonce, int(count)


def advances(sh: Shell, sandbox: Sandbox) -> bool:
    before = now(sh, sandbox)[2]
    sh(sandbox, f"while read -r pid nonce n < /mnt/test/now && [ $n -le {before} ]; do :; done")
    return now(sh, sandbox)[2] > before


def is_forgotten(sandbox: Sandbox) -> bool:
    """A guest that reboots is up again, without what was in its memory."""
    with contextlib.suppress(AgentUnavailableError):
        # One that is ended as the guest goes down has no exit code.
        return sandbox.execute("test -e /mnt/test/now").exit_code == 1
    return False


@pytest.fixture
def deleted_after(client: Client) -> Iterator[None]:
    """Snapshots that a test leaves are deleted."""
    yield
    for snapshot in client.snapshots.list():
        client.snapshots.delete(snapshot.id)


@pytest.mark.usefixtures("deleted_after")
def test_a_restore_continues_the_instant(client: Client, counting: Sandbox, sh: Shell) -> None:
    pid, nonce, count = now(sh, counting)
    snapshot = counting.snapshot(name="instant", level="memory")
    assert snapshot.consistency is SnapshotLevel.MEMORY
    assert snapshot.memory_bytes > 1 << 20
    assert snapshot.pause_ms
    assert snapshot.page_tracking is not PageTracking.UNKNOWN
    assert advances(sh, counting)  # the source keeps running
    with client.snapshots.restore(snapshot.id, name="goes-on") as restored:
        assert restored.state is SandboxState.RUNNING
        their_pid, their_nonce, their_count = now(sh, restored)
        assert (their_pid, their_nonce) == (pid, nonce)
        assert their_count >= count
        assert advances(sh, restored)
        # Its clock is the host's again, though it woke up at the instant of the snapshot.
        # To the second below, told at some time between these two.
        begun = time.time()
        assert begun - 2 < float(sh(restored, "date +%s")) < time.time() + 1
        # The second generation, and a reboot in it.
        again = restored.snapshot(level="memory")
        with client.snapshots.restore(again.id) as grandchild:
            assert now(sh, grandchild)[:2] == (pid, nonce)
            with contextlib.suppress(AgentUnavailableError):
                grandchild.execute("reboot", timeout=60)
            eventually(lambda: is_forgotten(grandchild))
    with client.snapshots.restore(snapshot.id, cold=True) as cold:
        assert cold.execute("test -e /mnt/test/now").exit_code != 0


@pytest.mark.usefixtures("deleted_after")
def test_each_snapshot_costs_its_own_pages(client: Client, counting: Sandbox, sh: Shell) -> None:
    # Its channel is set up after it is ready, and writes some MB of its RAM.
    sh(counting, "until [ -e /run/stratabox/pid ]; do sleep 0.1; done")
    sh(counting, "head -c 25165824 /dev/urandom > /run/ballast")
    first = counting.snapshot(level="memory")
    sizes = []
    for number in range(3):
        sh(counting, f"head -c 8388608 /dev/urandom > /mnt/test/blob{number}")
        snapshot = counting.snapshot(level="memory")
        assert snapshot.parent_snapshot_id
        sizes.append(snapshot.memory_bytes)
    if first.page_tracking is not PageTracking.NONE:
        assert max(sizes) < first.memory_bytes / 2
        assert max(sizes) < 24 << 20
    # Deleting those in the middle leaves the last one whole.
    pid, nonce, _ = now(sh, counting)
    chain = client.snapshots.list(sandbox=counting.id)
    last = chain[0]
    for snapshot in chain[1:]:
        client.snapshots.delete(snapshot.id)
    sh(counting, "rm /run/ballast")
    digest = sh(counting, "cat /mnt/test/blob* | sha256sum")
    with client.snapshots.restore(last.id) as restored:
        assert now(sh, restored)[:2] == (pid, nonce)
        assert sh(restored, "cat /mnt/test/blob* | sha256sum") == digest


@pytest.mark.usefixtures("deleted_after")
def test_clones_of_a_running_guest_go_on(counting: Sandbox, sh: Shell) -> None:
    pid, nonce, _ = now(sh, counting)
    clones = counting.clone(count=3)
    assert clones.snapshot.consistency is SnapshotLevel.MEMORY
    for copy in clones.sandboxes:
        assert now(sh, copy)[:2] == (pid, nonce)
        sh(copy, f"echo {copy.id} > /mine")
    assert {sh(copy, "cat /mine") for copy in clones.sandboxes} == {
        copy.id for copy in clones.sandboxes
    }
    random = {sh(copy, "head -c 16 /dev/urandom | sha256sum") for copy in clones.sandboxes}
    assert len(random) == 3
    for copy in clones.sandboxes:
        copy.delete()


@pytest.mark.usefixtures("deleted_after")
def test_revert_goes_back_to_the_instant(counting: Sandbox, sh: Shell) -> None:
    pid, nonce, _ = now(sh, counting)
    snapshot = counting.snapshot(level="memory")
    sh(counting, "kill $(cut -d ' ' -f 1 /mnt/test/now); rm /mnt/test/now")
    back = counting.revert(snapshot.id).sandbox
    assert back.id == counting.id
    assert now(sh, back)[:2] == (pid, nonce)
    assert advances(sh, back)


@pytest.mark.usefixtures("deleted_after")
def test_the_size_is_the_snapshot_s(client: Client, box: Sandbox) -> None:
    snapshot = box.snapshot(level="memory")
    with pytest.raises(ResourcesFixedError, match="cold"):
        client.snapshots.restore(snapshot.id, cpus=2)
    with client.snapshots.restore(snapshot.id, cpus=2, cold=True) as cold:
        assert cold.cpus == 2


def test_a_guest_that_starts_or_stands_still(client: Client, tiny: Image) -> None:
    # Held at its first instant: how soon it would have started does not matter.
    with client.sandboxes.create(image=tiny.id, memory=256, paused=True) as box:
        with pytest.raises(GuestBootingError):
            box.snapshot(level="memory")
        box.resume()
        box.wait_ready()
        box.pause()
        paused = box.snapshot(level="memory")
        assert paused.consistency is SnapshotLevel.MEMORY
        assert box.refresh().state is SandboxState.PAUSED
        with client.snapshots.restore(paused.id) as restored:
            assert restored.state is SandboxState.RUNNING
        client.snapshots.delete(paused.id)
        box.resume()
        box.stop()
        with pytest.raises(InvalidStateError):
            box.snapshot(level="memory")


def test_a_daemon_that_was_killed_goes_on_with_it(own_daemon: DaemonProcess) -> None:
    client = own_daemon.start()
    client.images.build_tiny()
    box = client.sandboxes.create(image="tiny", memory=256)
    box.execute("echo here > /run/kept")
    first = box.snapshot(level="memory")
    client.close()
    own_daemon.kill()
    client = own_daemon.start()
    again = client.sandboxes.get(box.id)
    second = again.snapshot(level="memory")
    assert second.state is SnapshotState.READY
    for snapshot in (first, second):
        restored = client.snapshots.restore(snapshot.id)
        assert restored.execute("cat /run/kept").stdout == b"here\n"
        restored.delete()
    again.delete()
    for snapshot in (first, second):
        client.snapshots.delete(snapshot.id)
    own_daemon.check_consistent()  # waits for what is merged in the background
    assert list((own_daemon.state / "ram").iterdir()) == []
    own_daemon.stop()
    client.close()
