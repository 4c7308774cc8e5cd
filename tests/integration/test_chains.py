"""Chains stay short while guests run on them: nothing is lost, no sealed file is written."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    CompactFailedError,
    InvalidStateError,
    Job,
    JobKind,
    JobNotFoundError,
    JobState,
    Snapshot,
)
from support import disks
from support.daemon import DaemonProcess, daemon
from support.rig import eventually, standing
from support.stored import Stored

BLOCK = 64 << 10
SLOTS = 24


class Written:
    """A guest that writes blocks, each with a number of its own, and what every snapshot holds."""

    def __init__(self, process: DaemonProcess, client: Client) -> None:
        self.process, self.client, self.stored = process, client, Stored(process)
        self.box = client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
        self.now = [0] * SLOTS
        self.snapshots: dict[str, list[int]] = {}
        self._number = 0

    def write(self, *slots: int) -> None:
        """Put something new into some blocks of the second disk."""
        lines = []
        for slot in slots:
            self._number += 1
            self.now[slot] = self._number
            lines.append(
                f"echo {self._number} | dd of=/dev/vdb bs={BLOCK} seek={slot} conv=sync,notrunc"
            )
        result = self.box.execute(" && ".join(lines) + " && sync")
        assert result.exit_code == 0, result

    def snapshot(self, *, quick: bool | None = True, level: str | None = None) -> Snapshot:
        made = self.box.snapshot(quick=quick, level=level)
        self.snapshots[made.id] = list(self.now)
        return made

    def delete(self, snapshot: str) -> None:
        self.client.snapshots.delete(snapshot)
        del self.snapshots[snapshot]

    def restart(self, failpoints: str = "", **environment: str) -> None:
        """End the daemon in good order, if it runs, and start it again."""
        self.client.close()
        if self.process.runs:
            self.process.stop()
        self.client = self.process.start(failpoints=failpoints, environment=environment)
        self.box = self.client.sandboxes.get(self.box.id)

    def jobs(self, *states: str) -> int:
        """Jobs in these states."""
        named = ", ".join(repr(state) for state in states)
        ((count,),) = self.process.rows(f"SELECT count(*) FROM jobs WHERE state IN ({named})")
        assert isinstance(count, int)
        return count

    def drain(self) -> None:
        """Wait until there is nothing to do any more."""

        def idle() -> bool:
            ((hints,),) = self.process.rows("SELECT count(*) FROM chain_hints")
            return hints == 0 and not self.jobs("queued", "running")

        eventually(idle, 60)

    def quieten(self) -> None:
        """Wait until nothing of before has the daemon look for jobs: it does 1 s after a change."""
        self.drain()
        time.sleep(2)

    def depths(self) -> dict[str, int]:
        """Layers in the chain of each record's disk."""
        rows = self.process.rows("SELECT layer FROM disks UNION SELECT layer FROM snapshot_disks")
        folder = self.process.state / "layers"
        return {str(layer): len(disks.chain(folder / f"{layer}.qcow2")) for (layer,) in rows}

    def held(self, layer: Path) -> list[int]:
        """The numbers that a disk holds, as qemu-img reads it."""
        data = disks.read(layer, size=SLOTS * BLOCK)
        words = [data[at : at + BLOCK].partition(b"\n")[0] for at in range(0, len(data), BLOCK)]
        return [int(word.rstrip(b"\0") or b"0") for word in words]

    def check(self) -> None:
        """Every snapshot, and the running guest, holds what was written."""
        for snapshot, expected in self.snapshots.items():
            assert self.held(self.stored.of_snapshot(snapshot, 1)) == expected, snapshot
        line = f"dd if=/dev/vdb bs={BLOCK} count={SLOTS} iflag=direct | tr -d '\\000'"
        found = self.box.execute(line).stdout.split()
        assert [int(number) for number in found] == [number for number in self.now if number]

    def chains(self) -> set[str]:
        """Names of the layers that the guest's disks stand on."""
        tops = (self.stored.of_sandbox(self.box.id, index) for index in (0, 1))
        return {path.name for top in tops for path in disks.chain(top)}

    def open_layers(self) -> set[str]:
        """Layers that the guest's QEMU has open, also those that are gone."""
        folder = Path(f"/proc/{self.process.guests()[self.box.id]}/fd")
        links = {str(link.readlink()) for link in folder.iterdir()}
        return {link for link in links if ".qcow2" in link}


