"""Every record comes back from the catalog as it went in, and changes only as it may."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.storage.catalog import images, layers, machines, operations, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction, text_of
from stratabox.storage.model.errors import NotFoundError
from stratabox.storage.model.ids import (
    ImageId,
    LayerId,
    OperationId,
    SandboxId,
    Sha256,
    SnapshotId,
    VolumeId,
    mint,
)
from stratabox.storage.model.records import (
    Disk,
    Image,
    KernelBoot,
    Layer,
    Machine,
    Mount,
    Sandbox,
    Schedule,
    Snapshot,
)
from stratabox.storage.model.states import (
    ImageState,
    LayerState,
    Level,
    SandboxState,
    SnapshotState,
)
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE
from support.records import scratch

T = TypeVar("T")

# All examples of a test share its catalog; each is rolled back.
example = settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


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
    volumes=st.booleans(),
)
disks = st.lists(
    st.builds(Disk, index=st.integers(0, 8), layer=ids.map(LayerId), size=whole, serial=texts),
    max_size=4,
    unique_by=(lambda disk: disk.index, lambda disk: disk.layer),
).map(lambda found: tuple(sorted(found, key=lambda disk: disk.index)))

mounts = st.lists(
    st.builds(
        Mount,
        volume=ids.map(VolumeId),
        volume_name=texts,
        path=texts,
        read_only=st.booleans(),
        slot=st.integers(0, 15),
    ),
    max_size=3,
).map(tuple)

layers_ = st.builds(
    Layer,
    id=ids.map(LayerId),
    parent=st.none(),
    state=st.sampled_from(LayerState),
    size=whole,
    created_at=times,
    sealed_at=st.none() | times,
    backing=st.none() | ids.map(LayerId),
    bytes=st.integers(0, 2**50),  # there is a column with their sum, too
    compressed=st.booleans(),
    sha256=st.none() | digests,
    content=st.none() | digests,
    reads_as=st.none() | digests,
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
    workspace=st.just(DEFAULT_WORKSPACE),
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
    keep_last=whole,
    schedule=st.none()
    | st.builds(
        Schedule,
        every=st.integers(1, 366 * 86400).map(lambda seconds: timedelta(seconds=seconds)),
        level=levels,
        next_at=times,
    ),
    left_behind=mounts,
)
snapshots_ = st.builds(
    Snapshot,
    id=ids.map(SnapshotId),
    workspace=st.just(DEFAULT_WORKSPACE),
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
            Disk(index=disk.index, layer=disk.layer, size=disk.size, serial=disk.serial)
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
    volumes=mounts,
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
        child = replace(record, id=LayerId(mint()), parent=record.id, backing=record.id)
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
