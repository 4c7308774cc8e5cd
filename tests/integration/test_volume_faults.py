"""The daemon, or a QEMU, dies while something is done with a volume.

Each scenario prepares, hands out the call that is killed at a failpoint, and says afterwards, with
a new daemon, what must have come of it. The volume is the witness's, a guest that lives through all
of it, and what it has written to it must be there after every end.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    CorruptError,
    DaemonUnavailableError,
    SandboxState,
    SnapshotLevel,
    VolumeNotFoundError,
    VolumeSnapshotNotFoundError,
    VolumesUnsupportedError,
)
from stratabox.storage import failpoints
from support import disks
from support.daemon import small_disk
from support.rig import Rig, eventually, rig
from support.waiting import until

MIB = 1 << 20
Scenario = Generator[Callable[[], object], None, None]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(tmp_path_factory.mktemp("volumes")) as made:
        yield made


def devices(rig: Rig, sandbox: str) -> set[str]:
    """What is on a sandbox's bus of volumes, asked of its QEMU."""
    folder = rig.process.state / "sandboxes" / sandbox
    children = disks.ask_qemu(folder, "qom-list", path="/machine/peripheral")
    assert isinstance(children, list)
    return {each["name"] for each in children if each["name"].startswith("vol")} - {"volumes"}


def nodes(rig: Rig, sandbox: str) -> list[str]:
    """Every node of its block graph, and every file that it was given."""
    folder = rig.process.state / "sandboxes" / sandbox
    graph = disks.ask_qemu(folder, "query-named-block-nodes", flat=True)
    sets = disks.ask_qemu(folder, "query-fdsets")
    assert isinstance(graph, list)
    assert isinstance(sets, list)
    labels = [str(fd.get("opaque")) for each in sets for fd in each["fds"]]
    return sorted([str(node["node-name"]) for node in graph] + labels)


def is_settled(rig: Rig) -> bool:
    """No attachment is on its way any more."""
    return not rig.process.rows("SELECT volume FROM attachments WHERE state != 'attached'")


def read(rig: Rig) -> str:
    result = rig.execute("cat /v/file")
    return result.stdout_text.strip() if result.exit_code == 0 else f"? {result.stderr_text}"


def written(rig: Rig, size: int = 16 * MIB) -> str:
    """A volume that the witness has at /v, with a file that tells it from others."""
    name = str(uuid.uuid4())
    rig.client.volumes.create(name, size_bytes=size)
    rig.client.sandboxes.attach_volume(rig.witness.id, name, "/v")
    assert rig.execute(f"echo {name} > /v/file && sync").exit_code == 0
    return name


def remove(rig: Rig, name: str) -> None:
    if rig.client.sandboxes.get(rig.witness.id).volumes:
        rig.client.sandboxes.detach_volume(rig.witness.id, name)
    rig.client.volumes.delete(name)


def create(rig: Rig, point: str) -> Scenario:
    key = str(uuid.uuid4())

    def call() -> object:
        return rig.client.volumes.create(key, size_bytes=MIB, idempotency_key=key)

    yield call
    found = rig.client.volumes.list(name=key)
    assert len(found) == (point == "volume.ready-written")
    again = rig.client.volumes.create(key, size_bytes=MIB, idempotency_key=key)
    assert found in ([], [again])
    rig.client.volumes.delete(again.id)


def copy_of_snapshot(rig: Rig, point: str) -> Scenario:
    volume = rig.client.volumes.create(size_bytes=MIB)
    snapshot = rig.client.volumes.snapshot(volume.id)
    yield lambda: rig.client.volumes.create("copy", from_snapshot=snapshot.id)
    assert rig.client.volumes.list(name="copy") == []
    rig.client.volumes.delete_snapshot(snapshot.id)
    rig.client.volumes.delete(volume.id)


def delete(rig: Rig, point: str) -> Scenario:
    volume = rig.client.volumes.create(size_bytes=MIB)
    yield lambda: rig.client.volumes.delete(volume.id)
    with pytest.raises(VolumeNotFoundError):
        rig.client.volumes.get(volume.id)


def attach(rig: Rig, point: str) -> Scenario:
    """What was claimed is brought to its end by the next daemon, and the same call is fine."""
    name = written(rig)
    rig.client.sandboxes.detach_volume(rig.witness.id, name)
    yield lambda: rig.client.sandboxes.attach_volume(rig.witness.id, name, "/v")
    rig.client.sandboxes.attach_volume(rig.witness.id, name, "/v")
    assert devices(rig, rig.witness.id) == {"vol0"}
    assert read(rig) == name
    remove(rig, name)