MAX_DEPTH = 5


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """One guest for all of it, which lives through many ends of its daemon."""
    environment = {"STRATABOX_CHAINS_MAX_DEPTH": str(MAX_DEPTH)}
    with daemon(tmp_path_factory.mktemp("chains"), environment) as process:
        client = process.start()
        client.images.build_tiny()
        made = Written(process, client)
        yield made
        made.client.close()


@pytest.fixture
def written(guest: Written) -> Written:
    """The guest, with an ordinary daemon and no snapshot."""
    guest.restart()
    for snapshot in list(guest.snapshots):
        guest.delete(snapshot)
    guest.drain()
    return guest


def test_many_snapshots_and_deletes(written: Written) -> None:
    choose = random.Random(4)
    seals: dict[str, str] = {}
    for _ in range(12):
        written.write(*choose.sample(range(SLOTS), 3))
        written.snapshot()
        found = written.stored.sealed()
        assert all(found.get(name, seal) == seal for name, seal in seals.items())
        seals |= found
    written.drain()
    assert max(written.depths().values()) <= MAX_DEPTH
    written.check()
    for snapshot in choose.sample(sorted(written.snapshots), 8):
        written.delete(snapshot)
    written.drain()
    written.check()
    assert max(written.depths().values()) <= MAX_DEPTH
    found = written.stored.sealed()
    assert all(found.get(name, seal) == seal for name, seal in seals.items())
    assert written.stored.unneeded() == set()
    # The guest's QEMU has just what its chains have, and nothing that is gone.
    eventually(lambda: {Path(name).name for name in written.open_layers()} == written.chains())
    with written.client.snapshots.restore(min(written.snapshots), memory=128) as copy:
        assert copy.execute("true").exit_code == 0


def test_what_a_copy_makes_due_waits_for_nothing_else(written: Written) -> None:
    """As deep as chains may be, with nothing on top, is not too deep; a copy goes on top."""
    written.restart(STRATABOX_CHAINS_MAX_DEPTH=str(2 * MAX_DEPTH))
    with written.client.sandboxes.create(image="tiny", memory=128) as box:
        made = [box.snapshot(quick=True) for _ in range(MAX_DEPTH - 1)]
    written.drain()
    top = written.stored.of_snapshot(made[-1].id, 0)
    assert len(disks.chain(top)) == MAX_DEPTH
    written.restart()
    written.quieten()
    assert written.stored.of_snapshot(made[-1].id, 0) == top
    with written.client.snapshots.restore(made[-1].id, wait_for_ready=False):
        written.drain()
        assert max(written.depths().values()) <= MAX_DEPTH
    for each in made:
        written.client.snapshots.delete(each.id)


def test_volumes_chains_stay_short_by_themselves(written: Written) -> None:
    volume = written.client.volumes.create("deep", size_bytes=64 << 20)
    written.quieten()
    made = [written.client.volumes.snapshot(volume.id) for _ in range(MAX_DEPTH + 1)]
    written.drain()
    ((layer,),) = written.process.rows("SELECT layer FROM volumes")
    top = written.process.state / "layers" / f"{layer}.qcow2"
    assert len(disks.chain(top)) <= MAX_DEPTH
    for each in made:
        written.client.volumes.delete_snapshot(each.id)
    written.client.volumes.delete(volume.id)


