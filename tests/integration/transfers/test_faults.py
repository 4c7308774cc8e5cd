"""Archives that are broken off, damaged, or lie; daemons that die: nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratabox.client import (
    DaemonUnavailableError,
    InvalidArchiveError,
    InvalidArgumentError,
    NoSpaceError,
    ResumeMismatchError,
    SnapshotDeletion,
    SnapshotNotFoundError,
)
from support.daemon import DaemonProcess, daemon, small_disk
from support.stored import wait_until
from support.transfers import MIB, Scene, remade, set_in


class EnoughError(Exception):
    """The caller has had enough."""


def test_an_export_goes_on_where_it_ended(scene: Scene) -> None:
    path = scene.folder / "resumed.sbx"
    part = path.with_name("resumed.sbx.part")
    whole = scene.whole.read_bytes()

    def stop(done: int, total: int) -> None:
        if done > total // 3:
            raise EnoughError

    with pytest.raises(EnoughError):
        scene.client.snapshots.export(scene.first.id, path, progress=stop)
    assert not path.exists()
    received = part.stat().st_size
    assert 0 < received < len(whole)
    result = scene.client.snapshots.export(scene.first.id, path)
    assert 0 < result.resumed_bytes <= received
    assert path.read_bytes() == whole
    assert not part.exists()
    # Wherever it ended.
    for size in (3, 48, 2000, len(whole) // 2, len(whole) - 60, len(whole) - 1, len(whole)):
        path.unlink()
        part.write_bytes(whole[:size])
        scene.client.snapshots.export(scene.first.id, path)
        assert path.read_bytes() == whole


def test_what_was_received_of_something_else_is_not_gone_on_with(scene: Scene) -> None:
    path = scene.folder / "mixed.sbx"
    part = path.with_name("mixed.sbx.part")
    part.write_bytes(scene.whole.read_bytes()[:-2000])
    with pytest.raises(ResumeMismatchError, match="begin again"):
        scene.client.snapshots.export(scene.second.id, path)
    assert part.read_bytes() == scene.whole.read_bytes()[:-2000]
    part.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(InvalidArgumentError, match="no part of an archive"):
        scene.client.snapshots.export(scene.second.id, path)
    assert part.read_bytes() == b"#!/bin/sh\n"
    part.unlink()
    path.write_bytes(b"precious")
    with pytest.raises(InvalidArgumentError, match="there already"):
        scene.client.snapshots.export(scene.second.id, path)
    assert path.read_bytes() == b"precious"


def test_a_snapshot_that_goes_meanwhile_is_exported_to_its_end(clean: Scene) -> None:
    came = clean.other.snapshots.import_file(clean.memory, trust=True).snapshot
    path = clean.folder / "deleted.sbx"
    deleted: list[SnapshotDeletion] = []

    def delete(done: int, total: int) -> None:
        if not deleted:
            deleted.append(clean.other.snapshots.delete(came.id))

    clean.other.snapshots.export(came.id, path, memory=True, env=True, progress=delete)
    with pytest.raises(SnapshotNotFoundError):
        clean.other.snapshots.get(came.id)
    wait_until(lambda: clean.there.layers() == set())  # a job may just be giving up
    back = clean.other.snapshots.import_file(path, trust=True).snapshot
    assert clean.content(clean.there, back.id) == clean.content(clean.here, clean.second.id)


class Broken(io.BytesIO):
    """A file that fails where it ends."""

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        if not found:
            raise EnoughError
        return found


def test_an_import_that_is_broken_off_leaves_nothing(clean: Scene) -> None:
    content = clean.memory.read_bytes()
    for size in (0, 20, 5000, len(content) // 2, len(content) - 56, len(content) - 1):
        with pytest.raises(InvalidArchiveError, match="not finished"):
            clean.other.snapshots.import_file(io.BytesIO(content[:size]), trust=True)
        clean.assert_nothing_is_there()
    with pytest.raises(EnoughError):
        clean.other.snapshots.import_file(Broken(content[: len(content) // 2]))
    # The daemon hears of it, and is done when it answers the next.
    with pytest.raises(InvalidArchiveError):
        clean.other.snapshots.import_file(io.BytesIO(b"x" * 100))
    with pytest.raises(InvalidArchiveError, match="more behind its end"):
        clean.other.snapshots.import_file(io.BytesIO(content + b"x"))


# -- damaged, hostile -----------------------------------------------------------------------------


def test_damage_is_found_and_nothing_stays(clean: Scene) -> None:
    content = clean.memory.read_bytes()
    for place in range(60, len(content), len(content) // 12):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        with pytest.raises(InvalidArchiveError) as caught:
            clean.other.snapshots.import_file(io.BytesIO(bytes(damaged)), trust=True)
        assert int(caught.value.metadata["offset"]) <= place + 56
        clean.assert_nothing_is_there()


@pytest.mark.parametrize(
    "change",
    [
        set_in("snapshot", "name", to="../../etc/passwd"),
        set_in("snapshot", "env", to={"A=B": "c"}),
        set_in("snapshot", "cpus", to=1000),
        set_in("snapshot", "storage", to=70_000),
        set_in(
            "snapshot",
            "volumes",
            to=[{"name": "x", "path": "/a/../etc", "read_only": False, "slot": 0}],
        ),
        set_in("snapshot", "machine", "firmware", to={"../x.bin": "0" * 64}),
        set_in("snapshot", "machine", "machine_type", to="pc-q35-7.2,kernel-irqchip=off"),
        set_in("layers", 0, "size", to=1 << 45),
        set_in("members", 0, "layer", to=1),
        set_in("members", 0, "data", to=65536),
        set_in("snapshot", "metadata", to={"other": "metadata"}),  # the trailer knows
    ],
)
def test_manifests_that_lie(clean: Scene, change: Callable[[dict[str, Any]], None]) -> None:
    with pytest.raises(InvalidArchiveError):
        clean.other.snapshots.import_file(io.BytesIO(remade(clean.whole.read_bytes(), change)))


def test_what_declares_more_than_there_is_room_for_is_refused_at_once(clean: Scene) -> None:
    lie = remade(clean.whole.read_bytes(), set_in("members", 0, "data", to=1 << 30))
    with pytest.raises(InvalidArchiveError):  # it may be: a disk of 1 GiB, but it is not
        clean.other.snapshots.import_file(io.BytesIO(lie))
    size = 1 << 35
    # Whatever others on this host may free meanwhile.
    is_too_large = shutil.disk_usage(clean.there.state).free < size - (8 << 30)

    def enlarge(value: dict[str, Any]) -> None:
        value["snapshot"]["disks"][1]["size"] = size
        place = value["snapshot"]["disks"][1]["layer"]
        value["layers"][place]["size"] = size
        for member in value["members"]:
            if member["layer"] == place:
                member |= {"size": size, "data": size}

    if is_too_large:  # else the host has room for the largest image
        with pytest.raises(NoSpaceError, match=r"declares|no room"):
            clean.other.snapshots.import_file(io.BytesIO(remade(clean.whole.read_bytes(), enlarge)))


def test_a_full_disk(scene: Scene, tmp_path: Path) -> None:
    """Up front where the archive says so; in the middle where the disk fills meanwhile."""
    with small_disk(tmp_path) as process:
        client = process.start(environment={"STRATABOX_STORE_HIGH_WATER": "100"})
        usage = os.statvfs(process.state)
        filler = process.state / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, usage.f_bavail * usage.f_frsize - 16 * MIB)
        with pytest.raises(NoSpaceError, match="declares"):
            client.snapshots.import_file(scene.memory, trust=True)
        filler.unlink()

        full = threading.Event()

        def fill(done: int, total: int) -> None:
            if done > total // 2 and not full.is_set():
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while file.write(bytes(MIB)):
                        pass
                full.set()

        with pytest.raises(NoSpaceError):
            client.snapshots.import_file(scene.memory, trust=True, progress=fill)
        assert full.wait(60)  # gRPC reads the file in a thread of its own
        filler.unlink()
        process.check_consistent()
        assert process.layers() == set()
        assert client.snapshots.import_file(scene.memory, trust=True).snapshot.state == "ready"
        client.close()


# -- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    ["import.row-written", "import.received", "import.files-stored", "import.ready-written"],
)
def test_killed_while_importing(scene: Scene, tmp_path: Path, point: str) -> None:
    with daemon(tmp_path) as process:
        client = process.start(failpoints=f"{point}=kill")
        with pytest.raises(DaemonUnavailableError):
            client.snapshots.import_file(scene.memory, trust=True)
        client.close()
        process.wait_killed()
        client = process.start()
        process.check_consistent()
        found = client.snapshots.list()
        assert [each.name for each in found] == (["second"] if "ready" in point else [])
        assert list((process.state / "quarantine").iterdir()) == []
        for snapshot in found:
            assert client.check().findings == ()
            client.snapshots.delete(snapshot.id)
        wait_until(lambda: process.layers() == set())  # a job may just be giving up
        client.close()
        process.stop()


@pytest.mark.parametrize(
    "point",
    ["import.row-written", "import.received", "import.files-stored", "import.ready-written"],
)
def test_a_step_that_fails_leaves_nothing(scene: Scene, tmp_path: Path, point: str) -> None:
    with daemon(tmp_path) as process:
        client = process.start(failpoints=f"{point}=nospace")
        with pytest.raises(NoSpaceError):
            client.snapshots.import_file(scene.memory, trust=True)
        process.check_consistent()
        wait_until(lambda: process.layers() == set())  # a job may just be giving up
        assert client.snapshots.list() == []
        client.close()


def test_killed_while_exporting(clean: Scene, tmp_path: Path) -> None:
    """The client's part stays, and the next daemon goes on with it."""
    clean.other.snapshots.import_file(clean.memory, trust=True)
    path = tmp_path / "killed.sbx"

    def kill(done: int, total: int) -> None:
        if done and clean.there.runs:  # early: what is on its way already comes all the same
            clean.there.kill()

    with pytest.raises(DaemonUnavailableError):
        clean.other.snapshots.export("second", path, memory=True, env=True, progress=kill)
    clean.other.close()
    clean.other = clean.there.start()
    result = clean.other.snapshots.export("second", path, memory=True, env=True)
    assert result.resumed_bytes > 0
    came = clean.other.snapshots.import_file(path, trust=True, name="again").snapshot
    assert clean.content(clean.there, came.id) == clean.content(clean.here, clean.second.id)


def test_nothing_of_this_is_left_behind(scene: Scene) -> None:
    """Descriptors, threads' files: after all that was broken off above."""
    for process in (scene.here, scene.there):
        assert len(links(process)) > 5
        wait_until(lambda process=process: not held(process))  # type: ignore[misc]


def links(process: DaemonProcess) -> list[str]:
    """What a daemon has open."""
    found = []
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(descriptor.readlink()))
    return found


def held(process: DaemonProcess) -> list[str]:
    """Of that, what a job in the background opens, and closes."""
    return [each for each in links(process) if "/layers/" in each or "/work/" in each]