def attach_and_wait(rig: Rig, point: str) -> Scenario:
    """The same, with nobody who asks again."""
    name = written(rig)
    rig.client.sandboxes.detach_volume(rig.witness.id, name)
    yield lambda: rig.client.sandboxes.attach_volume(rig.witness.id, name, "/v")
    eventually(lambda: is_settled(rig))
    assert read(rig) == name
    remove(rig, name)


def detach(rig: Rig, point: str) -> Scenario:
    before = nodes(rig, rig.witness.id)
    name = written(rig)
    yield lambda: rig.client.sandboxes.detach_volume(rig.witness.id, name)
    eventually(lambda: is_settled(rig))
    assert rig.client.sandboxes.get(rig.witness.id).volumes == ()
    assert devices(rig, rig.witness.id) == set()
    assert nodes(rig, rig.witness.id) == before
    assert rig.client.volumes.get(name).clean
    rig.client.sandboxes.attach_volume(rig.witness.id, name, "/v")
    assert read(rig) == name
    remove(rig, name)


def detach_of_a_busy_one(rig: Rig, point: str) -> Scenario:
    name = written(rig)
    pid = rig.execute("cd /v; sleep 1000 >/dev/null 2>&1 & echo $!").stdout_text.strip()
    yield lambda: rig.client.sandboxes.detach_volume(rig.witness.id, name)
    eventually(lambda: is_settled(rig))
    assert [each.volume_name for each in rig.client.sandboxes.get(rig.witness.id).volumes] == [name]
    assert read(rig) == name
    rig.execute(f"kill {pid}")
    remove(rig, name)


def resize(rig: Rig, point: str) -> Scenario:
    name = written(rig)
    yield lambda: rig.client.volumes.resize(name, 64 * MIB)
    assert rig.client.volumes.resize(name, 64 * MIB).size_bytes == 64 * MIB
    size = rig.execute("df -m /v | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2").stdout_text
    assert 50 < int(size) <= 64
    assert read(rig) == name
    remove(rig, name)


def snapshot(rig: Rig, point: str, level: SnapshotLevel | None) -> Scenario:
    name, key = written(rig), str(uuid.uuid4())

    def call() -> object:
        return rig.client.volumes.snapshot(name, level=level, idempotency_key=key)

    yield call
    # Of a call that was never answered no snapshot stays, but what was written does.
    found = rig.client.volumes.list_snapshots(volume=name)
    assert len(found) == (point == "volume-snapshot.written")
    assert rig.execute(f"echo {key} >> /v/file && sync").exit_code == 0
    again = rig.client.volumes.snapshot(name, level=level, idempotency_key=key)
    assert again.consistency is (level or SnapshotLevel.APPLICATION)
    rig.client.sandboxes.detach_volume(rig.witness.id, name)
    copy = rig.client.volumes.create(from_snapshot=again.id)
    rig.client.sandboxes.attach_volume(rig.witness.id, copy.id, "/v")
    assert read(rig).split() == ([name] if found else [name, key])
    remove(rig, copy.id)
    rig.client.volumes.delete_snapshot(again.id)
    rig.client.volumes.delete(name)


def snapshot_application(rig: Rig, point: str) -> Scenario:
    yield from snapshot(rig, point, None)


def snapshot_crash(rig: Rig, point: str) -> Scenario:
    yield from snapshot(rig, point, SnapshotLevel.CRASH)


def snapshot_of_one_that_nobody_has(rig: Rig, point: str) -> Scenario:
    name = written(rig)
    rig.client.sandboxes.detach_volume(rig.witness.id, name)
    yield lambda: rig.client.volumes.snapshot(name)
    assert rig.client.volumes.list_snapshots(volume=name) == []
    rig.client.sandboxes.attach_volume(rig.witness.id, name, "/v")
    assert read(rig) == name
    remove(rig, name)


def live_copy(rig: Rig, point: str) -> Scenario:
    name = written(rig)
    yield lambda: rig.client.volumes.create("copy", from_volume=name)
    assert rig.client.volumes.list(name="copy") == []
    assert read(rig) == name
    remove(rig, name)