class TestJobs:
    """What can be done with a job while it runs, and what goes on beside it."""

    def test_pause_resume_cancel_and_snapshots_meanwhile(self, written: Written) -> None:
        written.write(*range(SLOTS))
        first = written.snapshot()
        written.write(*range(SLOTS))
        # So much that it is copied in several portions.
        written.box.execute("head -c 4194304 /dev/urandom >/random; sync").check()
        written.snapshot()
        written.drain()  # what they stand on is merged into the first one: not the job meant
        mark = written.process.folder / "standing"
        written.restart(f"jobs.target-made=hold:{mark}")
        # Merging what the first one leaves begins, and stands still; nobody waits for it.
        written.delete(first.id)
        client = written.client
        with standing(mark):
            (job,) = [one for one in client.jobs.list() if one.state is JobState.RUNNING]
            assert job.kind is JobKind.MERGE
            assert job.sandbox_ids == (written.box.id,)
            assert set(written.snapshots) <= set(job.snapshot_ids)
            held = client.jobs.pause(job.id[:8])
            assert held.state is JobState.PAUSED
        # It stops where it sees that: behind its first portion.
        eventually(lambda: client.jobs.get(job.id).done_bytes > 0)
        copied = client.jobs.get(job.id).done_bytes
        assert 0 < copied < job.total_bytes
        # A snapshot is taken and restored as ever, on what the job works on.
        written.write(1, 2)
        made = written.snapshot()
        with client.snapshots.restore(made.id, memory=128) as copy:
            assert copy.execute("true").exit_code == 0
        assert client.jobs.get(job.id).done_bytes == copied
        assert client.jobs.resume(job.id).state in (JobState.QUEUED, JobState.RUNNING)
        eventually(lambda: client.jobs.get(job.id).state is JobState.DONE)
        done = client.jobs.get(job.id)
        assert done.done_bytes == done.total_bytes
        assert done.ended_at is not None
        for act in (client.jobs.pause, client.jobs.resume, client.jobs.cancel):
            with pytest.raises(InvalidStateError):
                act(job.id)
        written.drain()
        written.check()
        # The next merge is given up: nothing is left of it, nor is it tried again.
        written.restart(f"jobs.target-made=hold:{mark}")
        client = written.client
        written.delete(made.id)
        written.write(3)
        last = written.snapshot()
        assert last
        with standing(mark):
            (job,) = [one for one in client.jobs.list() if one.state is JobState.RUNNING]
            ((target,),) = written.process.rows(f"SELECT target FROM jobs WHERE id = '{job.id}'")
            assert f"{target}.qcow2" in written.process.layers()
            assert client.jobs.cancel(job.id).state is JobState.CANCELLED
            assert client.jobs.cancel(job.id).state is JobState.CANCELLED
        written.drain()
        assert f"{target}.qcow2" not in written.process.layers()
        written.process.check_consistent()
        written.check()

    def test_unknown_jobs(self, written: Written) -> None:
        with pytest.raises(JobNotFoundError):
            written.client.jobs.get("12345678")


def test_a_snapshot_is_compressed_and_its_guest_goes_over(written: Written) -> None:
    assert (
        written.box.execute(
            "yes stratabox | dd of=/dev/vdb bs=64k count=128 seek=64 iflag=fullblock; sync"
        ).exit_code
        == 0
    )
    written.write(*range(SLOTS))
    made = written.snapshot()
    before = written.stored.of_snapshot(made.id, 1)
    result = written.client.snapshots.compact(made.id)
    assert [(job.kind, job.state) for job in result.jobs] == [(JobKind.COMPACT, JobState.DONE)] * 2
    assert result.snapshot.layer_bytes < made.layer_bytes // 2
    assert result.snapshot.compressed_bytes == result.snapshot.layer_bytes
    assert result.snapshot.generation > made.generation
    after = written.stored.of_snapshot(made.id, 1)
    assert after != before
    eventually(lambda: not before.exists())
    eventually(lambda: str(before) not in " ".join(written.open_layers()))
    written.drain()  # what a merge takes away meanwhile cannot be read
    written.check()
    assert written.client.snapshots.compact(made.id).jobs == ()
    # What is compressed stays so when it is merged.
    written.write(5)
    top = written.snapshot()
    written.delete(made.id)
    written.drain()
    written.check()
    merged = written.client.snapshots.get(top.id)
    assert merged.layer_bytes < made.layer_bytes // 2
    assert merged.compressed_bytes == 0  # not all of it is
    with written.client.snapshots.restore(top.id, memory=128) as copy:
        line = "dd if=/dev/vdb bs=64k skip=64 count=128 | md5sum"
        assert copy.execute(line).stdout == written.box.execute(line).stdout
    again = written.client.snapshots.compact(top.id)
    assert len(again.jobs) == 2
    assert 0 < again.snapshot.compressed_bytes == again.snapshot.layer_bytes < merged.layer_bytes
    written.drain()
    written.check()


def test_a_paused_guest_and_a_parked_one(written: Written) -> None:
    written.write(*range(SLOTS))
    first = written.snapshot()
    written.write(1)
    written.snapshot()
    gone = str(written.stored.of_snapshot(first.id, 1))
    written.box.pause()
    written.delete(first.id)
    written.drain()
    written.box.resume()
    eventually(lambda: gone not in " ".join(written.open_layers()))
    written.check()
    second = written.snapshot()
    written.write(2)
    written.snapshot()
    written.box.pause(to_disk=True)
    written.delete(second.id)
    written.drain()
    written.box.resume()
    written.check()


