"""A host's disk that is really full: guests stop and go on, the daemon serves, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    AgentUnavailableError,
    Job,
    JobState,
    NoSpaceError,
    Sandbox,
    SandboxRecord,
    SandboxState,
    SnapshotState,
    StrataboxError,
)
from support import disks
from support.agents import soon
from support.daemon import DaemonProcess, small_disk
from support.rig import eventually, wait_idle
from support.stored import Stored, to_raw
from support.waiting import until

KIB, MIB = 1 << 10, 1 << 20
FULL = "disk is full"
FREE: tuple[int, ...] = (0, 2000, 90_000)
"""KiB."""
if "STRATABOX_SOAK_SEED" in os.environ:
    FREE = (0, 8, 64, 200, 400, 800, 2000, 4000, 8000, 16_000, 24_000, 40_000, 90_000)
REASONS = {"NO_SPACE", "STORE_NEARLY_FULL", "SNAPSHOT_UNSETTLED"}
STOPPED = {"AGENT_UNAVAILABLE", "FREEZE_FAILED"}
"""Of a guest that a full disk has stopped in a freeze; it is thawed when it goes on."""


class Small:
    """A daemon on a small file system, and a file that fills it."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client = process.start()
        self.client.images.build_tiny()
        self._filler = process.state / "filler"

    def leave(self, free: int) -> None:
        """Fill the disk until so many bytes are free, or less: the daemon writes meanwhile, too."""
        if shutil.disk_usage(self.process.state).free < free:
            self.empty()
        while (size := shutil.disk_usage(self.process.state).free - free) > 0:
            with contextlib.suppress(OSError), self._filler.open("ab") as file:
                os.posix_fallocate(file.fileno(), self._filler.stat().st_size, size)

    def fill(self) -> None:
        """Leave nothing, not even what is left over of a page."""
        self.leave(0)
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def again(self) -> None:
        """Another daemon, after a crash of this one."""
        self.client.close()
        self.process.kill()
        self.client = self.process.start()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with small_disk(tmp_path) as process:
        made = Small(process)
        yield made
        made.client.close()


def is_stopped(record: SandboxRecord) -> bool:
    return record.state is SandboxState.PAUSED and FULL in str(record.state_reason)


def runs(record: SandboxRecord) -> bool:
    return record.state is SandboxState.RUNNING


def write_much(box: Sandbox) -> None:
    """More than there is room for, in the background; `result` says how that went."""
    line = (
        "setsid sh -c 'rm -f /run/done; yes stratabox | head -c 16000000 |"
        " dd of=/dev/vdb bs=1M conv=fsync 2>/run/told; echo $? > /run/done'"
        " >/dev/null 2>&1 </dev/null &"
    )
    assert box.execute(line, timeout=60).exit_code == 0


def result(box: Sandbox) -> tuple[bytes, bytes]:
    """Exit code, and SHA-256 of what was written."""
    line = "until [ -s /run/done ]; do sleep 0.1; done; cat /run/done"
    code = box.execute(line, timeout=120).stdout
    return code, box.execute("head -c 16000000 /dev/vdb | sha256sum", timeout=120).stdout


def writes(small: Small, box: Sandbox) -> bool:
    """Whether it writes. One that was stopped in the last moment with no room goes on first."""
    while True:
        until(small.client, box.id, runs)
        try:
            return small.client.sandboxes.execute(box.id, "sync; echo x > /x").exit_code == 0
        except AgentUnavailableError:
            if not is_stopped(small.client.sandboxes.get(box.id)):
                raise


def test_a_guest_goes_on_by_itself_once_there_is_room(small: Small) -> None:
    box = small.client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
    expected = box.execute("yes stratabox | head -c 16000000 | sha256sum", timeout=120).stdout
    small.leave(4 * MIB)
    write_much(box)
    small.process.kill()
    folder = small.process.state / "sandboxes" / box.id
    eventually(lambda: disks.status(folder) == "io-error")
    # A daemon that did not see it knows why, too, and does not try while there is no room.
    small.again()
    assert is_stopped(small.client.sandboxes.get(box.id))
    assert disks.status(folder) == "io-error"
    # Whoever pauses it keeps it paused.
    paused = small.client.sandboxes.pause(box.id)
    assert FULL not in str(paused.state_reason)
    small.empty()
    other = small.client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
    assert small.client.sandboxes.get(box.id).state is SandboxState.PAUSED
    other.delete()
    # Resumed while it is full again, it is stopped again; with room it goes on.
    small.leave(1 * MIB)
    small.client.sandboxes.resume(box.id)
    until(small.client, box.id, is_stopped)
    small.empty()
    until(small.client, box.id, runs)
    now = small.client.sandboxes.get(box.id)
    assert not now.state_reason
    assert result(now) == (b"0\n", expected)
    small.process.check_consistent()
    assert small.client.check().findings == ()


