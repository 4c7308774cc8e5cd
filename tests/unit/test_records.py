"""Every record comes back from the catalog as it went in, and changes only as it may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.records import Maker

from stratabox.storage.catalog import images, layers, machines, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction, text_of
from stratabox.storage.model.errors import AlreadyExistsError, InternalError, NotFoundError
from stratabox.storage.model.ids import (
    ImageId,
    LayerId,
    OperationId,
    SandboxId,
    Sha256,
    SnapshotId,
    is_id,
    is_id_prefix,
    mint,
)
from stratabox.storage.model.records import (
    Disk,
    Image,
    KernelBoot,
    Layer,
    Machine,
    Sandbox,
    Snapshot,
    SnapshotDisk,
)
from stratabox.storage.model.states import (
    NEXT_IMAGE,
    NEXT_SANDBOX,
    NEXT_SNAPSHOT,
    Boot,
    ImageState,
    LayerState,
    Level,
    SandboxState,
    SnapshotState,
)

T = TypeVar("T")

# The catalog is one for all examples of a test: each is rolled back.
example = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class _RollBackError(Exception):
    pass


@contextmanager
def scratch(catalog: Catalog) -> Iterator[Transaction]:
    """A transaction that leaves nothing."""
    with suppress(_RollBackError), catalog.transaction() as tx:
        yield tx
        raise _RollBackError


# -- records out of nothing -----------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
maps = st.dictionaries(names, texts, max_size=3)
times = st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 30), timezones=st.just(UTC))
whole = st.integers(0, 2**62)
ids = st.uuids(version=4).map(str)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: Sha256(raw.hex()))
boots = st.builds(KernelBoot, kernel=digests, initrd=digests, command_line=texts)
levels = st.none() | st.sampled_from(Level)

machines_ = st.builds(
    Machine,
    machine_type=texts,
    accelerator=texts,
    cpu_model=texts,
    qemu_version=texts,
    firmware=st.dictionaries(names, digests, max_size=3),
    mac=texts,
    kernel_boot=st.none() | boots,
)
disks = st.lists(
    st.builds(Disk, index=st.integers(0, 8), layer=ids.map(LayerId), size=whole, serial=texts),
    max_size=4,
    unique_by=(lambda disk: disk.index, lambda disk: disk.layer),
).map(lambda found: tuple(sorted(found, key=lambda disk: disk.index)))

layers_ = st.builds(
    Layer,
    id=ids.map(LayerId),
    parent=st.none(),
    state=st.sampled_from(LayerState),
    size=whole,
    created_at=times,
    sealed_at=st.none() | times,
)
images_ = st.builds(
    Image,
    id=ids.map(ImageId),
    name=texts,
    state=st.sampled_from(ImageState),
    origin=texts,
    created_at=times,
    layer=st.none() | ids.map(LayerId),
    size=whole,
    kernel_boot=st.none() | boots,
)
sandboxes_ = st.builds(
    Sandbox,
    id=ids.map(SandboxId),
    name=texts,
    state=st.sampled_from(SandboxState),
    image=ids.map(ImageId),
    image_name=texts,
    cpus=whole,
    memory=whole,
    storage=whole,
    machine=machines_,
    created_at=times,
    updated_at=times,
    state_reason=texts,
    ready=st.booleans(),
    clean_shutdown=st.booleans(),
    source_snapshot=st.none() | ids.map(SnapshotId),
    disks=disks,
    env=maps,
    metadata=maps,
    tags=st.lists(texts, max_size=3).map(tuple),
    uid=st.none() | whole,
    vmgenid=texts,
    started_at=st.none() | times,
    ready_at=st.none() | times,
    terminated_at=st.none() | times,
)
snapshots_ = st.builds(
    Snapshot,
    id=ids.map(SnapshotId),
    name=texts,
    state=st.sampled_from(SnapshotState),
    requested_level=levels,
    source_sandbox=ids.map(SandboxId),
    source_sandbox_name=texts,
    image=ids.map(ImageId),
    image_name=texts,
    cpus=whole,
    memory=whole,
    storage=whole,
    machine=machines_,
    created_at=times,
    consistency=levels,
    disks=disks.map(
        lambda found: tuple(
            SnapshotDisk(index=disk.index, layer=disk.layer, size=disk.size, serial=disk.serial)
            for disk in found
        )
    ),
    env=maps,
    metadata=maps,
    ready_at=st.none() | times,
    expires_at=st.none() | times,
    failure_reason=texts,
    frozen=whole,
    stall=st.none() | st.timedeltas(timedelta(0), timedelta(days=400)),
    layer_bytes=whole,
    parent=st.none() | ids.map(SnapshotId),
)
payloads = st.dictionaries(
    names, st.recursive(st.none() | st.booleans() | whole | texts, st.lists, max_leaves=4)
)
operations_ = st.builds(
    operations.Operation,
    kind=st.sampled_from(operations.Kind),
    sandbox=st.none() | ids.map(SandboxId),
    snapshot=st.none() | ids.map(SnapshotId),
    payload=payloads,
    id=ids.map(OperationId),
)


def put_layers(tx: Transaction, wanted: set[LayerId]) -> None:
    for layer in wanted:
        created = datetime(2024, 1, 1, tzinfo=UTC)
        layers.insert(
            tx, Layer(id=layer, parent=None, state=LayerState.ACTIVE, size=1, created_at=created)
        )


def layers_of(record: Sandbox | Snapshot) -> set[LayerId]:
    return {disk.layer for disk in record.disks}


# -- round trips ----------------------------------------------------------------------------------


@example
@given(record=machines_)
def test_machine_round_trip(record: Machine) -> None:
    assert machines.load(machines.dump(record)) == record


@example
@given(record=machines_)
def test_a_machine_needs_its_firmware_and_what_it_boots(record: Machine) -> None:
    boot = record.kernel_boot
    expected = set(record.firmware.values()) | ({boot.kernel, boot.initrd} if boot else set())
    assert machines.blobs_of(record) == expected


@example
@given(record=layers_)
def test_layer_round_trip(catalog: Catalog, record: Layer) -> None:
    with scratch(catalog) as tx:
        layers.insert(tx, record)
        assert layers.everything(tx) == [record]
        child = replace(record, id=LayerId(mint()), parent=record.id)
        layers.insert(tx, child)
        assert layers.chain(tx, child.id) == [child, record]


@example
@given(record=images_, after=images_)
def test_image_round_trip(catalog: Catalog, record: Image, after: Image) -> None:
    with scratch(catalog) as tx:
        put_layers(tx, {image.layer for image in (record, after) if image.layer})
        inserted = images.insert(tx, record)
        assert replace(inserted, generation=0) == record
        assert images.get(tx, record.id) == inserted
        assert images.everything(tx) == [inserted]
        assert images.list_page(tx) == ([inserted], "")
        assert images.resolve(tx, record.id) == record.id
        wanted = replace(after, id=record.id, state=record.state)
        changed = images.change(tx, record.id, **changes_of(wanted))
        assert replace(changed, generation=0) == wanted
        assert images.get(tx, record.id) == changed
        assert changed.generation > inserted.generation
        images.delete(tx, record.id)
        assert images.everything(tx) == []
        with pytest.raises(NotFoundError) as caught:
            images.get(tx, record.id)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


@example
@given(record=sandboxes_, after=sandboxes_)
def test_sandbox_round_trip(catalog: Catalog, record: Sandbox, after: Sandbox) -> None:
    with scratch(catalog) as tx:
        put_layers(tx, layers_of(record) | layers_of(after))
        inserted = sandboxes.insert(tx, record)
        assert replace(inserted, generation=0) == record
        assert sandboxes.get(tx, record.id) == inserted
        assert sandboxes.everything(tx) == [inserted]
        everybody = sandboxes.Filter(include_terminated=True)
        assert sandboxes.list_page(tx, everybody) == ([inserted], "")
        wanted = replace(after, id=record.id, state=record.state)
        changed = sandboxes.change(tx, record.id, **changes_of(wanted))
        assert changed == replace(wanted, updated_at=tx.now, generation=changed.generation)
        assert sandboxes.get(tx, record.id) == changed
        assert changed.generation > inserted.generation
        assert layers.referenced(tx) == layers_of(after)
        sandboxes.delete(tx, record.id)
        with pytest.raises(NotFoundError) as caught:
            sandboxes.change(tx, record.id)
    assert caught.value.reason == "SANDBOX_NOT_FOUND"


@example
@given(record=snapshots_, after=snapshots_)
def test_snapshot_round_trip(catalog: Catalog, record: Snapshot, after: Snapshot) -> None:
    with scratch(catalog) as tx:
        put_layers(tx, layers_of(record) | layers_of(after))
        inserted = snapshots.insert(tx, record)
        assert replace(inserted, generation=0) == record
        assert snapshots.get(tx, record.id) == inserted
        assert snapshots.everything(tx) == [inserted]
        assert snapshots.list_page(tx, snapshots.Filter()) == ([inserted], "")
        wanted = replace(after, id=record.id, state=record.state)
        changed = snapshots.change(tx, record.id, **changes_of(wanted))
        assert replace(changed, generation=0) == wanted
        assert snapshots.get(tx, record.id) == changed
        assert changed.generation > inserted.generation
        assert layers.referenced(tx) == layers_of(after)
        snapshots.delete(tx, record.id)
        with pytest.raises(NotFoundError) as caught:
            snapshots.change(tx, record.id)
    assert caught.value.reason == "SNAPSHOT_NOT_FOUND"


@example
@given(record=operations_, later=payloads)
def test_operation_round_trip(
    catalog: Catalog, record: operations.Operation, later: dict[str, object]
) -> None:
    with scratch(catalog) as tx:
        assert operations.begin(tx, record) == record
        assert operations.unfinished(tx) == [record]
        operations.amend(tx, record.id, later)
        assert operations.unfinished(tx) == [replace(record, payload=later)]
        operations.end(tx, record.id)
        assert operations.unfinished(tx) == []


def changes_of(record: Image | Sandbox | Snapshot) -> dict[str, object]:
    """Every field that a change may name."""
    fixed = ("id", "generation", "updated_at")
    return {
        field.name: getattr(record, field.name)
        for field in fields(record)
        if field.name not in fixed
    }


@example
@given(times, times)
def test_text_order_is_time_order(one: datetime, other: datetime) -> None:
    assert (one < other) == ((text_of(one) or "") < (text_of(other) or ""))


# -- changes of state -----------------------------------------------------------------------------


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
        (state.RUNNING, state.PAUSED),
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
    assert SnapshotState.READY not in NEXT_SNAPSHOT[SnapshotState.FAILED]
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


# -- single questions -----------------------------------------------------------------------------


def test_an_image_name_is_taken_once(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        first = images.insert(tx, maker.image(name="tiny"))
        with pytest.raises(AlreadyExistsError) as caught:
            images.insert(tx, maker.image(name="tiny"))
    assert caught.value.reason == "IMAGE_ALREADY_EXISTS"
    assert caught.value.metadata == {"image": first.id}


def test_an_image_boots_by_what_it_brings(maker: Maker) -> None:
    boot = KernelBoot(kernel=Sha256("a"), initrd=Sha256("b"), command_line="")
    assert maker.image().boot is Boot.DISK
    assert maker.image(kernel_boot=boot).boot is Boot.KERNEL


def test_the_lowest_free_uid_is_given(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        boxes = []
        for expected in (100, 101, 102):
            uid = sandboxes.free_uid(tx, 100, 3)
            assert uid == expected
            boxes.append(sandboxes.insert(tx, maker.sandbox(uid=uid)))
        assert sandboxes.free_uid(tx, 100, 3) is None
        assert sandboxes.free_uid(tx, 103, 3) == 103
        sandboxes.change(tx, boxes[1].id, uid=None)
        assert sandboxes.free_uid(tx, 100, 3) == 101


def test_who_needs_an_image_and_a_layer(catalog: Catalog, maker: Maker) -> None:
    image = ImageId(mint())
    with catalog.transaction() as tx:
        base, middle, top = maker.chain(tx, 3)
        aside = maker.layer(base)
        layers.insert(tx, aside)
        box = sandboxes.insert(tx, maker.sandbox(top, image=image))
        other = sandboxes.insert(tx, maker.sandbox(aside.id, image=image))
        point = snapshots.insert(tx, maker.snapshot(middle, image=image))
        sandboxes.insert(tx, maker.sandbox(image=image, state=SandboxState.TERMINATED))
        assert sandboxes.users_of_image(tx, image) == sorted([box.id, other.id])
        assert snapshots.users_of_image(tx, image) == [point.id]
        assert layers.users(tx, base) == sorted([box.id, other.id, point.id])
        assert layers.users(tx, middle) == sorted([box.id, point.id])
        assert layers.users(tx, top) == [box.id]
        assert snapshots.any_of_source(tx, point.source_sandbox)
        assert not snapshots.any_of_source(tx, box.id)


def test_the_snapshot_that_holds_a_layer_is_the_newest_ready_one(
    catalog: Catalog, maker: Maker
) -> None:
    with catalog.transaction() as tx:
        (layer,) = maker.chain(tx, 1)
        assert snapshots.holding(tx, layer) is None
        snapshots.insert(tx, maker.snapshot(layer, state=SnapshotState.DELETING))
        snapshots.insert(tx, maker.snapshot(layer))
        newest = snapshots.insert(tx, maker.snapshot(layer))
        snapshots.insert(tx, maker.snapshot(layer, state=SnapshotState.CREATING))
        assert snapshots.holding(tx, layer) == newest.id


def test_what_has_expired(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        due = [
            snapshots.insert(tx, maker.snapshot(expires_at=tx.now, state=state)).id
            for state in (SnapshotState.READY, SnapshotState.FAILED)
        ]
        for state in (SnapshotState.CREATING, SnapshotState.DELETING):
            snapshots.insert(tx, maker.snapshot(expires_at=tx.now, state=state))
        soon = tx.now + timedelta(microseconds=1)
        snapshots.insert(tx, maker.snapshot(expires_at=soon))
        snapshots.insert(tx, maker.snapshot())
        assert sorted(snapshots.expired(tx)) == sorted(due)


def test_ids() -> None:
    made = {mint() for _ in range(100)}
    assert len(made) == 100
    for one in made:
        assert is_id(one)
        assert not is_id(one.upper()) or one.upper() == one
        assert not is_id(one[:-1])
        assert not is_id(one + "\n")
        assert all(is_id_prefix(one[:length]) for length in range(4, 37))
    assert not any(map(is_id_prefix, ("", "abc", "xyz1", "ABCD", "abc%", "abcd\n", "a" * 37)))