def delete_snapshot(rig: Rig, point: str) -> Scenario:
    volume = rig.client.volumes.create(size_bytes=MIB)
    taken = rig.client.volumes.snapshot(volume.id)
    yield lambda: rig.client.volumes.delete_snapshot(taken.id)
    with pytest.raises(VolumeSnapshotNotFoundError):
        rig.client.volumes.get_snapshot(taken.id)
    rig.client.volumes.delete(volume.id)


def restore(rig: Rig, point: str) -> Scenario:
    """A copy that had a volume in its memory: the next daemon takes the stand-in away."""
    name = written(rig)
    taken = rig.client.snapshots.create(rig.witness.id, level="memory")
    yield lambda: rig.client.snapshots.restore(taken.id, name="copy", wait_for_ready=True)
    (copy,) = rig.client.sandboxes.list(name="copy")
    copy = rig.client.sandboxes.wait_ready(copy.id, timeout=300)
    assert devices(rig, copy.id) == set()
    assert [each.volume_name for each in copy.left_behind] == [name]
    assert " /v " not in copy.execute("cat /proc/mounts").check().stdout_text
    copy.delete()
    rig.client.snapshots.delete(taken.id)
    assert read(rig) == name
    remove(rig, name)


CASES: list[tuple[str, Callable[[Rig, str], Scenario]]] = [
    *((f"volume.{each}", create) for each in ("row-written", "formatted", "stored")),
    ("volume.ready-written", create),
    ("volume.stored", copy_of_snapshot),
    ("delete-volume.row-removed", delete),
    *((f"volume.{each}", attach) for each in ("claimed", "mounted")),
    *((f"volume.{each}", attach_and_wait) for each in ("plugged", "attached-written")),
    *(
        (f"volume.{each}", detach)
        for each in ("detach-intended", "unmounted", "unplugged", "released")
    ),
    ("volume.detach-intended", detach_of_a_busy_one),
    *((f"volume.{each}", resize) for each in ("grown", "grown-written")),
    *(
        (point, snapshot_application)
        for point in failpoints.NAMES
        if point.startswith("volume-snapshot.")
        and point not in ("volume-snapshot.overlays-made", "volume-snapshot.row-written")
    ),
    *(
        (f"volume-snapshot.{each}", snapshot_crash)
        for each in ("row-written", "overlays-made", "switched")
    ),
    *(
        (f"volume-snapshot.{each}", snapshot_of_one_that_nobody_has)
        for each in ("overlays-made", "sealed")
    ),
    ("volume-snapshot.sealed", live_copy),
    ("delete-volume-snapshot.row-removed", delete_snapshot),
    ("volume.left", restore),
]


@pytest.mark.parametrize(
    ("point", "scenario"), CASES, ids=[f"{case.__name__}-{point}" for point, case in CASES]
)
def test_killed(failing: Rig, point: str, scenario: Callable[[Rig, str], Scenario]) -> None:
    failing.calm()
    failing.client.sandboxes.wait_ready(failing.witness.id, timeout=300)
    steps = scenario(failing, point)
    call = next(steps)
    failing.restart(f"{point}=kill")
    with pytest.raises(DaemonUnavailableError):
        call()
    failing.process.wait_killed()
    failing.restart()
    failing.check()
    assert next(steps, None) is None
    assert failing.client.volumes.list() == []
    failing.process.check_consistent()


def test_every_failpoint_of_volumes_has_its_case() -> None:
    ours = {each for each in failpoints.NAMES if "volume" in each.partition(".")[0]}
    assert ours == {point for point, _ in CASES}


def test_a_qemu_that_dies_leaves_the_claim_and_loses_nothing_that_was_synced(failing: Rig) -> None:
    failing.calm()
    name = written(failing)
    with failing.create() as other:
        failing.process.kill_guest(failing.witness.id)
        eventually(
            lambda: failing.client.sandboxes.get(failing.witness.id).state is SandboxState.FAILED
        )
        (held,) = failing.client.volumes.get(name).attachments
        assert (held.sandbox_id, held.path, held.state) == (failing.witness.id, "/v", "attached")
        assert not failing.client.volumes.get(name).clean
        assert other.refresh().volumes == ()
    failing.client.sandboxes.start(failing.witness.id)
    assert read(failing) == name
    remove(failing, name)


