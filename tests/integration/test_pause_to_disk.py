"""Pause to disk: the process ends, and the guest goes on at that very instant, with the same id."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from stratabox.client import (
    CorruptError,
    GuestBootingError,
    InvalidArgumentError,
    InvalidStateError,
    MachineMismatchError,
    NoSpaceError,
    Sandbox,
    SandboxState,
    SnapshotLevel,
    StrataboxError,
    TimeoutAction,
)
from support import counting
from support.daemon import DaemonProcess, small_disk
from support.rig import Rig, eventually, rig, standing

RUNNING, PAUSED, STOPPED = SandboxState.RUNNING, SandboxState.PAUSED, SandboxState.STOPPED


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A rig with a memory snapshot, "counted", of a guest in which a process counts."""
    with rig(tmp_path_factory.mktemp("parking")) as made:
        counting.start(made.witness)
        made.witness.snapshot(name="counted", level="memory")
        yield made


@pytest.fixture
def box(counted: Rig) -> Iterator[Sandbox]:
    """A guest with two disks in which a process counts, ready since a moment."""
    counted.calm()
    victim = counted.client.snapshots.restore("counted")
    yield victim
    counted.calm()
    for snapshot in counted.client.snapshots.list(sandbox=victim.id):
        if snapshot.name != "counted":
            counted.client.snapshots.delete(snapshot.id)
    counted.client.sandboxes.delete(victim.id)


def again(rig: Rig, sandbox: Sandbox) -> Sandbox:
    """The same sandbox by a client of the daemon that runs now."""
    return rig.client.sandboxes.get(sandbox.id)


def saved(rig: Rig, sandbox: Sandbox) -> Path:
    """The RAM file of a sandbox that is paused to disk."""
    ((ram,),) = rig.process.rows(f"SELECT ram_parked FROM sandboxes WHERE id = '{sandbox.id}'")
    return rig.process.state / "ram" / f"{ram}.ram"


@contextlib.contextmanager
def edited(path: Path, edit: Callable[[bytearray], object]) -> Iterator[None]:
    """A file with other bytes, until the context ends."""
    before = path.read_bytes()
    content = bytearray(before)
    edit(content)
    path.chmod(0o600)
    path.write_bytes(content)
    yield
    path.write_bytes(before)
    path.chmod(0o400)


def catalog_of(rig: Rig) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(rig.process.state / "catalog.db"))