def test_a_warm_spare_makes_way_for_a_new_layer(written: Written) -> None:
    written.restart(STRATABOX_WARM_SPARES="1")
    client, process = written.client, written.process

    def spares() -> list[str]:
        """Those that are loaded, as the log says."""
        known = {sandbox.id for sandbox in client.sandboxes.list()}
        log = process.log.read_text()
        return [
            id
            for id, pid in process.guests().items()
            if id not in known and f" waits, pid {pid}\n" in log
        ]

    written.write(4)
    made = written.snapshot(quick=None, level="memory")
    written.drain()  # a spare makes way for what is merged below the new layers, too
    client.snapshots.restore(made.id).delete()
    eventually(lambda: len(spares()) == 1)
    (old,) = spares()
    before = {written.stored.of_snapshot(made.id, index).name for index in (0, 1)}
    assert client.snapshots.compact(made.id).jobs
    written.drain()
    eventually(lambda: len(spares()) == 1 and old not in spares())
    (spare,) = spares()
    with client.snapshots.restore(made.id) as copy:
        # It was a spare before, and it is on the new layers alone, as its headers say.
        assert copy.id == spare
        folder = Path(f"/proc/{process.guests()[copy.id]}/fd")
        names = {Path(link.readlink()).name for link in folder.iterdir()}
        assert not names & before
        assert client.check().findings == ()
        line = f"dd if=/dev/vdb bs={BLOCK} count={SLOTS} iflag=direct | tr -d '\\000'"
        found = copy.execute(line).stdout.split()
        assert [int(number) for number in found] == [number for number in written.now if number]


def test_a_full_disk_is_waited_for_and_a_failed_one_is_not(written: Written) -> None:
    made = []
    for slot in (1, 2, 3):
        written.write(slot)
        made.append(written.snapshot())
    first, second, _ = made
    written.drain()
    written.restart("jobs.written=nospace:1")
    client = written.client
    written.delete(first.id)
    waiting: list[Job] = []

    def some_wait() -> bool:
        # Looked at once: the next change has it tried again.
        waiting[:] = [job for job in client.jobs.list() if job.reason]
        return bool(waiting)

    eventually(some_wait)
    (job,) = waiting
    assert (job.state, str(job.reason).partition(":")[0]) == (JobState.QUEUED, "NO_SPACE")
    written.process.check_consistent()
    written.write(4)
    written.snapshot()
    written.drain()
    done = client.jobs.get(job.id)
    assert (done.state, done.reason) == (JobState.DONE, None)
    written.restart("jobs.compared=error")
    client = written.client
    written.delete(second.id)
    written.drain()
    failed = [job for job in client.jobs.list(include_over=True) if job.state is JobState.FAILED]
    assert {str(job.reason).partition(":")[0] for job in failed} == {"HOST_DISK_FAILED"}
    with pytest.raises(CompactFailedError) as raised:
        client.snapshots.compact(max(written.snapshots))
    assert raised.value.metadata["cause"] == "HOST_DISK_FAILED"
    written.process.check_consistent()
    written.check()


STEPS = (
    "jobs.target-made",
    "jobs.written",
    "jobs.compared",
    "jobs.replacement-written",
    "jobs.replaced",
    "jobs.taken-over",
)


@pytest.mark.parametrize("kill_at", STEPS)
def test_a_daemon_that_is_killed_at_each_step(written: Written, kill_at: str) -> None:
    process = written.process
    written.write(1, 2)
    first = written.snapshot()
    written.write(2, 3)
    written.snapshot()
    written.drain()
    written.restart(f"{kill_at}=kill")
    written.delete(first.id)
    process.wait_killed()
    written.restart()
    written.drain()
    process.check_consistent()
    assert written.client.check().findings == ()
    assert written.stored.unneeded() == set()
    eventually(lambda: {Path(name).name for name in written.open_layers()} == written.chains())
    written.check()


def test_a_daemon_that_ends_just_as_a_layer_is_replaced(written: Written, tmp_path: Path) -> None:
    """The catalog has the new layer, and whoever waited for that was cancelled."""
    process, mark = written.process, tmp_path / "replaced"
    written.write(1, 2)
    first = written.snapshot()
    written.write(2, 3)
    written.snapshot()
    written.drain()
    written.restart(f"jobs.replacement-written=hold:{mark}")
    known = len(process.log.read_text())
    written.delete(first.id)
    with ThreadPoolExecutor(1) as pool:
        with standing(mark):
            ending = pool.submit(process.stop)
            eventually(lambda: "ending; guests run on" in process.log.read_text()[known:])
            time.sleep(1)  # then it has cancelled what goes on by itself
        ending.result()
    written.restart()
    written.drain()
    process.check_consistent()
    assert written.client.check().findings == ()
    written.check()
