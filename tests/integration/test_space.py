"""Space told truthfully: what is said to come free does, and the parts are what du finds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from stratabox.client import (
    BudgetExceededError,
    Client,
    NoSpaceError,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotNotFoundError,
    Space,
    StoreNearlyFullError,
)
from support.daemon import DaemonProcess, daemon
from support.rig import wait_idle
from support.stored import Stored

Shell = Callable[[Sandbox, str], str]
MIB = 1 << 20


@dataclass
class Family:
    """A daemon of its own, and a guest with snapshots, copies and all."""

    process: DaemonProcess
    client: Client
    box: str

    @property
    def stored(self) -> Stored:
        return Stored(self.process)

    def restart(self, **settings: str) -> None:
        """Another daemon on the same folder; guests run on."""
        self.client.close()
        self.process.stop()
        self.client = self.process.start(
            environment={f"STRATABOX_{key}": value for key, value in settings.items()}
        )

    def sandbox(self) -> Sandbox:
        return self.client.sandboxes.get(self.box)

    def cli(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stratabox.client.cli", *words],
            env=self.process.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    with daemon(tmp_path_factory.mktemp("space")) as process:
        client = process.start()
        image = client.images.build_tiny()
        box = client.sandboxes.create(image=image.id, name="box", memory=256)
        made = Family(process, client, box.id)
        yield made
        made.client.close()


def write(sh: Shell, sandbox: Sandbox, name: str, mib: int) -> None:
    """Bytes that no file system makes holes of, on the disk when this returns."""
    sh(sandbox, f"dd if=/dev/urandom of=/{name} bs=1M count={mib} 2>/dev/null && sync /{name}")


def check_sums(space: Space) -> None:
    assert space.logical_bytes == space.own_bytes + space.shared_bytes
    assert space.own_bytes >= 0


def delete_and_compare(family: Family, snapshot: Snapshot) -> int:
    """Delete it: exactly what was foreseen, and told as its own, comes free. So many bytes."""
    wait_idle(family.process)  # what was deleted before may have something merged
    before = family.client.snapshots.get(snapshot.id)
    held = family.stored.bytes_on_disk()
    foreseen = family.client.snapshots.delete(snapshot.id, dry_run=True)
    assert family.client.snapshots.get(snapshot.id) == before, "a dry run changes nothing"
    assert family.stored.bytes_on_disk() == held
    done = family.client.snapshots.delete(snapshot.id)
    assert foreseen == done
    assert done.freed_bytes == before.space.own_bytes == held - family.stored.bytes_on_disk()
    with pytest.raises(SnapshotNotFoundError):
        family.client.snapshots.delete(snapshot.id, dry_run=True)
    return done.freed_bytes


def test_own_bytes_are_what_comes_free(family: Family, sh: Shell) -> None:
    client, box = family.client, family.sandbox()
    write(sh, box, "one", 6)
    first = box.snapshot(name="first", level="crash")
    write(sh, box, "two", 3)
    second = box.snapshot(name="second", level="memory")
    write(sh, box, "three", 2)
    third = box.snapshot(name="third", level="memory")
    # From here on nothing is written but what a test writes.
    box.pause()
    copy = client.snapshots.restore(second.id, name="copy")
    shots = [client.snapshots.get(each.id) for each in (first, second, third)]
    listed = {one.id: one for one in client.snapshots.list()}
    for shot in shots:
        check_sums(shot.space)
        assert listed[shot.id].space == shot.space
    assert all(shot.space.own_bytes == 0 for shot in shots[:2]), "the next one stands on each"
    # Its disk layer stays for the sandbox; its memory for the next save of the running process.
    assert shots[2].space.own_bytes == 0
    assert shots[0].space.logical_bytes >= 6 * MIB
    assert shots[1].space.logical_bytes > shots[0].space.logical_bytes + 3 * MIB
    client.sandboxes.pause(copy.id)
    for sandbox in (box, copy):
        check_sums(client.sandboxes.get(sandbox.id).space)
    # A copy that is paused to disk has its memory for itself.
    parked = client.sandboxes.pause(copy.id, to_disk=True)
    assert parked.state is SandboxState.PAUSED
    takes = client.sandboxes.get(copy.id).space
    held = family.stored.bytes_on_disk()
    client.sandboxes.delete(copy.id)
    assert takes.own_bytes == held - family.stored.bytes_on_disk() > 0
    (image,) = client.images.list()
    assert image.space.own_bytes == 0 < image.space.logical_bytes == image.layer_bytes
    # The sandbox gone, the last snapshot is all that needs its layers.
    box = client.sandboxes.get(box.id)
    held = family.stored.bytes_on_disk()
    client.sandboxes.delete(box.id)
    assert box.space.own_bytes == held - family.stored.bytes_on_disk() > 0
    assert delete_and_compare(family, third) > 2 * MIB
    assert delete_and_compare(family, first) == 0, "the second stands on it"
    assert delete_and_compare(family, second) > 9 * MIB, "and takes it along"
    image = client.images.get(image.id)
    assert image.space.own_bytes == image.space.logical_bytes
    # For the tests that follow.
    family.box = client.sandboxes.create(image=image.id, name="box", memory=256).id


def test_the_parts_are_what_du_says(family: Family) -> None:
    box = family.sandbox()
    box.snapshot(name="kept", level="memory")
    box.pause()

    def du() -> int:
        told = subprocess.run(
            ["du", "--summarize", "--block-size=1", family.process.state],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(told.stdout.split()[0])

    # The audit log has a line more after each call, and now and then a block; and the catalog, when
    # a job has looked at what was done. So it is compared when nothing has come meanwhile.
    wait_idle(family.process)
    while True:
        before = du()
        usage = family.client.disk_usage()
        if du() == before:
            break
    assert usage.total_bytes == before
    parts = {part.name: part for part in usage.parts}
    assert usage.total_bytes == sum(part.bytes for part in usage.parts)
    # Folders take nothing on a tmpfs.
    for name in ("images", "snapshots", "sandboxes", "memory", "boot_files", "catalog"):
        assert parts[name].bytes > 0, name
    for name in ("garbage", "work", "quarantine"):
        assert parts[name].bytes <= 4096, name
    assert parts["other"].bytes <= 64 << 10  # the lock, the channel's keys, the audit log
    record = family.client.images.get("tiny")
    assert parts["images"].bytes == record.space.logical_bytes
    assert 0 < usage.filesystem_free_bytes < usage.filesystem_bytes
    # What counts against a budget is all but folders, work and the folders of running guests.
    uncounted = sum(parts[name].bytes for name in ("folders", "work", "reserve"))
    assert 0.9 * (usage.total_bytes - uncounted) < usage.budget_used_bytes
    assert usage.budget_used_bytes <= usage.total_bytes - uncounted
    said = json.loads(family.cli("df", "--json", "--verbose"))
    now = {part["name"]: part["bytes"] for part in said["usage"]["parts"]}
    growing = ("catalog", "other")  # by the calls themselves
    assert now.keys() == parts.keys()
    assert all(now[name] == parts[name].bytes for name in now if name not in growing)
    assert [one["name"] for one in said["snapshots"]] == ["kept"]
    text = family.cli("df", "--verbose")
    assert "total" in text
    assert "kept" in text
    box.resume()


def test_the_tree(family: Family) -> None:
    client, box = family.client, family.sandbox()
    copy = client.snapshots.restore("kept", name="copy", paused=True)
    late = box.snapshot(name="late", level="crash")
    nested = json.loads(family.cli("sandbox", "snapshot", "list", "--tree", "--json"))["tree"]
    (root,) = nested
    assert (root["kind"], root["name"]) == ("sandbox", "box")
    assert [child["name"] for child in root["children"]] == ["kept", "late"]
    (restored,) = root["children"][0]["children"]
    assert (restored["kind"], restored["id"]) == ("sandbox", copy.id)
    assert restored["space"]["own_bytes"] == client.sandboxes.get(copy.id).space.own_bytes
    lines = family.cli("snapshot", "list", "--tree").splitlines()
    assert [re.sub(r"(?<=[0-9a-f]{8})  .*", "", line) for line in lines] == [
        box.id[:8],
        f"├── {client.snapshots.get('kept').id[:8]}",
        "│   └── " + copy.id[:8],
        f"└── {late.id[:8]}",
    ]
    only = json.loads(family.cli("snapshot", "list", "--tree", "--name", "late", "--json"))["tree"]
    assert [child["name"] for child in only[0]["children"]] == ["late"]
    said = json.loads(family.cli("snapshot", "delete", late.id, "--dry-run", "--json"))
    assert said["deleted"] is False
    assert client.snapshots.get(late.id).id == late.id
    client.sandboxes.delete(copy.id)
    client.snapshots.delete(late.id)


def test_a_budget_refuses_what_is_new_and_nothing_else(family: Family, sh: Shell) -> None:
    family.client.images.build_tiny(name="spare")
    wait_idle(family.process)  # what is merged later would make room
    used = family.client.disk_usage().budget_used_bytes
    family.restart(STORE_BUDGET=str(used + 2 * MIB))
    client, box = family.client, family.sandbox()
    kept = box.snapshot(name="fits", level="crash")
    write(sh, box, "more", 8)
    for make in (
        lambda: box.snapshot(level="crash"),
        lambda: box.clone(),
        lambda: client.sandboxes.create(image="tiny"),
        lambda: client.snapshots.restore(kept.id),
        lambda: client.images.build_tiny(name="again"),
    ):
        with pytest.raises(BudgetExceededError) as caught:
            make()
        assert isinstance(caught.value, NoSpaceError)
        assert int(caught.value.metadata["budget"]) == used + 2 * MIB
        assert int(caught.value.metadata["used"]) > used + 2 * MIB
        assert "store.budget" in caught.value.message
    assert [one.id for one in client.snapshots.list(sandbox=box.id)] == [
        kept.id,
        client.snapshots.get("kept").id,
    ]
    assert sh(box, "echo goes on") == "goes on"
    assert client.disk_usage().budget_bytes == used + 2 * MIB
    # What is deleted makes room, at once.
    assert client.images.delete("spare").freed_bytes > 2 * MIB
    box.snapshot(name="fits again", level="crash")
    for snapshot in client.snapshots.list():
        client.snapshots.delete(snapshot.id)


def test_a_file_system_past_its_mark_refuses_the_same(family: Family, sh: Shell) -> None:
    disk = shutil.disk_usage(family.process.state)
    with (family.process.folder / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, max(disk.total // 50 - disk.used, 1))
    family.restart(STORE_HIGH_WATER="1")
    client, box = family.client, family.sandbox()
    with pytest.raises(StoreNearlyFullError) as caught:
        box.snapshot(level="crash")
    assert caught.value.metadata["high_water"] == "1"
    assert float(caught.value.metadata["percent"]) > 1
    with pytest.raises(StoreNearlyFullError):
        client.sandboxes.create(image="tiny")
    assert sh(box, "echo goes on") == "goes on"
    assert client.snapshots.list() == []
    (family.process.folder / "ballast").unlink()
    family.restart()
    family.client.snapshots.delete(family.sandbox().snapshot(level="crash").id)
