"""What the daemon asks the catalog: who needs it, what is due, what is free."""

from __future__ import annotations

from datetime import timedelta

import pytest

from stratabox.storage.catalog import images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.model.errors import AlreadyExistsError
from stratabox.storage.model.ids import ImageId, Sha256, is_id, is_id_prefix, mint
from stratabox.storage.model.records import KernelBoot
from stratabox.storage.model.states import (
    Boot,
    SandboxState,
    SnapshotState,
)
from support.records import Maker


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
        assert snapshots.holding(tx, layer, "default") is None
        snapshots.insert(tx, maker.snapshot(layer, state=SnapshotState.DELETING))
        snapshots.insert(tx, maker.snapshot(layer))
        newest = snapshots.insert(tx, maker.snapshot(layer))
        snapshots.insert(tx, maker.snapshot(layer, state=SnapshotState.CREATING))
        assert snapshots.holding(tx, layer, "default") == newest.id


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
