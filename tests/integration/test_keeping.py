"""Snapshots that are taken and deleted by the clock, and a sandbox's last one."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from stratabox.client import (
    Client,
    InvalidArgumentError,
    Sandbox,
    SandboxRecord,
    SandboxState,
    Snapshot,
    SnapshotLevel,
    SnapshotSchedule,
    SnapshotState,
    TimeoutAction,
)
from support import counting
from support.daemon import DaemonProcess, daemon
from support.stored import wait_until
from support.waiting import until

Shell = Callable[[Sandbox, str], str]
HOUR = timedelta(hours=1)


class Keeper:
    """A daemon of its own with a memory snapshot of a guest that counts, and its clock in hand."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client: Client = process.start()
        image = self.client.images.build_tiny()
        with self.client.sandboxes.create(image=image.id, memory=256) as source:
            counting.start(source)
            self.origin = source.snapshot(name="origin", level="memory").id

    def box(self, name: str) -> Sandbox:
        return self.client.snapshots.restore(self.origin, name=name)

    def restart(self, failpoints: str = "", **settings: str) -> None:
        self.client.close()
        self.process.stop()
        self.start(failpoints, **settings)

    def start(self, failpoints: str = "", **settings: str) -> None:
        environment = {f"STRATABOX_{key}": value for key, value in settings.items()}
        self.client = self.process.start(failpoints=failpoints, environment=environment)

    def set(self, sql: str, *values: object) -> None:
        """Change the catalog from outside, as if time had passed."""
        path = self.process.state / "catalog.db"
        with contextlib.closing(sqlite3.connect(path, timeout=10)) as catalog:
            catalog.execute(sql, values)
            catalog.commit()

    def make_due(self, sandbox: str, ago: timedelta) -> datetime:
        """Have its next scheduled snapshot been due so long ago."""
        due = datetime.now(UTC) - ago
        text = due.isoformat(timespec="microseconds")
        self.set("UPDATE sandboxes SET schedule_next_at = ? WHERE id = ?", text, sandbox)
        return due

    def expire(self, sandbox: str) -> None:
        """Have its time been up for a minute."""
        past = (datetime.now(UTC) - timedelta(minutes=1)).isoformat(timespec="microseconds")
        self.set("UPDATE sandboxes SET expires_at = ? WHERE id = ?", past, sandbox)

    def of(self, sandbox: str) -> list[Snapshot]:
        """A sandbox's snapshots, oldest first."""
        return self.client.snapshots.list(sandbox=sandbox)[::-1]

    def until_taken(self, sandbox: str) -> Snapshot:
        """The first scheduled snapshot of a sandbox, once it has ended well or not."""
        ended = (SnapshotState.READY, SnapshotState.FAILED)
        return next(
            event.snapshot
            for event in self.client.snapshots.watch(sandbox=sandbox)
            if event.snapshot.state in ended and "stratabox.schedule" in event.snapshot.metadata
        )


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    with daemon(tmp_path_factory.mktemp("keeping")) as process:
        made = Keeper(process)
        yield made
        made.client.close()


@pytest.fixture
def box(keeper: Keeper) -> Iterator[Sandbox]:
    """A guest that runs on the module's daemon; all that it leaves goes with it."""
    made = keeper.box("box")
    yield made
    if not keeper.process.runs:
        keeper.start()
    for snapshot in keeper.of(made.id):
        keeper.client.snapshots.delete(snapshot.id)
    keeper.client.sandboxes.delete(made.id)