def test_what_guests_did_by_themselves_is_written_down_once_there_is_room(small: Small) -> None:
    """Also when even the reserve was used up before."""
    names = ("off", "panics", "writes")
    off, panics, writer = (
        small.client.sandboxes.create(image="tiny", memory=128, name=name, data_disks=[1])
        for name in names
    )
    expected = writer.execute("yes stratabox | head -c 16000000 | sha256sum", timeout=120).stdout
    panics.execute(
        "while ! [ -e /sys/bus/pci/drivers/pvpanic-pci ]; do usleep 50000; done", timeout=300
    ).check()
    for each in (off, panics, writer):
        # What they have yet to write to their own disks would stop them first.
        each.execute(
            "echo u >/proc/sysrq-trigger; until grep -q ' / [^ ]* ro' /proc/mounts; do"
            " usleep 50000; done; sync",
            timeout=120,
        ).check()
    eventually(lambda: (small.process.state / "reserve").exists())
    (small.process.state / "reserve").unlink()
    small.fill()
    with contextlib.suppress(AgentUnavailableError):  # it may stand still before it can answer
        write_much(writer)
    soon(off, "poweroff -f")
    soon(panics, "echo c >/proc/sysrq-trigger")
    happened = f"that {writer.id} was stopped", f"the end of {off.id}", f"the end of {panics.id}"
    waiting = {f"{what} waits until the catalog can be written" for what in happened}
    eventually(lambda: all(line in small.process.log.read_text() for line in waiting))
    small.empty()
    until(small.client, off.id, lambda record: record.state is SandboxState.STOPPED)
    assert "powered itself off" in str(small.client.sandboxes.get(off.id).state_reason)
    until(small.client, panics.id, lambda record: record.state is SandboxState.FAILED)
    assert "sysrq" in str(small.client.sandboxes.get(panics.id).state_reason).lower()
    # It was stopped, and goes on by itself as all do.
    eventually(lambda: disks.status(small.process.state / "sandboxes" / writer.id) == "running")
    until(small.client, writer.id, runs)
    assert result(writer) == (b"0\n", expected)
    small.process.check_consistent()
    assert small.client.check().findings == ()
    assert off.start().ready


def test_the_daemon_starts_and_serves_on_a_full_disk(small: Small) -> None:
    box = small.client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
    snapshot = box.snapshot()
    assert box.execute("head -c 8000000 /dev/urandom > /big; sync", timeout=60).exit_code == 0
    newer = box.snapshot()
    eventually(lambda: (small.process.state / "reserve").stat().st_size > 0)
    small.fill()
    small.again()
    small.again()
    assert [each.id for each in small.client.snapshots.list()] == [newer.id, snapshot.id]
    assert small.client.sandboxes.get(box.id).execute("echo hello").stdout == b"hello\n"
    for each in (newer, snapshot):
        small.client.snapshots.delete(each.id)
    small.client.sandboxes.get(box.id).delete()
    small.empty()
    small.process.check_consistent()
    assert small.client.sandboxes.create(image="tiny", memory=128).ready


def operations(small: Small, box: Sandbox) -> dict[str, Callable[[], object]]:
    """Everything that writes to the store."""
    client = small.client
    return {
        "crash": lambda: client.snapshots.create(box.id, level="crash"),
        "application": lambda: client.snapshots.create(box.id, level="application"),
        "memory": lambda: client.snapshots.create(box.id, level="memory"),
        "clone": lambda: client.sandboxes.clone(box.id, wait_for_ready=False),
        "create": lambda: client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False),
        "image": lambda: client.images.build_tiny(name="another"),
        "pause to disk": lambda: client.sandboxes.pause(box.id, to_disk=True),
    }


def clear(small: Small, box: Sandbox) -> None:
    client = small.client
    for sandbox in client.sandboxes.list():
        if sandbox.id != box.id:
            client.sandboxes.delete(sandbox.id)
    for snapshot in client.snapshots.list():
        assert snapshot.state is SnapshotState.READY or snapshot.failure_reason
        client.snapshots.delete(snapshot.id)
    for image in client.images.list():
        if image.name != "tiny":
            client.images.delete(image.id)


def test_no_room_at_any_write_of_any_operation(small: Small) -> None:
    """With ever more room each operation fails one write later, until it succeeds."""
    box = small.client.sandboxes.create(image="tiny", memory=128)
    done: set[str] = set()
    for free in FREE:
        for name in operations(small, box):
            small.leave(free * KIB)
            call = operations(small, box)[name]
            try:
                call()
                done.add(name)
            except StrataboxError as error:
                if not {error.reason, error.metadata.get("cause")} & (REASONS | STOPPED):
                    pytest.fail(f"{name} with {free} KiB free: {error!r}")
            small.empty()
            until(small.client, box.id, lambda record: runs(record) or bool(record.paused_to_disk))
            if small.client.sandboxes.get(box.id).paused_to_disk:
                small.client.sandboxes.resume(box.id)
                small.client.sandboxes.wait_ready(box.id, timeout=60)
            assert writes(small, box)
            # What was taken and could not be written down is, by itself.
            eventually(lambda: small.process.rows("SELECT id FROM operations") == [])
            small.process.check_consistent()
            clear(small, box)
    assert done == set(operations(small, box))
    checked = small.client.check(deep=True)
    assert (checked.findings, checked.quarantined_files) == ((), 0)