def flip_a_bit(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def flip_the_last_bit(content: bytearray) -> None:
    """Of a RAM file: in its tables, which every reader compares. Its data would be left to chance:
    a chunk that did not shrink is compared for `--verify` alone (docs/memory.md)."""
    content[-1] ^= 1


def test_it_goes_on_where_it_was(counted: Rig, box: Sandbox) -> None:
    pid, nonce, count = counting.now(box)
    box.execute("echo on-disk > /file && sync", timeout=60)
    sizes = []
    for _ in range(2):
        parked = box.pause(to_disk=True)
        assert (parked.id, parked.state, parked.paused_to_disk) == (box.id, PAUSED, True)
        assert parked.state_reason == "paused to disk by request"
        assert not parked.ready
        assert parked.memory_bytes > 0
        sizes.append(parked.memory_bytes)
        assert box.id not in counted.process.guests(), (
            "its process, and with it its memory, is gone"
        )
        again(counted, box).pause(to_disk=True)  # nothing more to do
        resumed = box.resume()
        assert (resumed.id, resumed.state, resumed.ready) == (box.id, RUNNING, True)
        assert (resumed.paused_to_disk, resumed.memory_bytes) == (False, 0)
        assert resumed.machine == parked.machine
        assert counting.now(box)[:2] == (pid, nonce)
        assert counting.wait_on(box)[2] > count
        # To the second below, told at some time between these two.
        begun = time.time()
        assert begun - 2 < float(box.execute("date +%s").stdout) < time.time() + 1
        assert box.execute("cat /file").stdout == b"on-disk\n"
    whole = counted.snapshot_named("counted").memory_bytes
    assert max(sizes) < whole / 2, "it stands on what it went on from, and adds to it"
    counted.check()


def test_from_memory_to_disk(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    box.pause()
    box.pause(to_disk=True)
    assert box.id not in counted.process.guests()
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)


def test_what_can_be_done_to_one_that_is_paused_to_disk(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    cold = box.snapshot(name="before", quick=True)
    box.pause(to_disk=True)
    for refused in (lambda: box.execute("true"), box.start):
        with pytest.raises(InvalidStateError, match=r"paused to disk by request.*resume it"):
            refused()
    with pytest.raises(InvalidStateError, match="resume it first"):
        box.snapshot(level="application")
    assert box.update(name="renamed").paused_to_disk
    # Its disks grow by a layer while it is away; it finds them as they were.
    assert box.snapshot(quick=True).consistency is SnapshotLevel.CRASH
    instant = box.snapshot(level="memory")
    assert instant.consistency is SnapshotLevel.MEMORY
    assert instant.memory_bytes == 0, "it stands on what is saved already"
    copy = box.clone()
    assert copy.snapshot.consistency is SnapshotLevel.MEMORY
    with copy.sandboxes[0] as cloned:
        assert counting.wait_on(cloned)[:2] == (pid, nonce)
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)
    assert box.execute("echo still > /still && sync && cat /still").stdout == b"still\n"
    counted.client.snapshots.delete(copy.snapshot.id)
    box.pause(to_disk=True)
    with counted.client.snapshots.restore(instant.id) as restored:
        assert counting.wait_on(restored)[:2] == (pid, nonce)
        assert restored.execute("test -e /still").exit_code == 1
    back = box.revert(cold.id, wait_for_ready=False).sandbox
    assert (back.state, back.paused_to_disk) == (RUNNING, False)
    counted.check()


def test_snapshots_and_saved_memory_come_and_go_by_themselves(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    counted.client.snapshots.delete("counted")  # what the guest stands on
    box.pause(to_disk=True)
    files = {saved(counted, box)}
    box.resume()
    counted.restart()
    box = again(counted, box)
    assert counting.wait_on(box)[:2] == (pid, nonce)
    box.pause(to_disk=True)
    files.add(saved(counted, box))
    counted.restart()
    box = again(counted, box)
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)
    box.snapshot(name="counted", level="memory")
    box.pause(to_disk=True)
    stopped = box.stop()
    assert stopped.state is STOPPED
    assert stopped.state_reason == "power cut: its memory, which was paused to disk, was given up"
    box.start()
    assert counting.is_gone(box)
    with counted.client.snapshots.restore("counted") as restored:
        assert counting.wait_on(restored)[:2] == (pid, nonce)
    counted.check()


def test_the_host_is_booted_again(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    box.pause(to_disk=True)
    counted.client.close()
    counted.process.stop()
    ((boot,),) = counted.process.rows("SELECT boot_id FROM store")
    for sandbox in counted.process.guests():
        counted.process.kill_guest(sandbox)
    with catalog_of(counted) as catalog:
        catalog.execute("UPDATE store SET boot_id = 'another'")
        catalog.commit()
    counted.restart()
    box = again(counted, box)
    assert (box.state, box.paused_to_disk) == (PAUSED, True)
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)
    assert counted.process.rows("SELECT boot_id FROM store") == [(boot,)]
    counted.client.sandboxes.start(counted.witness.id)
    counted.check()


def test_a_guest_that_starts_is_not_paused_to_disk(counted: Rig) -> None:
    counted.calm()
    # Held at its first instant: how soon it would have started does not matter.
    starting = counted.client.sandboxes.create(image="tiny", memory=128, paused=True)
    with pytest.raises(GuestBootingError):
        starting.pause(to_disk=True)
    stopped = starting.stop(force=True)
    with pytest.raises(InvalidStateError, match="pause to disk"):
        stopped.pause(to_disk=True)
    starting.delete()


def test_memory_that_cannot_go_on_stays_where_it_is(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    box.pause(to_disk=True)
    ram = saved(counted, box)
    for file, flip in ((ram, flip_the_last_bit), (ram.with_suffix(".state"), flip_a_bit)):
        with edited(file, flip), pytest.raises(CorruptError) as told:
            box.resume()
        assert "stays paused to disk" in told.value.message
        assert "stop it and start it" in told.value.message
        assert again(counted, box).paused_to_disk
    with catalog_of(counted) as catalog:
        ((machine,),) = catalog.execute("SELECT machine FROM sandboxes WHERE id = ?", (box.id,))
        newer = machine.replace('"qemu_version": "', '"qemu_version": "9').replace(
            '"qemu_version":"', '"qemu_version":"9'
        )
        assert newer != machine
        for text in (newer, machine):
            catalog.execute("UPDATE sandboxes SET machine = ? WHERE id = ?", (text, box.id))
            catalog.commit()
            if text == newer:
                with pytest.raises(MachineMismatchError, match="stop it and start it"):
                    box.resume()
                assert again(counted, box).paused_to_disk
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)


@pytest.mark.parametrize("point", ["park.stopped", "park.saved"])
def test_qemu_is_killed_while_it_is_paused(counted: Rig, box: Sandbox, point: str) -> None:
    pid, nonce, _ = counting.now(box)
    reached = counted.process.folder / "reached"
    counted.restart(f"{point}=hold:{reached}")
    box = again(counted, box)
    with ThreadPoolExecutor(1) as pool:
        pausing = pool.submit(box.pause, to_disk=True)
        with standing(reached):
            counted.process.kill_guest(box.id)
        error = pausing.exception()
    if point == "park.saved":  # all of it was on the disk by then
        assert error is None
        box.resume()
        assert counting.wait_on(box)[:2] == (pid, nonce)
    else:
        assert isinstance(error, StrataboxError)
        eventually(lambda: again(counted, box).state is SandboxState.FAILED)
        assert not again(counted, box).paused_to_disk
        box.start()
    counted.check()


def test_qemu_is_killed_while_it_goes_on(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    box.pause(to_disk=True)
    reached = counted.process.folder / "reached"
    counted.restart(f"boot.started=hold:{reached}")
    box = again(counted, box)
    with ThreadPoolExecutor(1) as pool:
        resuming = pool.submit(box.resume)
        with standing(reached):
            counted.process.kill_guest(box.id)
        assert isinstance(resuming.exception(), StrataboxError)
    assert again(counted, box).paused_to_disk
    counted.restart()
    box = again(counted, box)
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)
    counted.check()


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path) as process, process.start() as client:
        state = process.state
        client.images.build_tiny()
        box = client.sandboxes.create(image="tiny", memory=256)
        counting.start(box)
        pid, nonce, _ = counting.now(box)
        filler = state / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(state).free - (8 << 20))
        with pytest.raises(NoSpaceError):
            box.pause(to_disk=True)
        now = client.sandboxes.get(box.id)
        assert (now.state, now.ready, now.paused_to_disk) == (RUNNING, True, False)
        assert counting.wait_on(box)[:2] == (pid, nonce)
        assert list((state / "ram").iterdir()) == []
        # Its time is up, and it asked to be paused: as long as there is no room, in memory.
        client.sandboxes.update(box.id, expires_at=later(), on_timeout="pause")
        let_time_pass(process, box)
        eventually(lambda: client.sandboxes.get(box.id).state is PAUSED)
        now = client.sandboxes.get(box.id)
        assert not now.paused_to_disk
        assert str(now.state_reason).startswith("paused in memory: its time was up, and ")
        assert now.expires_at is not None, "there may be room at the next look"
        client.sandboxes.update(box.id, expires_at=None)  # which would pause it in between
        filler.unlink()
        box.pause(to_disk=True)
        box.resume()
        assert counting.wait_on(box)[:2] == (pid, nonce)


