"""Schedules: when the next snapshot is due, and which rhythms there can be."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.lifecycle import keeping
from stratabox.daemon.lifecycle.keeping import Rhythm
from stratabox.storage.catalog import operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.catalog.operations import Kind, Operation
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import ImageId, SandboxId, SnapshotId, mint
from stratabox.storage.model.records import Schedule
from stratabox.storage.model.states import Level, SandboxState, SnapshotState
from support.records import EPOCH, Maker

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def test_the_first_is_due_when_the_span_is_over() -> None:
    schedule = keeping.begin(Rhythm(every=HOUR, level=Level.CRASH), NOON)
    assert schedule == Schedule(every=HOUR, level=Level.CRASH, next_at=NOON + HOUR)


def test_it_stays_in_step_and_missed_ones_are_not_made_up_for() -> None:
    schedule = keeping.begin(Rhythm(every=HOUR), NOON)
    assert keeping.after(schedule, NOON).next_at == NOON + HOUR
    assert keeping.after(schedule, NOON + HOUR).next_at == NOON + 2 * HOUR
    late = NOON + 5 * HOUR + timedelta(minutes=7)
    assert keeping.after(schedule, late).next_at == NOON + 6 * HOUR


@given(
    every=st.timedeltas(keeping.SHORTEST, keeping.LONGEST),
    late=st.timedeltas(timedelta(0), timedelta(days=3000)),
)
def test_the_next_one_is_always_ahead_and_never_further_than_the_span(
    every: timedelta, late: timedelta
) -> None:
    schedule = keeping.begin(Rhythm(every=every), NOON)
    now = schedule.next_at + late
    following = keeping.after(schedule, now)
    assert now < following.next_at <= now + every
    assert (following.next_at - schedule.next_at) % every == timedelta(0)


@pytest.mark.parametrize(
    "every", [timedelta(seconds=59), timedelta(days=367), timedelta(seconds=90.5), timedelta(0)]
)
def test_rhythms_that_cannot_be(every: timedelta) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        keeping.check_rhythm(Rhythm(every=every))
    assert caught.value.metadata["field"] == "snapshot_schedule.every"
    keeping.check_rhythm(Rhythm(every=timedelta(minutes=1)))


@pytest.mark.parametrize("keep", [-1, 100_001])
def test_numbers_that_cannot_be_kept(keep: int) -> None:
    with pytest.raises(InvalidArgumentError):
        keeping.check_keep_last(keep)
    assert keeping.check_keep_last(0) == 0


def test_what_is_beyond_the_last_so_many(catalog: Catalog, maker: Maker) -> None:
    source = SandboxId(mint())
    with catalog.transaction() as tx:
        made = [snapshots.insert(tx, maker.snapshot(source_sandbox=source)).id for _ in range(5)]
        # Neither count nor go: one with an expiry, a failed one, another sandbox's.
        soon = EPOCH + timedelta(days=9999)
        snapshots.insert(tx, maker.snapshot(source_sandbox=source, expires_at=soon))
        snapshots.insert(tx, maker.snapshot(source_sandbox=source, state=SnapshotState.FAILED))
        snapshots.insert(tx, maker.snapshot())
        assert snapshots.beyond(tx, source, 2) == made[:3]
        assert snapshots.beyond(tx, source, 5) == []


@pytest.mark.parametrize(
    ("kind", "needed"),
    [(Kind.CLONE, True), (Kind.REVERT, True), (Kind.CREATE, True), (Kind.PARK, False)],
)
def test_what_an_operation_needs(catalog: Catalog, maker: Maker, kind: Kind, needed: bool) -> None:
    with catalog.transaction() as tx:
        shot = snapshots.insert(tx, maker.snapshot())
        other = snapshots.insert(tx, maker.snapshot())
        box = sandboxes.insert(tx, maker.sandbox(source_snapshot=shot.id))
        named = shot.id if kind in (Kind.CLONE, Kind.REVERT) else None
        operations.begin(tx, Operation(kind=kind, sandbox=box.id, snapshot=named))
        assert snapshots.is_needed_now(tx, shot.id) is needed
        assert not snapshots.is_needed_now(tx, other.id)


def test_which_sandboxes_are_due(catalog: Catalog, maker: Maker) -> None:
    def put(state: SandboxState, next_at: datetime | None) -> SandboxId:
        schedule = next_at and Schedule(every=HOUR, level=None, next_at=next_at)
        box = maker.sandbox(state=state, schedule=schedule, image=ImageId(mint()))
        return sandboxes.insert(tx, box).id

    with catalog.transaction() as tx:
        past, ahead = tx.now - HOUR, tx.now + HOUR
        running = put(SandboxState.RUNNING, past)
        paused = put(SandboxState.PAUSED, past - HOUR)
        put(SandboxState.STOPPED, past)
        put(SandboxState.RUNNING, ahead)
        put(SandboxState.RUNNING, None)
        assert sandboxes.due_for_snapshot(tx) == [paused, running]


def test_expired_ones_only_when_they_are(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        gone: list[SnapshotId] = []
        for offset in (-HOUR, HOUR):
            shot = snapshots.insert(tx, maker.snapshot(expires_at=tx.now + offset))
            gone += [shot.id] if offset < timedelta(0) else []
        assert snapshots.expired(tx) == gone