def fill_with_noise(box: Sandbox, at: int) -> None:
    """Put 6 MB on the second disk that no other place has."""
    line = f"dd if=/dev/urandom of=/dev/vdb bs=1M count=6 seek={at} conv=notrunc,fsync"
    box.execute(line, timeout=120).check()


def overwrite(box: Sandbox) -> None:
    """Write where there is room already, once something was written there since the snapshot."""
    box.execute("dd if=/dev/urandom of=/dev/vdb bs=64k count=1 conv=notrunc,fsync").check()


def content(small: Small, snapshot: str) -> str:
    """SHA-256 of a snapshot's second disk, as qemu-img reads it through its chain."""
    raw = small.process.folder / "content.raw"
    to_raw(Stored(small.process).of_snapshot(snapshot, 1), raw)
    try:
        return disks.digest(raw)
    finally:
        raw.unlink()


def test_a_merge_waits_for_room_and_its_guest_runs_on(small: Small) -> None:
    box = small.client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
    fill_with_noise(box, 0)
    first = box.snapshot(level="crash")
    fill_with_noise(box, 3)
    kept = box.snapshot(level="crash")
    expected = content(small, kept.id)
    # So slow that the disk fills in the middle of it.
    small.process.environment["STRATABOX_JOBS_RATE"] = "2MiB"
    small.again()
    client = small.client
    box = client.sandboxes.get(box.id)
    overwrite(box)
    # What is left to fill then takes no time: it must be done before the merge is.
    small.leave(64 * MIB)
    client.snapshots.delete(first.id)
    merging: list[Job] = []

    def is_amid_it() -> bool:
        """In the second disk's merge: the first one's is soon done."""
        merging[:] = [
            job for job in client.jobs.list() if 0 < job.done_bytes < job.total_bytes > 6 * MIB
        ]
        return bool(merging)

    eventually(is_amid_it)
    small.fill()
    (job,) = merging

    def waits() -> bool:
        now = client.jobs.get(job.id)
        return (now.state, str(now.reason).partition(":")[0]) == (JobState.QUEUED, "NO_SPACE")

    eventually(waits)
    # What it had written is gone, what was to be merged is not, and the guest does not notice.
    small.process.check_consistent()
    assert content(small, kept.id) == expected
    overwrite(box)
    assert runs(client.sandboxes.get(box.id))
    # With room it is done after the next change, as if nothing had been.
    small.empty()
    last = box.snapshot(level="crash")
    eventually(lambda: client.jobs.get(job.id).state is JobState.DONE)
    assert content(small, kept.id) == expected
    with client.snapshots.restore(last.id, memory=128) as copy:
        line = "dd if=/dev/vdb bs=1M count=9 2>/dev/null | sha256sum"
        assert copy.execute(line).check().stdout == box.execute(line).check().stdout
    small.process.check_consistent()
    assert client.check(deep=True).findings == ()


def test_an_import_ends_typed_and_the_guest_beside_it_runs_on(small: Small) -> None:
    client = small.client
    box = client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
    fill_with_noise(box, 0)
    made = box.snapshot(level="crash", name="travels")
    expected = content(small, made.id)
    archive = small.process.folder / "travels.sbx"
    client.snapshots.export(made.id, archive)
    # What it holds is not here any more: all of it has to come.
    fill_with_noise(box, 0)
    client.snapshots.delete(made.id)
    overwrite(box)
    wait_idle(small.process)
    small.process.check_consistent()
    before = (small.process.layers(), client.snapshots.list())
    full = threading.Event()

    def fill(done: int, total: int) -> None:
        if done > total // 2 and not full.is_set():
            small.fill()
            full.set()

    with pytest.raises(NoSpaceError) as raised:
        client.snapshots.import_file(archive, progress=fill)
    assert full.wait(60)  # gRPC reads the file in a thread of its own
    assert raised.value.reason in REASONS
    # The disk is full still.
    overwrite(box)
    assert runs(client.sandboxes.get(box.id))
    small.process.check_consistent()
    assert (small.process.layers(), client.snapshots.list()) == before
    small.empty()
    assert writes(small, box)
    came = client.snapshots.import_file(archive).snapshot
    assert came.state is SnapshotState.READY
    assert content(small, came.id) == expected
    small.process.check_consistent()
    assert client.check(deep=True).findings == ()