def later() -> datetime:
    """So late that it is not in the past when the daemon reads it, and nothing comes of itself."""
    return datetime.now(UTC) + timedelta(hours=1)


def let_time_pass(process: DaemonProcess, *sandboxes: Sandbox) -> None:
    """The time of those that have one is up, by the catalog."""
    catalog = sqlite3.connect(process.state / "catalog.db", timeout=60)
    with contextlib.closing(catalog), catalog:
        for each in sandboxes:
            catalog.execute(
                "UPDATE sandboxes SET expires_at = created_at"
                " WHERE id = ? AND expires_at IS NOT NULL",
                (each.id,),
            )


def test_its_time_is_up(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    soon = datetime.now(UTC) + timedelta(seconds=5)
    box.update(expires_at=soon, on_timeout=TimeoutAction.PAUSE)
    ends = counted.client.snapshots.restore("counted")
    ends.update(expires_at=later())
    assert (ends.on_timeout, again(counted, box).on_timeout) == (
        TimeoutAction.TERMINATE,
        TimeoutAction.PAUSE,
    )
    stopped = counted.client.snapshots.restore("counted", on_timeout="pause", expires_at=None)
    stopped.stop(force=True)
    stopped.update(expires_at=later())
    let_time_pass(counted.process, ends, stopped)
    eventually(lambda: again(counted, box).paused_to_disk)
    parked = again(counted, box)
    assert (parked.expires_at, parked.state_reason) == (None, "paused to disk: its time was up")
    eventually(lambda: again(counted, ends).state is SandboxState.TERMINATED)
    eventually(lambda: again(counted, stopped).expires_at is None)
    stopped = again(counted, stopped)
    assert stopped.state is STOPPED
    assert "its time was up: nothing to pause" in str(stopped.state_reason)
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)
    for each in (ends, stopped):
        each.delete()
    counted.check()