def test_a_check_compares_the_bus_of_volumes(failing: Rig) -> None:
    failing.calm()
    name = written(failing)
    assert failing.client.check().findings == ()
    folder = failing.process.state / "sandboxes" / failing.witness.id
    disks.ask_qemu(folder, "device_del", id="vol0")
    eventually(lambda: devices(failing, failing.witness.id) == set())
    (found,) = failing.client.check().findings
    assert (found.reason, found.subject) == ("GRAPH_MISMATCH", failing.witness.id)
    assert repr(name) in found.message
    failing.client.sandboxes.detach_volume(failing.witness.id, name, force=True)
    assert failing.client.check().findings == ()
    failing.execute("umount -l /v")
    failing.client.volumes.delete(name)


def test_a_machine_of_before_there_were_volumes(failing: Rig) -> None:
    """It has no bus for them until it is started anew; nothing else of it changes."""
    failing.calm()
    old = failing.create()
    failing.client.sandboxes.wait_ready(old.id, timeout=300)
    snapshot = failing.client.snapshots.create(old.id, level="memory")
    failing.client.close()
    failing.process.stop()
    with sqlite3.connect(failing.process.state / "catalog.db") as catalog:
        for table, row in (("sandboxes", old.id), ("snapshots", snapshot.id)):
            catalog.execute(
                f"UPDATE {table} SET machine = json_remove(machine, '$.volumes') WHERE id = ?",
                (row,),
            )
    catalog.close()
    failing.client = failing.process.start()
    volume = failing.client.volumes.create(size_bytes=8 * MIB)
    client = failing.client
    assert not client.sandboxes.get(old.id).machine.volumes  # type: ignore[union-attr]
    with pytest.raises(VolumesUnsupportedError, match="stop it and"):
        client.sandboxes.attach_volume(old.id, volume.id, "/v")
    with pytest.raises(VolumesUnsupportedError, match="cold"):
        client.snapshots.restore(snapshot.id, volumes=[f"{volume.id}:/v"])
    assert client.volumes.get(volume.id).attachments == ()
    client.sandboxes.stop(old.id, force=True)
    client.sandboxes.attach_volume(old.id, volume.id, "/v")
    assert client.sandboxes.start(old.id).machine.volumes  # type: ignore[union-attr]
    assert client.sandboxes.execute(old.id, "touch /v/there && ls /v/there").exit_code == 0
    client.sandboxes.delete(old.id)
    assert client.volumes.get(volume.id).attachments == ()
    client.snapshots.delete(snapshot.id)
    client.volumes.delete(volume.id)


def test_a_guest_whose_volume_finds_the_disk_full_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path) as process:
        client = process.start()
        client.images.build_tiny()
        volume = client.volumes.create("data", size_bytes=1 << 30)
        box = client.sandboxes.create(image="tiny", memory=128, volumes=["data:/v"])
        ballast = process.state / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(process.state).free - 16 * MIB)
        box.execute(
            "(dd if=/dev/urandom of=/v/file bs=1M count=48; sync; md5sum /v/file > /v/sum)"
            " >/dev/null 2>&1 &"
        )
        until(client, box.id, lambda one: one.state is SandboxState.PAUSED)
        ballast.unlink()
        until(client, box.id, lambda one: one.state is SandboxState.RUNNING)
        done = box.execute("while [ ! -s /v/sum ]; do sleep 0.1; done; md5sum -c /v/sum")
        assert done.exit_code == 0, done
        box.delete()
        client.volumes.delete(volume.id)
        client.close()


def test_a_volume_whose_file_is_gone_says_so(failing: Rig) -> None:
    failing.calm()
    volume = failing.client.volumes.create(size_bytes=MIB)
    taken = failing.client.volumes.snapshot(volume.id)
    ((layer,),) = failing.process.rows(
        f"SELECT layer FROM volume_snapshots WHERE id = '{taken.id}'"
    )
    path = failing.path(str(layer))
    away = path.rename(failing.process.folder / "away")
    failing.restart()
    assert str(layer) in (failing.client.volumes.get(volume.id).reason or "")
    with pytest.raises(CorruptError):
        failing.client.sandboxes.attach_volume(failing.witness.id, volume.id, "/v")
    away.rename(path)
    failing.restart()
    assert failing.client.volumes.get(volume.id).reason is None
    failing.client.sandboxes.wait_ready(failing.witness.id, timeout=300)
    failing.client.sandboxes.attach_volume(failing.witness.id, volume.id, "/v")
    failing.client.sandboxes.detach_volume(failing.witness.id, volume.id)
    failing.client.volumes.delete_snapshot(taken.id)
    failing.client.volumes.delete(volume.id)