def test_only_the_last_so_many_are_kept(keeper: Keeper, box: Sandbox) -> None:
    box.snapshot(name="1", level="crash")
    box.snapshot(name="2", level="crash")
    timed = box.snapshot(name="timed", level="crash", expires_at=datetime.now(UTC) + HOUR)
    record = keeper.client.sandboxes.update(box.id, keep_last=2)
    assert record.keep_last == 2
    assert [one.name for one in keeper.of(box.id)] == ["1", "2", "timed"], "with the next one"
    box.snapshot(name="3", level="crash")
    wait_until(lambda: [one.name for one in keeper.of(box.id)] == ["2", "timed", "3"])
    box.snapshot(name="4", level="crash")
    wait_until(lambda: [one.name for one in keeper.of(box.id)] == ["timed", "3", "4"])
    # One that is to be kept after all: its expiry is cleared, and it counts.
    keeper.client.snapshots.update(timed.id, expires_at=None)
    box.snapshot(name="5", level="crash")
    wait_until(lambda: [one.name for one in keeper.of(box.id)] == ["4", "5"])
    with pytest.raises(InvalidArgumentError):
        keeper.client.sandboxes.update(box.id, keep_last=-1)


def test_what_was_killed_before_it_was_deleted_is_deleted_at_the_start(
    keeper: Keeper, box: Sandbox
) -> None:
    for name in ("1", "2"):
        box.snapshot(name=name, level="crash")
    keeper.client.sandboxes.update(box.id, keep_last=1)
    keeper.restart()
    wait_until(lambda: [one.name for one in keeper.of(box.id)] == ["2"])


def test_a_schedule_is_kept_in_step(keeper: Keeper, box: Sandbox) -> None:
    before = datetime.now(UTC)
    wanted = SnapshotSchedule(every=HOUR, level=SnapshotLevel.CRASH)
    record = keeper.client.sandboxes.update(box.id, snapshot_schedule=wanted)
    assert record.snapshot_schedule is not None
    assert record.snapshot_schedule.every == HOUR
    assert record.snapshot_schedule.next_at is not None
    assert before + HOUR <= record.snapshot_schedule.next_at <= datetime.now(UTC) + HOUR
    due = keeper.make_due(box.id, 3 * HOUR + timedelta(minutes=10))
    taken = keeper.until_taken(box.id)
    assert taken.state is SnapshotState.READY
    assert taken.consistency is SnapshotLevel.CRASH
    assert taken.name == f"scheduled {due:%Y-%m-%d %H:%M:%S}"
    record = keeper.client.sandboxes.get(box.id)
    assert record.snapshot_schedule is not None
    assert record.snapshot_schedule.next_at == due + 4 * HOUR, "once, and in step"
    # One that fell due while the daemon was away is taken at its start.
    keeper.client.snapshots.delete(taken.id)
    keeper.client.close()
    keeper.process.stop()
    keeper.make_due(box.id, HOUR / 2)
    keeper.start()
    assert keeper.until_taken(box.id).state is SnapshotState.READY
    assert len(keeper.of(box.id)) == 1
    record = keeper.client.sandboxes.update(box.id, snapshot_schedule=None)
    assert record.snapshot_schedule is None


def test_what_cannot_be_taken_is_told_of_and_tried_when_the_next_is_due(
    keeper: Keeper, box: Sandbox
) -> None:
    client = keeper.client
    # A paused guest's agent cannot freeze anything.
    client.sandboxes.pause(box.id)
    wanted = SnapshotSchedule(every=HOUR, level=SnapshotLevel.APPLICATION)
    client.sandboxes.update(box.id, snapshot_schedule=wanted)
    due = keeper.make_due(box.id, timedelta(minutes=1))

    def told(record: SandboxRecord) -> bool:
        schedule = record.snapshot_schedule
        return schedule is not None and schedule.next_at == due + HOUR

    record = until(client, box.id, told)
    assert keeper.of(box.id) == []
    client.sandboxes.resume(box.id)
    keeper.make_due(box.id, timedelta(minutes=1))
    assert keeper.until_taken(box.id).consistency is SnapshotLevel.APPLICATION
    assert record.state is SandboxState.PAUSED
    # One that begins and fails is a record by itself.
    keeper.restart("snapshot.switched=error:1")
    keeper.client.snapshots.delete(keeper.of(box.id)[0].id)
    due = keeper.make_due(box.id, timedelta(minutes=1))
    failed = keeper.until_taken(box.id)
    assert failed.state is SnapshotState.FAILED
    assert failed.failure_reason
    assert told(keeper.client.sandboxes.get(box.id))
    keeper.restart()


