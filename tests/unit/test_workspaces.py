"""Workspaces: what a transaction for one of them finds, what quotas count, what else is its own."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from stratabox.daemon.lifecycle.common.events import Bus, Happening
from stratabox.storage.catalog import (
    contents,
    idempotency,
    images,
    jobs,
    keys,
    layers,
    lookup,
    ports,
    rams,
    sandboxes,
    snapshots,
    volume_snapshots,
    volumes,
    workspaces,
)
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.model.access import ApiKey, Role
from stratabox.storage.model.errors import (
    AlreadyExistsError,
    DeniedError,
    InvalidArgumentError,
    NotFoundError,
)
from stratabox.storage.model.ids import (
    JobId,
    LayerId,
    PortId,
    Sha256,
    VolumeId,
    VolumeSnapshotId,
    mint,
)
from stratabox.storage.model.ports import Direction, Endpoint, Port
from stratabox.storage.model.records import Job, SavedRam, Volume, VolumeSnapshot
from stratabox.storage.model.states import (
    ImageState,
    JobKind,
    JobState,
    LayerState,
    Level,
    SandboxState,
    SnapshotState,
    VolumeState,
)
from stratabox.storage.model.workspaces import (
    Quota,
    QuotaExceededError,
    Usage,
    Workspace,
    acting,
    check_name,
)
from support import tenants
from support.records import Maker

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.db")
    with opened.transaction() as tx:
        for name in ("ann", "bob"):
            workspaces.insert(tx, Workspace(name=name, created_at=tx.now))
    yield opened
    opened.close()


def sealed(tx: Transaction, parent: LayerId | None = None, size: int = MIB) -> LayerId:
    layer = Maker().layer(parent, state=LayerState.SEALED, bytes=size)
    layers.insert(tx, layer)
    return layer.id


def a_volume(tx: Transaction, workspace: str, name: str, size: int = MIB) -> Volume:
    made = Volume(
        id=VolumeId(mint()), workspace=workspace, name=name, state=VolumeState.CREATING,
        size=size, created_at=tx.now, updated_at=tx.now,
    )  # fmt: skip
    return volumes.insert(tx, made)


# -- what is found --------------------------------------------------------------------------------


def test_a_transaction_for_one_finds_by_no_word_what_is_anothers(catalog: Catalog) -> None:
    maker = Maker()
    with catalog.transaction() as tx:
        layer = sealed(tx)
        box = sandboxes.insert(tx, maker.sandbox(workspace="bob", name="box"))
        point = snapshots.insert(
            tx, maker.snapshot(layer, workspace="bob", name="point", source_sandbox=box.id)
        )
        disk = a_volume(tx, "bob", "disk")
        still = volume_snapshots.insert(
            tx,
            VolumeSnapshot(
                id=VolumeSnapshotId(mint()), workspace="bob", name="still", volume=disk.id,
                volume_name="disk", layer=layer, size=MIB,
                consistency=Level.CRASH, created_at=tx.now,
            ),
        )  # fmt: skip
        job = jobs.insert(
            tx,
            Job(
                id=JobId(mint()), kind=JobKind.COMPACT, state=JobState.QUEUED, layer=layer,
                base=None, target=LayerId(mint()), created_at=tx.now,
            ),
        )  # fmt: skip
        port = Port(
            id=PortId(mint()), sandbox=box.id, direction=Direction.TO_GUEST,
            host=Endpoint(port=1), guest=Endpoint(port=2), mode=0o600, created_at=tx.now,
        )  # fmt: skip
        ports.insert(tx, port)
    finders = {
        sandboxes.resolve: (box.id, "box", box.id[:8]),
        snapshots.resolve: (point.id, "point", point.id[:8]),
        volumes.resolve: (disk.id, "disk", disk.id[:8]),
        volume_snapshots.resolve: (still.id, "still", still.id[:8]),
        jobs.resolve: (job.id, job.id[:8]),
    }
    for workspace in (None, "bob"):
        with catalog.transaction(workspace) as tx:
            for find, words in finders.items():
                assert len({find(tx, word) for word in words}) == 1
            assert ports.get(tx, port.id) == port
            assert len(sandboxes.everything(tx, own=True)) == 1
            assert snapshots.any_of_source(tx, box.id)
            assert volume_snapshots.any_of_volume(tx, disk.id)
    with catalog.transaction("ann") as tx:
        for find, words in finders.items():
            for word in words:
                with pytest.raises(NotFoundError) as caught:
                    find(tx, word)
                told = caught.value.message.replace(repr(word), "…")
                with pytest.raises(NotFoundError) as caught:
                    find(tx, "nobodys")
                assert caught.value.message.replace("'nobodys'", "…") == told
        with pytest.raises(NotFoundError):
            ports.get(tx, port.id)
        assert ports.everything(tx) == []
        assert sandboxes.everything(tx, own=True) == []
        assert jobs.everything(tx, own=True) == []
        assert snapshots.some(tx, None, None) == []
        assert not snapshots.any_of_source(tx, box.id)
        assert not volume_snapshots.any_of_volume(tx, disk.id)
        assert snapshots.holding(tx, layer, "ann") is None
        everybody = sandboxes.Filter(include_terminated=True)
        assert sandboxes.list_page(tx, everybody) == ([], "")
        assert snapshots.list_page(tx, snapshots.Filter(source=box.id)) == ([], "")
        assert snapshots.list_page(tx, snapshots.Filter(name="point")) == ([], "")
        assert volumes.list_page(tx, volumes.Filter()) == ([], "")
        assert volume_snapshots.list_page(tx, None) == ([], "")


def test_every_table_of_things_is_one_that_lookups_keep_apart(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        tables = [
            row["name"] for row in tx.rows("SELECT name FROM sqlite_schema WHERE type='table'")
        ]
        owned = {
            table
            for table in tables
            if any(row["name"] == "workspace" for row in tx.rows(f"PRAGMA table_info({table})"))
        }
    assert owned >= lookup.OWNED
    # These are looked up with their workspace each time, by modules of their own.
    assert owned - lookup.OWNED <= {"api_keys", "idempotency", "previews"}


def test_every_word_of_a_request_is_known_to_name_a_thing_or_not() -> None:
    """For whoever adds a field: say so in `support.tenants`, and it is attacked."""
    assert tenants.unknown() == []


def test_both_may_have_the_same_name_and_one_may_not_twice(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        one, other = a_volume(tx, "ann", "data"), a_volume(tx, "bob", "data")
        with pytest.raises(AlreadyExistsError):
            a_volume(tx, "bob", "data")
        third = a_volume(tx, "bob", "more")
        with pytest.raises(AlreadyExistsError):
            volumes.change(tx, third.id, name="data")
    for workspace, volume in (("ann", one), ("bob", other)):
        with catalog.transaction(workspace) as tx:
            assert volumes.resolve(tx, "data") == volume.id


def test_idempotency_keys_are_each_ones_own(catalog: Catalog) -> None:
    for workspace in ("ann", "bob"):
        with catalog.transaction(workspace) as tx:
            assert idempotency.recall(tx, "key", "m", "r") is None
            idempotency.remember(tx, "key", "m", "r", {"sandbox": workspace})
    with catalog.transaction("ann") as tx:
        idempotency.forget(tx, "key")
    with catalog.transaction("bob") as tx:
        assert idempotency.recall(tx, "key", "m", "r") == {"sandbox": "bob"}


def test_a_sum_gives_nobody_anothers_layer(catalog: Catalog) -> None:
    """Imports take what is here already: of images, and of their own workspace."""
    maker, sum_ = Maker(), Sha256("a" * 64)
    with catalog.transaction() as tx:
        layer = sealed(tx)
        contents.note(tx, layer, sum_, below=None)
        snapshots.insert(tx, maker.snapshot(layer, workspace="bob"))
        name, size = contents.name_of(sum_, None), layers.get(tx, layer).size
    found = {}
    for workspace in (None, "ann", "bob"):
        with catalog.transaction(workspace) as tx:
            found[workspace] = contents.reading_as(tx, name, size)
    assert found == {None: layer, "ann": None, "bob": layer}
    with catalog.transaction() as tx:
        images.insert(tx, maker.image(layer=layer, state=ImageState.READY))
    with catalog.transaction("ann") as tx:
        assert contents.reading_as(tx, name, size) == layer


async def test_events_come_to_whom_they_concern() -> None:
    bus, maker = Bus(), Maker()
    reset = acting.set("ann")
    with bus.subscribe() as anns:
        acting.reset(reset)
        with bus.subscribe() as everybodys:
            for name in ("bob", "ann"):
                bus.publish(Happening.UPDATED, maker.sandbox(workspace=name))
            bus.publish(Happening.UPDATED, maker.image())
            bus.end()
    seen = []
    for subscription in (anns, everybodys):
        names = []
        with contextlib.suppress(Exception):
            async with asyncio.timeout(10):
                async for event in subscription.events():
                    names.append(getattr(event.record, "workspace", "image"))
        seen.append(names)
    assert seen == [["ann", "image"], ["bob", "ann", "image"]]


# -- quotas ---------------------------------------------------------------------------------------


def test_what_a_workspace_has(catalog: Catalog) -> None:
    maker = Maker()
    with catalog.transaction() as tx:
        image = sealed(tx, size=500)
        images.insert(tx, maker.image(layer=image, state=ImageState.READY))
        lower, upper = sealed(tx, image, 10), sealed(tx, image, 1)
        top = maker.layer(lower)
        layers.insert(tx, top)
        sandboxes.insert(tx, maker.sandbox(top.id, workspace="ann", cpus=2, memory=256))
        sandboxes.insert(tx, maker.sandbox(workspace="ann", state=SandboxState.TERMINATED))
        sandboxes.insert(tx, maker.sandbox(workspace="bob"))
        point = snapshots.insert(tx, maker.snapshot(lower, workspace="ann"))
        snapshots.insert(tx, maker.snapshot(upper, workspace="ann"))
        snapshots.insert(tx, maker.snapshot(image, workspace="ann"))  # as an import can be
        rams.insert(
            tx,
            point.id,
            SavedRam(
                parent=None, own_bytes=1, bytes=7, state_sha256=Sha256("0" * 64),
                tracking="none", pause=maker.when() - maker.when(), cpu_features=(),
            ),
        )  # fmt: skip
        snapshots.insert(
            tx, maker.snapshot(workspace="ann", state=SnapshotState.CREATING), reserve=3
        )
        a_volume(tx, "ann", "data", 5 * MIB)
        found = workspaces.usage(tx, "ann")
    disk = GIB + 5 * MIB + 10 + 1 + 7 + 3
    assert found == Usage(sandboxes=1, cpus=2, memory=256, disk=disk, snapshots=4)


@pytest.mark.parametrize(
    ("quota", "resource"),
    [
        (Quota(sandboxes=1), "sandboxes"),
        (Quota(cpus=3), "cpus"),
        (Quota(memory=300), "memory"),
        (Quota(disk=3 * GIB // 2), "disk"),
    ],
)
def test_the_last_one_that_may_be_is_made_and_no_more(
    catalog: Catalog, quota: Quota, resource: str
) -> None:
    maker = Maker()

    def make(name: str) -> None:
        with catalog.transaction() as tx:
            layer = maker.layer()
            layers.insert(tx, layer)
            sandboxes.insert(tx, maker.sandbox(layer.id, workspace=name, cpus=2, memory=200))

    with catalog.transaction() as tx:
        workspaces.set_quota(tx, "ann", quota)
    make("ann")
    with pytest.raises(QuotaExceededError) as caught:
        make("ann")
    assert caught.value.metadata["resource"] == resource
    assert caught.value.metadata["limit"] == str(quota.limits()[resource])
    make("bob")
    with catalog.transaction() as tx:
        assert workspaces.usage(tx, "ann").sandboxes == 1, "what was refused is not there"
        assert len(layers.everything(tx)) == 2
        workspaces.set_quota(tx, "ann", Quota())
    make("ann")


def test_a_lowered_quota_takes_nothing_away(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        volume = a_volume(tx, "ann", "data", 8 * MIB)
        workspaces.set_quota(tx, "ann", Quota(disk=MIB, sandboxes=0))
        volumes.change(tx, volume.id, name="other")
        with pytest.raises(QuotaExceededError):
            volumes.change(tx, volume.id, size=9 * MIB)


# -- the rows themselves --------------------------------------------------------------------------


def test_what_is_to_be_in_no_workspace_is_not_made(catalog: Catalog) -> None:
    with pytest.raises(NotFoundError, match="no workspace 'gone'"), catalog.transaction() as tx:
        sandboxes.insert(tx, Maker().sandbox(workspace="gone"))


def test_only_an_empty_one_goes_and_takes_its_keys(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        over = sandboxes.insert(tx, Maker().sandbox(workspace="ann", state=SandboxState.TERMINATED))
        for number, name in enumerate(("ann", "bob")):
            keys.insert(
                tx,
                ApiKey(
                    id=f"key{number}", name=name, role=Role.USER, workspace=name, hash=b"",
                    created_at=tx.now,
                ),
            )  # fmt: skip
        volume = a_volume(tx, "ann", "data")
    with pytest.raises(DeniedError, match="1 volumes"), catalog.transaction() as tx:
        workspaces.delete(tx, "ann")
    with pytest.raises(DeniedError), catalog.transaction() as tx:
        workspaces.delete(tx, "default")
    with catalog.transaction() as tx:
        volumes.delete(tx, volume.id)
        gone = workspaces.delete(tx, "ann")
        assert (gone.keys, gone.sandboxes) == (["key0"], [over.id])
        assert [key.name for key in keys.everything(tx)] == ["bob"]
        assert sandboxes.everything(tx) == []
        assert [each.name for each in workspaces.everything(tx)] == ["bob", "default"]


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a b", "a" * 64, "é", "a\n"])
def test_what_no_workspace_is_called(name: str) -> None:
    with pytest.raises(InvalidArgumentError):
        check_name(name)
    assert check_name("a-1") == "a-1"


def test_what_there_was_before_belongs_to_the_default_one(tmp_path: Path) -> None:
    """The tables of volumes are made anew: attachments and tags that refer to them stay."""
    path = tmp_path / "old.db"
    folder = resources.files("stratabox.storage.catalog").joinpath("migrations")
    scripts = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        for script in scripts[:7]:
            old.executescript(script.read_text("utf-8"))
        old.execute("PRAGMA user_version = 7")
        old.execute("INSERT INTO store (id, boot_id, generation) VALUES ('s', '', 1)")
        box = ", ".join(f"'{each}'" for each in ("b", "box", "stopped"))
        columns = "id, name, state, state_reason, ready, clean_shutdown, image, image_name, cpus,"
        columns += "memory, storage, machine, env, metadata, tags, vmgenid, created_at, updated_at,"
        old.execute(
            f"INSERT INTO sandboxes ({columns} generation)"
            f" VALUES ({box}, '', 0, 0, '', '', 1, 1, 1,"
            " '{}', '{}', '{}', '[]', '', '', '', 1)"
        )
        old.execute(
            "INSERT INTO volumes VALUES ('v','vol','ready','',1,NULL,1,1,NULL,'{}','','',1)"
        )
        old.execute("INSERT INTO attachments VALUES ('v', 'b', '/v', 0, 0, 'attached')")
        old.execute("INSERT INTO tenki_volume_tags VALUES ('v', '[\"t\"]')")
        old.execute("INSERT INTO idempotency VALUES ('k', 'm', 'r', '{}', '')")
    catalog = Catalog(path)
    with catalog.transaction("default") as tx:
        assert volumes.resolve(tx, "vol") == "v"
        assert sandboxes.resolve(tx, "box") == "b"
        assert tx.row("SELECT path FROM attachments")["path"] == "/v"  # type: ignore[index]
        assert tx.row("SELECT tags FROM tenki_volume_tags")["tags"] == '["t"]'  # type: ignore[index]
        assert idempotency.recall(tx, "k", "m", "r") == {}
        assert tx.rows("PRAGMA foreign_key_check") == []
    catalog.close()
