"""Opening the database, what is refused, and what a transaction promises."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from stratabox.storage.catalog import idempotency, images, layers, sandboxes, snapshots
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.model.errors import (
    CorruptError,
    DeniedError,
    NoSpaceError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import LayerId, is_id, mint
from stratabox.storage.model.records import Layer
from support.records import Maker

PAGE = 4096


def open_and_close(path: Path) -> str:
    catalog = Catalog(path)
    catalog.close()
    return catalog.store_id


def refused(path: Path) -> StrataboxError:
    with pytest.raises(StrataboxError) as caught:
        open_and_close(path)
    assert str(path) in caught.value.message
    return caught.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def used(path: Path) -> Path:
    """A catalog that was closed, so that all of it is in one file."""
    open_and_close(path)
    return path


def test_migrations_are_numbered_without_gaps() -> None:
    folder = resources.files("stratabox.storage.catalog").joinpath("migrations")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    assert all(name[4] == "_" for name in names)


def test_a_fresh_file_gets_the_newest_schema(path: Path) -> None:
    catalog = Catalog(path)
    with catalog.transaction() as tx:
        (version,) = tx.rows("PRAGMA user_version")[0]
        tables = tx.rows("SELECT name, sql FROM sqlite_schema WHERE type = 'table'")
        modes = [tx.rows(f"PRAGMA {name}")[0][0] for name in ("journal_mode", "synchronous")]
    catalog.close()
    folder = resources.files("stratabox.storage.catalog").joinpath("migrations")
    assert version == sum(entry.name.endswith(".sql") for entry in folder.iterdir())
    assert {row["name"] for row in tables} == {
        "store", "layers", "images", "sandboxes", "disks", "snapshots", "snapshot_disks",
        "operations", "idempotency", "rams", "jobs", "volumes", "attachments", "volume_snapshots",
        "suspects", "chain_hints", "chain_changes", "api_keys", "authorized_keys", "ports",
        "previews", "secrets", "tenki_sessions", "tenki_snapshot_tags", "tenki_volume_tags",
        "workspaces",
    }  # fmt: skip
    assert all(row["sql"].rstrip().endswith("STRICT") for row in tables)
    assert modes == ["wal", 2]


def test_only_the_daemon_may_read_it(path: Path) -> None:
    catalog = Catalog(path)
    with catalog.transaction() as tx:
        tx.next_generation()
    files = list(path.parent.iterdir())
    assert len(files) == 3
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    catalog.close()
    assert list(path.parent.iterdir()) == [path]


def test_reopened_it_is_the_same_store_with_the_same_rows(path: Path) -> None:
    first = Catalog(path)
    with first.transaction() as tx:
        idempotency.remember(tx, "key", "Create", "hash", {"sandbox": "it"})
        generation = tx.next_generation()
    first.close()
    second = Catalog(path)
    with second.transaction() as tx:
        assert idempotency.recall(tx, "key", "Create", "hash") == {"sandbox": "it"}
        assert tx.next_generation() > generation
    second.close()
    assert second.store_id == first.store_id
    assert is_id(first.store_id)


def test_two_stores_are_not_taken_for_each_other(tmp_path: Path) -> None:
    assert open_and_close(tmp_path / "a") != open_and_close(tmp_path / "b")


def test_what_was_committed_is_there_after_a_kill(path: Path, tmp_path: Path) -> None:
    catalog = Catalog(path)
    with catalog.transaction() as tx:
        idempotency.remember(tx, "key", "Create", "hash", {})
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (path, path.with_name("catalog.db-wal")):
        (copy / name.name).write_bytes(name.read_bytes())
    catalog.close()
    again = Catalog(copy / "catalog.db")
    with again.transaction() as tx:
        assert idempotency.recall(tx, "key", "Create", "hash") == {}
    again.close()


def test_a_newer_schema_is_refused_and_left_alone(used: Path) -> None:
    database = sqlite3.connect(used)
    database.execute("PRAGMA user_version = 9000")
    database.close()
    before = used.read_bytes()
    error = refused(used)
    assert isinstance(error, DeniedError)
    assert error.reason == "CATALOG_TOO_NEW"
    assert "9000" in error.message
    assert used.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"junk" * 1000, b"\0" * PAGE, b"\0" * 5, b"SQLite format 3\0", b"SQLite format 3\0" * 500],
    ids=["text", "zeros", "few-zeros", "magic-only", "magic-again"],
)
def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    error = refused(path)
    assert isinstance(error, CorruptError)
    assert error.reason == "CATALOG_CORRUPT"
    assert path.read_bytes() == content


def test_every_lost_page_is_noticed_at_the_opening(used: Path) -> None:
    whole = used.read_bytes()
    assert len(whole) > 10 * PAGE
    for start in range(0, len(whole), PAGE):
        used.write_bytes(whole[:start] + b"\0" * PAGE + whole[start + PAGE :])
        assert refused(used).reason == "CATALOG_CORRUPT", start


def test_a_truncated_database_is_refused(used: Path) -> None:
    used.write_bytes(used.read_bytes()[: 2 * PAGE])
    assert refused(used).reason == "CATALOG_CORRUPT"


def test_a_database_that_names_no_store_is_refused(used: Path) -> None:
    database = sqlite3.connect(used, isolation_level=None)
    database.execute("DELETE FROM store")
    database.close()
    assert refused(used).reason == "CATALOG_CORRUPT"


def test_somebody_elses_database_is_refused(path: Path) -> None:
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("CREATE TABLE layers (theirs TEXT)")
    database.close()
    assert refused(path).reason == "CATALOG_UNAVAILABLE"
    database = sqlite3.connect(path)
    assert database.execute("SELECT name FROM sqlite_schema").fetchall() == [("layers",)]
    database.close()


def test_a_folder_in_its_place_is_refused(path: Path) -> None:
    path.mkdir()
    assert isinstance(refused(path), UnavailableError)


def test_a_refused_file_is_not_held_open(path: Path) -> None:
    path.write_bytes(b"junk" * 1000)
    refused(path)
    held = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert path not in held


# -- transactions -----------------------------------------------------------------------------


def keys(catalog: Catalog) -> list[str]:
    with catalog.transaction() as tx:
        return [row["key"] for row in tx.rows("SELECT key FROM idempotency ORDER BY key")]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, DeniedError])
def test_a_transaction_that_raises_leaves_nothing(
    catalog: Catalog, kind: type[BaseException]
) -> None:
    def fail() -> None:
        with catalog.transaction() as tx:
            idempotency.remember(tx, "gone", "m", "r", {})
            raise kind("no")

    with pytest.raises(kind):
        fail()
    assert keys(catalog) == []
    with catalog.transaction() as tx:
        idempotency.remember(tx, "kept", "m", "r", {})
    assert keys(catalog) == ["kept"]


def test_a_failed_statement_undoes_the_ones_before_it(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        idempotency.remember(tx, "twice", "m", "r", {})

    def fail() -> None:
        with catalog.transaction() as tx:
            idempotency.remember(tx, "before", "m", "r", {})
            idempotency.remember(tx, "twice", "m", "r", {})

    with pytest.raises(sqlite3.IntegrityError):
        fail()
    assert keys(catalog) == ["twice"]


def test_a_transaction_inside_another_is_refused_and_harms_no_more_than_itself(
    catalog: Catalog,
) -> None:
    with catalog.transaction() as tx:
        idempotency.remember(tx, "outer", "m", "r", {})
        with pytest.raises(UnavailableError), catalog.transaction():
            pytest.fail("a nested transaction was opened")
    assert keys(catalog) == ["outer"]


def test_the_generation_grows_and_a_rollback_gives_it_back(catalog: Catalog) -> None:
    with catalog.transaction() as tx:
        first = tx.next_generation()
        assert tx.next_generation() == first + 1

    def fail() -> None:
        with catalog.transaction() as tx:
            assert tx.next_generation() == first + 2
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    with catalog.transaction() as tx:
        assert tx.next_generation() == first + 2


def test_more_rows_than_can_be_is_corruption(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        maker.chain(tx, 2)
        with pytest.raises(CorruptError):
            tx.row("SELECT * FROM layers")


# -- what the schema itself holds ---------------------------------------------------------------


def broken(catalog: Catalog, maker: Maker, what: str) -> None:
    """Break one promise of the schema."""

    def a_layer(tx: Transaction) -> LayerId:
        return maker.chain(tx, 1)[0]

    nothing = LayerId(mint())
    with catalog.transaction() as tx:
        match what:
            case "a layer on no layer":
                layers.insert(tx, maker.layer(nothing))
            case "a disk without a layer":
                sandboxes.insert(tx, maker.sandbox(nothing))
            case "a snapshot without a layer":
                snapshots.insert(tx, maker.snapshot(nothing))
            case "an image without its layer":
                images.insert(tx, maker.image(layer=nothing))
            case "two writers of a layer":
                layer = a_layer(tx)
                sandboxes.insert(tx, maker.sandbox(layer))
                sandboxes.insert(tx, maker.sandbox(layer))
            case "two guests of a uid":
                sandboxes.insert(tx, maker.sandbox(uid=7))
                sandboxes.insert(tx, maker.sandbox(uid=7))
            case "a parent that goes first":
                tx.execute("DELETE FROM layers WHERE id = ?", (maker.chain(tx, 2)[0],))
            case "a layer that is used":
                layer = a_layer(tx)
                sandboxes.insert(tx, maker.sandbox(layer))
                layers.drop(tx, [layer])
            case "a state that is none":
                tx.execute("UPDATE layers SET state = 'x' WHERE id = ?", (a_layer(tx),))
            case "text for a number":
                tx.execute("UPDATE layers SET size = 'big' WHERE id = ?", (a_layer(tx),))
            case _:
                pytest.fail(what)


@pytest.mark.parametrize(
    "what",
    [
        "a layer on no layer",
        "a disk without a layer",
        "a snapshot without a layer",
        "an image without its layer",
        "two writers of a layer",
        "two guests of a uid",
        "a parent that goes first",
        "a layer that is used",
        "a state that is none",
        "text for a number",
    ],
)
def test_the_schema_refuses(catalog: Catalog, maker: Maker, what: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        broken(catalog, maker, what)
    with catalog.transaction() as tx:
        assert layers.everything(tx) == []
        assert sandboxes.everything(tx) == []


def test_disks_go_with_their_sandbox_and_snapshot(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        image, top = maker.chain(tx, 2)
        sandbox = sandboxes.insert(tx, maker.sandbox(top))
        snapshot = snapshots.insert(tx, maker.snapshot(image))
        assert layers.referenced(tx) == {image, top}
        sandboxes.delete(tx, sandbox.id)
        assert layers.referenced(tx) == {image}
        snapshots.delete(tx, snapshot.id)
        assert layers.referenced(tx) == set()
        assert [layer.id for layer in layers.everything(tx)] == [image, top]


def test_a_chain_is_read_from_the_top(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        made = maker.chain(tx, 5)
        assert [layer.id for layer in layers.chain(tx, made[-1])] == made[::-1]
        assert layers.depth(tx, made[2]) == 3
        with pytest.raises(CorruptError) as caught:
            layers.chain(tx, LayerId(mint()))
    assert caught.value.reason == "LAYER_MISSING"


def test_sealing_tells_when(catalog: Catalog, maker: Maker) -> None:
    with catalog.transaction() as tx:
        (layer,) = maker.chain(tx, 1)
        layers.seal(tx, {layer: 4096})
        found: Layer = layers.everything(tx)[0]
        assert (found.state, found.sealed_at, found.bytes) == ("sealed", tx.now, 4096)


# -- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [8, 48, 400])
def test_a_full_disk_is_named_and_loses_nothing(
    small_disk: Callable[[int], Path], kib: int
) -> None:
    path = small_disk(kib) / "catalog.db"
    written = 0

    def fill() -> None:
        nonlocal written
        catalog = Catalog(path)
        try:
            for number in range(1000):
                with catalog.transaction() as tx:
                    idempotency.remember(tx, f"{number:04}", "m", "r", {"x": "y" * 4000})
                written += 1
        finally:
            catalog.close()

    with pytest.raises(NoSpaceError) as caught:
        fill()
    assert caught.value.reason == "NO_SPACE"
    if written:
        catalog = Catalog(path)
        assert keys(catalog) == [f"{number:04}" for number in range(written)]
        catalog.close()