def test_a_rhythm_that_cannot_be(keeper: Keeper, box: Sandbox) -> None:
    for every in (30, 59.5, 367 * 86400):
        with pytest.raises(InvalidArgumentError):
            keeper.client.sandboxes.update(box.id, snapshot_schedule=every)


def test_set_at_creation(keeper: Keeper) -> None:
    made = keeper.client.sandboxes.create(
        snapshot=keeper.origin,
        keep_last=3,
        snapshot_schedule=SnapshotSchedule(every=HOUR, level=SnapshotLevel.MEMORY),
        paused=True,
    )
    assert made.keep_last == 3
    assert made.snapshot_schedule is not None
    assert made.snapshot_schedule.level is SnapshotLevel.MEMORY
    made.delete()


# -- the last one ---------------------------------------------------------------------------------


def ends(keeper: Keeper, box: Sandbox) -> Snapshot:
    """Wait until its time has ended it; the one snapshot that is left of it."""
    until(keeper.client, box.id, lambda record: record.state is SandboxState.TERMINATED)
    (left,) = keeper.of(box.id)
    assert left.state is SnapshotState.READY
    assert "at the timeout of" in left.name
    return left


def test_a_snapshot_is_left_of_it(keeper: Keeper, box: Sandbox, sh: Shell) -> None:
    client = keeper.client
    pid, nonce, _ = sh(box, "cat /mnt/test/now").split()
    client.sandboxes.update(box.id, expires_at=datetime.now(UTC) + HOUR, on_timeout="snapshot")
    keeper.expire(box.id)
    left = ends(keeper, box)
    assert left.consistency is SnapshotLevel.MEMORY, "the strongest that could be had"
    assert left.expires_at is None
    with client.snapshots.restore(left.id) as again:
        assert sh(again, "cat /mnt/test/now").split()[:2] == [pid, nonce]


def test_once_also_when_the_daemon_is_killed_in_between(keeper: Keeper, box: Sandbox) -> None:
    keeper.client.sandboxes.update(box.id, on_timeout=TimeoutAction.SNAPSHOT)
    keeper.client.close()
    keeper.process.stop()
    # Due while no daemon runs.
    keeper.expire(box.id)
    keeper.process.start_to_die("farewell.snapshot-taken=kill")
    keeper.start()
    ends(keeper, box)


def test_weaker_where_it_must_be(keeper: Keeper, box: Sandbox) -> None:
    keeper.client.sandboxes.stop(box.id, force=True)
    keeper.client.sandboxes.update(box.id, on_timeout="snapshot")
    keeper.expire(box.id)
    assert ends(keeper, box).consistency is SnapshotLevel.CRASH


def test_paused_to_disk_where_there_can_be_none(keeper: Keeper, box: Sandbox) -> None:
    keeper.client.sandboxes.update(box.id, on_timeout="snapshot")
    keeper.restart(STORE_BUDGET="1")
    keeper.expire(box.id)
    record = until(keeper.client, box.id, lambda record: record.paused_to_disk)
    assert "no snapshot could be taken" in (record.state_reason or "")
    assert "store.budget" in (record.state_reason or "")
    assert record.expires_at is None
    keeper.restart()
    assert keeper.of(box.id) == []


def test_expired_while_the_daemon_was_away(keeper: Keeper, box: Sandbox) -> None:
    gone = box.snapshot(level="crash", expires_at=datetime.now(UTC) + HOUR)
    kept = box.snapshot(level="crash", expires_at=datetime.now(UTC) + HOUR)
    keeper.client.snapshots.update(kept.id, expires_at=None)
    keeper.client.close()
    keeper.process.stop()
    past = (datetime.now(UTC) - HOUR).isoformat(timespec="microseconds")
    keeper.set("UPDATE snapshots SET expires_at = ? WHERE id = ?", past, gone.id)
    keeper.start()
    wait_until(lambda: [one.id for one in keeper.of(box.id)] == [kept.id])
