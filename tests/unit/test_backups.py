"""Backups of the catalog: made while it is written, refused when damaged, and put back."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib import resources
from pathlib import Path

import pytest

from stratabox.daemon import catalog_tool
from stratabox.daemon.__main__ import main
from stratabox.daemon.config import from_flags
from stratabox.daemon.locking import locked
from stratabox.storage.catalog import images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files import backups
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from stratabox.storage.model.errors import (
    CorruptError,
    DeniedError,
    NoSpaceError,
    NotFoundError,
    StrataboxError,
    UnavailableError,
)
from support.files import mode
from support.records import Maker

MIGRATIONS = sorted(
    resources.files("stratabox.storage.catalog").joinpath("migrations").iterdir(),
    key=lambda entry: entry.name,
)


@pytest.fixture
def layout(store: Store) -> Layout:
    return store.layout


def put(catalog: Catalog, maker: Maker) -> str:
    """One more row; its id."""
    with catalog.transaction() as tx:
        return str(images.insert(tx, maker.image()).id)


def image_ids(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as opened:
        return {row[0] for row in opened.execute("SELECT id FROM images")}


def made(layout: Layout) -> backups.Backup:
    backup = backups.make(layout)
    assert backup is not None
    return backup


def spoil(path: Path) -> None:
    """Overwrite pages in the middle, as a bad disk does."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * 8192)


# -- making ---------------------------------------------------------------------------------------


def test_a_backup_is_the_catalog_of_that_moment(
    layout: Layout, catalog: Catalog, maker: Maker, synced: list[str]
) -> None:
    first = put(catalog, maker)
    synced.clear()
    backup = made(layout)
    assert [name for name in synced if "catalog-" in name or name == "backups"] == [
        f"{backup.path.name}.part", "backups",
    ]  # fmt: skip
    assert mode(backup.path) == 0o600
    put(catalog, maker)
    assert image_ids(backup.path) == {first}
    assert backups.is_sound(backup.path)
    assert [path.name for path in layout.backups.iterdir()] == [backup.path.name]


def test_nothing_is_made_when_nothing_has_changed(
    layout: Layout, catalog: Catalog, maker: Maker
) -> None:
    put(catalog, maker)
    one = made(layout)
    assert backups.make(layout) is None
    put(catalog, maker)
    two = made(layout)
    assert [backup.path for backup in backups.listed(layout)] == [two.path, one.path]


