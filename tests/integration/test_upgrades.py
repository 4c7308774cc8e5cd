"""State folders of older versions: the daemon of today serves what is in them.

The rows in `older` were written by the daemons of their time, of one scene: a sandbox with two
disks and a volume, two snapshots, one of the volume, a port, a key; the sandbox was stopped then.
The files are made here, by the same scene, and the rows name these.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from stratabox.client import Client, SandboxState, SnapshotState
from support.daemon import DaemonProcess, daemon

OLDER = Path(__file__).with_name("older")
MIGRATIONS = sorted(
    resources.files("stratabox.storage.catalog").joinpath("migrations").iterdir(),
    key=lambda entry: entry.name,
)
# Each as the last daemon of that schema wrote it. Of 5 there was none but while it was being made:
# it is 6 without API keys.
WRITTEN = {4: 4, 5: 6, 6: 6, 7: 7}
LAST = ("store", "suspects")
"""Triggers fill these as other rows come."""


def scene(client: Client) -> None:
    """As each daemon had it done, by the words of its time."""
    client.images.build_tiny()
    client.volumes.create("kept", size_bytes=32 << 20)
    sandbox = client.sandboxes.create(
        name="old", image="tiny", cpus=1, memory=128, volumes=["kept:/data"], data_disks=[1]
    )
    sandbox.execute("echo first >/root/mark; echo kept >/data/mark; sync").check()
    sandbox.snapshot(name="first", level="application")
    sandbox.execute("echo second >/root/mark; sync").check()
    sandbox.snapshot(name="second", level="crash")
    client.volumes.snapshot("kept", name="v1")
    sandbox.stop()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder of today."""
    with daemon(tmp_path_factory.mktemp("upgrades")) as process:
        with process.start() as client:
            scene(client)
        process.stop()
        yield process.state


@pytest.fixture
def place(tmp_path: Path) -> Iterator[DaemonProcess]:
    with daemon(tmp_path) as process:
        yield process
    shutil.rmtree(process.state, ignore_errors=True)


def older(schema: int, catalog: Path) -> dict[str, list[dict[str, Any]]]:
    """What a catalog of that schema had, but with the layers and blobs of this one."""
    text = (OLDER / f"schema-{WRITTEN[schema]}.json").read_text()
    rows: dict[str, list[dict[str, Any]]] = json.loads(text)
    with closing(sqlite3.connect(catalog)) as today:
        today.row_factory = sqlite3.Row
        here = {table: [dict(row) for row in today.execute(f"SELECT * FROM {table}")]
                for table in rows if table != "ports" and table != "api_keys"}  # fmt: skip
    names = dict(zip(parts(rows), parts(here), strict=True))
    assert len(names) == 9 + 6
    for there, now in names.items():
        text = text.replace(there, now)
    rows = json.loads(text)
    if schema < 6:
        rows.pop("api_keys", None)
    return rows


def parts(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every layer and blob, by what it is."""
    (image,), (volume,), (taken,) = rows["images"], rows["volumes"], rows["volume_snapshots"]
    snapshots = {row["id"]: row["name"] for row in rows["snapshots"]}
    disks = sorted((snapshots[row["snapshot"]], row["idx"], row["layer"])
                   for row in rows["snapshot_disks"])  # fmt: skip
    found = [image["layer"], volume["layer"], taken["layer"]]
    found += [layer for _, _, layer in disks]
    found += [row["layer"] for row in sorted(rows["disks"], key=lambda row: int(row["idx"]))]
    machine = json.loads(rows["sandboxes"][0]["machine"])
    found += [machine["kernel_boot"][each] for each in ("kernel", "initrd")]
    return [*found, *(machine["firmware"][name] for name in sorted(machine["firmware"]))]


def write(schema: int, catalog: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A catalog of that schema with these rows."""
    with closing(sqlite3.connect(catalog, isolation_level=None)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        for entry in MIGRATIONS[:schema]:
            old.executescript(entry.read_text("utf-8"))
        for table in (*(each for each in rows if each not in LAST), *LAST):
            if table in LAST:
                old.execute(f"DELETE FROM {table}")
            for row in rows[table]:
                values = {key: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
                          for key, value in row.items()}  # fmt: skip
                marks = ", ".join(f":{key}" for key in values)
                old.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", values)
        old.execute(f"PRAGMA user_version = {schema}")


@pytest.mark.parametrize("schema", WRITTEN)
def test_an_older_folder_is_served(place: DaemonProcess, files: Path, schema: int) -> None:
    shutil.copytree(files, place.state, symlinks=True)
    rows = older(schema, files / "catalog.db")
    for left in (*place.state.glob("catalog.db*"), *place.state.glob("backups/*")):
        left.unlink()
    write(schema, place.state / "catalog.db", rows)
    for folder in (place.state / "sandboxes").iterdir():
        folder.rename(folder.with_name(rows["sandboxes"][0]["id"]))
    if schema == 4:  # of before there was a channel
        shutil.rmtree(place.state / "channel", ignore_errors=True)
    with place.start() as client:
        # As it was, beside the hourly one of what it has become.
        assert list((place.state / "backups").glob(f"*schema-{schema}*"))
        (sandbox,) = client.sandboxes.list()
        assert (sandbox.id, sandbox.state) == (rows["sandboxes"][0]["id"], SandboxState.STOPPED)
        assert (sandbox.name, sandbox.tags, dict(sandbox.metadata)) == ("old", ("t",), {"a": "b"})
        assert (sandbox.keep_last, len(sandbox.disks)) == (3, 2)
        taken = {each.name: each for each in client.snapshots.list()}
        assert {each.id for each in taken.values()} == {row["id"] for row in rows["snapshots"]}
        assert {each.state for each in taken.values()} == {SnapshotState.READY}
        (volume,) = client.volumes.list()
        assert (volume.name, volume.size_bytes) == ("kept", 32 << 20)
        assert [each.name for each in client.volumes.list_snapshots()] == ["v1"]
        assert client.images.get("tiny").id == rows["images"][0]["id"]
        assert len(client.ports.list()) == len(rows.get("ports", []))
        if schema >= 6:
            assert place.rows("SELECT id FROM api_keys") == [(rows["api_keys"][0]["id"],)]
        checked = client.check(deep=True)
        assert checked.findings == ()
        if schema == min(WRITTEN):
            # The machine of then, with its volume; in it a snapshot can be taken and deleted.
            sandbox.start()
            assert sandbox.execute("cat /root/mark /data/mark").stdout == b"second\nkept\n"
            new = sandbox.snapshot(name="new", level="crash")
            client.snapshots.delete(new.id)
        if schema == max(WRITTEN):
            with client.snapshots.restore(taken["first"].id) as copy:
                assert copy.execute("cat /root/mark").stdout == b"first\n"
        place.check_consistent()
    place.wipe()
