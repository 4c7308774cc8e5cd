"""The only legal changes of state, and the one order of all changes."""

from __future__ import annotations

from itertools import product

import pytest

from stratabox.storage.catalog import images, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.model.errors import InternalError
from stratabox.storage.model.states import (
    NEXT_IMAGE,
    NEXT_SANDBOX,
    NEXT_SNAPSHOT,
    ImageState,
    SandboxState,
    SnapshotState,
)
from support.records import Maker, scratch


def test_sandbox_states(catalog: Catalog, maker: Maker) -> None:
    for old, new in product(SandboxState, SandboxState):
        with scratch(catalog) as tx:
            record = sandboxes.insert(tx, maker.sandbox(state=old))
            if new is old or new in NEXT_SANDBOX[old]:
                assert sandboxes.change(tx, record.id, state=new).state is new
            else:
                with pytest.raises(InternalError, match=f"{old} to {new}"):
                    sandboxes.change(tx, record.id, state=new, name="other")
                assert sandboxes.get(tx, record.id) == record


def test_snapshot_states(catalog: Catalog, maker: Maker) -> None:
    for old, new in product(SnapshotState, SnapshotState):
        with scratch(catalog) as tx:
            record = snapshots.insert(tx, maker.snapshot(state=old))
            if new is old or new in NEXT_SNAPSHOT[old]:
                assert snapshots.change(tx, record.id, state=new).state is new
            else:
                with pytest.raises(InternalError, match=f"{old} to {new}"):
                    snapshots.change(tx, record.id, state=new, name="other")
                assert snapshots.get(tx, record.id) == record


def test_image_states(catalog: Catalog, maker: Maker) -> None:
    for old, new in product(ImageState, ImageState):
        with scratch(catalog) as tx:
            record = images.insert(tx, maker.image(state=old))
            if new is old or new in NEXT_IMAGE[old]:
                assert images.change(tx, record.id, state=new).state is new
            else:
                with pytest.raises(InternalError, match=f"{old} to {new}"):
                    images.change(tx, record.id, state=new, name="other")
                assert images.get(tx, record.id) == record


def test_the_steps_that_issue_2_and_the_design_name() -> None:
    """Written out again, so that a slip in the table is seen."""
    state = SandboxState
    steps = {(old, new) for old, after in NEXT_SANDBOX.items() for new in after}
    assert steps == {
        *((old, state.RUNNING) for old in (state.CREATING, state.PAUSED, state.STOPPED)),
        *((old, state.STOPPED) for old in (state.RUNNING, state.PAUSED)),
        *((old, state.PAUSED) for old in (state.CREATING, state.RUNNING)),
        *((state.FAILED, new) for new in (state.RUNNING, state.STOPPED)),
        *(
            (old, state.FAILED)
            for old in (state.CREATING, state.RUNNING, state.PAUSED, state.STOPPED)
        ),
        *((old, state.TERMINATING) for old in state if not old.is_over),
        (state.TERMINATING, state.TERMINATED),
    }


def test_every_state_can_end() -> None:
    """From everywhere there is a way to the last state, and none out of it."""
    for start in SandboxState:
        seen, todo = set(), [start]
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += NEXT_SANDBOX[state]
        assert SandboxState.TERMINATED in seen
    assert all(
        SandboxState.TERMINATING in NEXT_SANDBOX[state]
        for state in SandboxState
        if not state.is_over
    )
    assert not NEXT_SANDBOX[SandboxState.TERMINATED]
    tables = (NEXT_SANDBOX, SandboxState), (NEXT_SNAPSHOT, SnapshotState), (NEXT_IMAGE, ImageState)
    for table, states in tables:
        assert set(table) == set(states)


def test_generations_are_one_order_over_all_records(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        seen = [
            images.insert(tx, image := maker.image()).generation,
            sandboxes.insert(tx, sandbox := maker.sandbox()).generation,
            snapshots.insert(tx, snapshot := maker.snapshot()).generation,
            snapshots.change(tx, snapshot.id, name="n").generation,
            sandboxes.change(tx, sandbox.id).generation,
            images.change(tx, image.id, name="n").generation,
        ]
    assert seen == sorted(set(seen))