def test_whoever_writes_is_not_held_up_and_the_copy_is_whole(
    layout: Layout, catalog: Catalog, maker: Maker
) -> None:
    """A writer's transactions go on side by side with copies, none of which is torn."""
    for _ in range(200):
        put(catalog, maker)
    stop = threading.Event()
    failures: list[BaseException] = []

    def copy() -> None:
        try:
            while not stop.is_set():
                backups.make(layout)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        written = [put(catalog, maker) for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    assert failures == []
    last = backups.make(layout) or backups.listed(layout)[0]
    assert set(written) <= image_ids(last.path)
    for backup in backups.listed(layout):
        assert backups.is_sound(backup.path)
        assert len(image_ids(backup.path)) >= 200


def test_the_oldest_go(layout: Layout, catalog: Catalog, maker: Maker) -> None:
    taken = []
    for _ in range(4):
        put(catalog, maker)
        taken.append(made(layout))
    before_migration = backups.make(layout, "schema-3")
    assert before_migration is not None
    merged = []
    for _ in range(3):
        put(catalog, maker)
        merged.append(backups.make(layout, backups.MERGED))
    backups.prune(layout, 2)
    left = {backup.path for backup in backups.listed(layout)}
    assert merged[-1] is not None
    assert left == {taken[2].path, taken[3].path, before_migration.path, merged[-1].path}


@pytest.mark.parametrize("point", ["backup.written", "backup.placed"])
def test_killed_while_it_is_made(
    layout: Layout, catalog: Catalog, maker: Maker, point: str
) -> None:
    put(catalog, maker)
    code = (
        "import sys; from pathlib import Path; from stratabox.storage import failpoints;"
        " from stratabox.storage.files import backups;"
        " from stratabox.storage.files.layout import Layout;"
        f" failpoints.arm('{point}=kill'); backups.make(Layout(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(layout.root)], check=False)
    assert done.returncode == -9
    found = backups.listed(layout)
    assert len(found) == (point == "backup.placed")
    assert all(backups.is_sound(backup.path) for backup in found)
    put(catalog, maker)
    made(layout)
    assert {path.suffix for path in layout.backups.iterdir()} == {".db"}


def test_a_full_disk_is_named_and_nothing_is_left(
    small_disk: Callable[[int], Path], maker: Maker
) -> None:
    layout = Store(Layout(small_disk(1200) / "state")).layout
    with closing(Catalog(layout.catalog)) as catalog:
        with contextlib.suppress(NoSpaceError):
            for _ in range(4000):
                put(catalog, maker)
        with pytest.raises(NoSpaceError):
            backups.make(layout)
        assert list(layout.backups.iterdir()) == []


def test_a_damaged_catalog_is_not_backed_up(layout: Layout, catalog: Catalog, maker: Maker) -> None:
    for _ in range(100):
        put(catalog, maker)
    good = made(layout)
    catalog.close()
    spoil(layout.catalog)
    with pytest.raises(CorruptError):
        backups.make(layout)
    assert [path.name for path in layout.backups.iterdir()] == [good.path.name]


# -- migrating ------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path, maker: Maker) -> dict[str, list[dict[str, object]]]:
    """Rows of a catalog of today, as an older one may have had them."""
    with closing(Catalog(tmp_path / "today.db")) as catalog, catalog.transaction() as tx:
        chain = maker.chain(tx, 2)
        image = images.insert(tx, maker.image(layer=chain[0]))
        sandboxes.insert(tx, maker.sandbox(chain[1], image=image.id))
        snapshots.insert(tx, maker.snapshot(chain[0], image=image.id))
        return {
            table: [dict(row) for row in tx.rows(f"SELECT * FROM {table}")]
            for table in ("store", "layers", "images", "sandboxes", "disks", "snapshots",
                          "snapshot_disks")
        }  # fmt: skip


@pytest.mark.parametrize("schema", range(1, len(MIGRATIONS)))
def test_a_catalog_of_each_older_schema_is_kept_and_migrated(
    layout: Layout, rows: dict[str, list[dict[str, object]]], schema: int
) -> None:
    with closing(sqlite3.connect(layout.catalog, isolation_level=None)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        for entry in MIGRATIONS[:schema]:
            old.executescript(entry.read_text("utf-8"))
        for table, records in rows.items():
            present = {row[1] for row in old.execute(f"PRAGMA table_info({table})")}
            for record in records:
                values = {key: value for key, value in record.items() if key in present}
                marks = ", ".join(f":{key}" for key in values)
                old.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", values)
        old.execute(f"PRAGMA user_version = {schema}")
    with closing(backups.open_catalog(layout)) as catalog, catalog.transaction() as tx:
        assert {sandbox.id for sandbox in sandboxes.everything(tx)} == {
            row["id"] for row in rows["sandboxes"]
        }
        assert {snapshot.id for snapshot in snapshots.everything(tx)} == {
            row["id"] for row in rows["snapshots"]
        }
        for layer in layers.everything(tx):
            assert layer.backing == layer.parent
    (backup,) = backups.listed(layout)
    assert backup.kind == f"schema-{schema}"
    with closing(sqlite3.connect(backup.path)) as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (schema,)
        assert len(kept.execute("SELECT id FROM sandboxes").fetchall()) == len(rows["sandboxes"])
    # What was migrated is not migrated, nor kept, again.
    backups.open_catalog(layout).close()
    assert len(backups.listed(layout)) == 1


# -- refused --------------------------------------------------------------------------------------


def test_a_damaged_catalog_is_refused_with_the_way_back(
    layout: Layout, catalog: Catalog, maker: Maker
) -> None:
    for _ in range(100):
        put(catalog, maker)
    good = made(layout)
    put(catalog, maker)
    bad = made(layout)
    catalog.close()
    spoil(layout.catalog)
    spoil(bad.path)
    before = layout.catalog.read_bytes()
    with pytest.raises(CorruptError) as caught:
        backups.open_catalog(layout)
    assert caught.value.reason == "CATALOG_CORRUPT"
    assert good.path.name in caught.value.message, "not the newest, which is damaged too"
    assert "strataboxd catalog restore" in caught.value.message
    assert layout.catalog.read_bytes() == before


def test_without_a_backup_it_says_so(layout: Layout) -> None:
    layout.catalog.write_bytes(b"x" * 8192)
    with pytest.raises(CorruptError, match="no good backup"):
        backups.open_catalog(layout)


def test_no_new_catalog_is_made_where_one_was_lost(
    layout: Layout, catalog: Catalog, maker: Maker
) -> None:
    put(catalog, maker)
    good = made(layout)
    catalog.close()
    layout.catalog.unlink()
    (layout.layers / "some.qcow2").touch()
    with pytest.raises(CorruptError) as caught:
        backups.open_catalog(layout)
    assert caught.value.reason == "CATALOG_LOST"
    assert good.path.name in caught.value.message
    assert not layout.catalog.exists()
    layout.catalog.touch()  # as when its log was lost before anything was folded in
    with pytest.raises(CorruptError) as caught:
        backups.open_catalog(layout)
    assert caught.value.reason == "CATALOG_LOST"
    assert good.path.name in caught.value.message


# -- restoring ------------------------------------------------------------------------------------


@pytest.fixture
def damaged(layout: Layout, catalog: Catalog, maker: Maker) -> set[str]:
    """Two backups, and a catalog that is damaged since; what the older backup holds."""
    ids = {put(catalog, maker) for _ in range(100)}
    made(layout)
    put(catalog, maker)
    made(layout)
    catalog.close()
    spoil(layout.catalog)
    return ids


def aside_of(layout: Layout) -> Iterator[Path]:
    yield from (path for path in layout.quarantine.rglob("*") if path.is_file())


def test_the_newest_good_one_is_put_back_and_the_damaged_one_kept(
    layout: Layout, damaged: set[str]
) -> None:
    newest, older = backups.listed(layout)
    spoil(newest.path)
    bad = layout.catalog.read_bytes()
    (layout.root / "catalog.db-wal").write_bytes(b"a log of the damaged one")
    aside = backups.restore(layout, backups.choose(layout, None))
    assert aside is not None
    assert (aside / "catalog.db").read_bytes() == bad
    assert (aside / "catalog.db-wal").read_bytes() == b"a log of the damaged one"
    assert not (layout.root / "catalog.db-wal").exists()
    assert mode(layout.catalog) == 0o600
    assert image_ids(layout.catalog) == damaged
    backups.open_catalog(layout).close()
    assert older.path.exists()


def test_a_damaged_backup_is_not_put_anywhere(layout: Layout, damaged: set[str]) -> None:
    newest = backups.listed(layout)[0]
    spoil(newest.path)
    before = layout.catalog.read_bytes()
    with pytest.raises(CorruptError):
        backups.restore(layout, backups.choose(layout, newest.path.name))
    assert layout.catalog.read_bytes() == before
    assert list(aside_of(layout)) == []


def test_a_name_that_no_backup_has(layout: Layout, damaged: set[str]) -> None:
    with pytest.raises(NotFoundError) as caught:
        backups.choose(layout, "../catalog.db")
    assert caught.value.reason == "BACKUP_NOT_FOUND"
    assert backups.listed(layout)[0].path.name in caught.value.message


@pytest.mark.parametrize("point", ["restore-catalog.moved", "restore-catalog.placed"])
def test_killed_in_the_middle_the_same_again_helps(
    layout: Layout, damaged: set[str], point: str
) -> None:
    bad = layout.catalog.read_bytes()
    code = (
        "import sys; from pathlib import Path; from stratabox.storage import failpoints;"
        " from stratabox.storage.files import backups;"
        " from stratabox.storage.files.layout import Layout;"
        f" failpoints.arm('{point}=kill'); layout = Layout(Path(sys.argv[1]));"
        " backups.restore(layout, backups.listed(layout)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(layout.root)], check=False)
    assert done.returncode == -9
    if point == "restore-catalog.moved":
        (layout.layers / "some.qcow2").touch()
        with pytest.raises(CorruptError) as caught:
            backups.open_catalog(layout)
        assert caught.value.reason == "CATALOG_LOST"
        backups.restore(layout, backups.listed(layout)[1])
    assert image_ids(layout.catalog) == damaged
    assert bad in [path.read_bytes() for path in aside_of(layout)]


# -- the command ----------------------------------------------------------------------------------


def run(layout: Layout, *words: str) -> int:
    return main(["catalog", *words, "--state-dir", str(layout.root)])


def test_the_command_lists_and_restores(
    layout: Layout, damaged: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = backups.listed(layout)
    spoil(newest.path)
    assert run(layout, "list-backups", "--json") == 0
    told = json.loads(capsys.readouterr().out)["backups"]
    assert [(each["name"], each["sound"]) for each in told] == [
        (newest.path.name, False), (older.path.name, True),
    ]  # fmt: skip
    assert run(layout, "list-backups") == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert run(layout, "restore", newest.path.name) == 1
    assert "damaged" in capsys.readouterr().err
    assert run(layout, "restore", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["restored"] == older.path.name
    assert (Path(answer["kept_aside"]) / "catalog.db").exists()
    assert image_ids(layout.catalog) == damaged


def test_it_is_refused_while_a_daemon_has_the_folder(layout: Layout, damaged: set[str]) -> None:
    config = from_flags({"state_dir": str(layout.root)}, {})
    before = layout.catalog.read_bytes()
    with locked(layout), pytest.raises(DeniedError) as caught:
        catalog_tool.restore(config, None, as_json=False)
    assert caught.value.reason == "STATE_DIR_IN_USE"
    assert layout.catalog.read_bytes() == before


def test_there_must_be_a_state_folder(tmp_path: Path) -> None:
    config = from_flags({"state_dir": str(tmp_path / "none")}, {})
    with pytest.raises(StrataboxError, match="no state folder"):
        catalog_tool.restore(config, None, as_json=False)


# -- locked by somebody else ----------------------------------------------------------------------


def test_a_catalog_that_another_program_holds_is_refused_and_harmed_by_nobody(
    layout: Layout, catalog: Catalog, maker: Maker
) -> None:
    first = put(catalog, maker)
    with catalog.transaction() as tx:
        tx.connection.execute("PRAGMA busy_timeout = 20")
    with closing(sqlite3.connect(layout.catalog, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError) as caught:
            put(catalog, maker)
        assert caught.value.reason == "CATALOG_BUSY"
        assert str(layout.catalog) in caught.value.message
        # A backup needs no turn.
        assert image_ids(made(layout).path) == {first}
    second = put(catalog, maker)
    assert image_ids(layout.catalog) == {first, second}