def test_a_slow_one_holds_up_nobody(counted: Rig, box: Sandbox) -> None:
    slow = counted.client.snapshots.restore("counted", on_timeout="pause")
    # It agrees to shut down and does not, so that its stop takes all the time that it is given.
    line = (
        "printf '#!/bin/sh\\ntouch /tmp/asked\\n' > /tmp/no; chmod +x /tmp/no;"
        " mount -o bind /tmp/no /sbin/shutdown"
    )
    assert slow.execute(line, timeout=60).exit_code == 0
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(slow.stop, timeout=300)
        eventually(lambda: slow.execute("test -e /tmp/asked").exit_code == 0)
        for each in (slow, box):
            each.update(expires_at=later(), on_timeout="pause")
        let_time_pass(counted.process, slow, box)
        eventually(lambda: again(counted, box).paused_to_disk)
        assert not stopping.done()
        assert again(counted, slow).state is RUNNING
        again(counted, slow).stop(force=True)  # has the other one wait no longer
        assert stopping.result().state_reason == "power cut: the guest did not shut down in time"
    eventually(lambda: again(counted, slow).expires_at is None)
    assert again(counted, slow).state is STOPPED
    slow.delete()


def test_its_time_is_up_while_no_daemon_runs(counted: Rig, box: Sandbox) -> None:
    pid, nonce, _ = counting.now(box)
    with pytest.raises(InvalidArgumentError):
        box.update(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    box.update(expires_at=later(), on_timeout="pause")
    spared = counted.client.snapshots.restore("counted", expires_at=later())
    spared.update(expires_at=None)
    assert again(counted, spared).expires_at is None
    counted.client.close()
    counted.process.stop()
    let_time_pass(counted.process, box, spared)
    counted.restart()
    eventually(lambda: again(counted, box).paused_to_disk)
    assert again(counted, spared).state is RUNNING
    box = again(counted, box)
    box.resume()
    assert counting.wait_on(box)[:2] == (pid, nonce)
    again(counted, spared).delete()


def test_one_that_starts_is_paused_once_it_has_answered(counted: Rig) -> None:
    counted.calm()
    starting = counted.client.sandboxes.create(
        image="tiny", memory=128, wait_for_ready=False, expires_at=later(), on_timeout="pause"
    )
    let_time_pass(counted.process, starting)
    eventually(lambda: again(counted, starting).paused_to_disk)
    assert starting.resume().ready
    starting.delete()
