"""Volumes in real guests: who may have one, what it holds, what no copy of a guest may do to it.

One guest is booted; the others go on from its memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from stratabox.client import (
    Client,
    Image,
    InvalidArgumentError,
    InvalidResourcesError,
    InvalidStateError,
    Sandbox,
    SandboxState,
    Snapshot,
    SnapshotLevel,
    Volume,
    VolumeAlreadyExistsError,
    VolumeBusyError,
    VolumeInUseError,
    VolumeMount,
    VolumeNotAttachedError,
    VolumeNotCleanError,
    VolumeNotFoundError,
    VolumeSnapshotNotFoundError,
)
from stratabox.client.cli import cli
from support import disks
from support.agents import soon
from support.daemon import DaemonProcess
from support.waiting import watching

MIB = 1 << 20
Sh = Callable[[Sandbox, str], str]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def booted(client: Client, tiny: Image) -> Iterator[Snapshot]:
    """The memory of a guest that has booted, and has no volume."""
    with client.sandboxes.create(image=tiny.id, memory=192) as box:
        box.execute("sync").check()
        snapshot = box.snapshot(level="memory")
    yield snapshot
    client.snapshots.delete(snapshot.id)


@pytest.fixture
def guests(client: Client, booted: Snapshot) -> Iterator[Callable[..., Sandbox]]:
    """Make guests that have just booted, within half a second; gone at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options: object) -> Sandbox:
            made: Sandbox = client.snapshots.restore(booted.id, **options)  # type: ignore[arg-type]
            return stack.enter_context(made)

        yield make


@pytest.fixture
def volumes(client: Client, guests: object) -> Iterator[Callable[..., Volume]]:
    """Make volumes with names of their own; gone before the test ends, as no guest has them."""
    made: list[str] = []

    def make(size: int = 32 * MIB, **options: object) -> Volume:
        name = f"volume-{next(_numbers)}"
        volume = client.volumes.create(name, size_bytes=size, **options)  # type: ignore[arg-type]
        made.append(volume.id)
        return volume

    yield make
    for sandbox in client.sandboxes.list():
        if sandbox.volumes:
            sandbox.delete()
    for volume in made:
        with contextlib.suppress(VolumeNotFoundError):
            client.volumes.delete(volume)


def layer_of(process: DaemonProcess, volume: Volume) -> Path:
    ((layer,),) = process.rows(f"SELECT layer FROM volumes WHERE id = '{volume.id}'")
    return process.state / "layers" / f"{layer}.qcow2"


def plugged(process: DaemonProcess, sandbox: Sandbox) -> set[str]:
    """Devices on a sandbox's bus of volumes, and nodes that stand in for some; asked of QEMU."""
    folder = process.state / "sandboxes" / sandbox.id
    children = disks.ask_qemu(folder, "qom-list", path="/machine/peripheral")
    nodes = disks.ask_qemu(folder, "query-named-block-nodes", flat=True)
    assert isinstance(children, list)
    assert isinstance(nodes, list)
    devices = {each["name"] for each in children if each["name"].startswith("vol")}
    return (devices - {"volumes"}) | {
        each["node-name"] for each in nodes if each["node-name"].startswith("stand-in")
    }


def test_a_volume_has_a_life_of_its_own(client: Client, volumes: Callable[..., Volume]) -> None:
    volume = volumes(5 * MIB, metadata={"team": "a"})
    assert (volume.state, volume.size_bytes, volume.attachments) == ("ready", 5 * MIB, ())
    assert volume.clean
    assert 0 < volume.space.own_bytes < 2 * MIB
    for reference in (volume.id, volume.name, volume.id[:13]):
        assert client.volumes.get(reference) == volume
    assert [each.id for each in client.volumes.list(metadata={"team": "a"})] == [volume.id]
    with pytest.raises(VolumeAlreadyExistsError):
        client.volumes.create(volume.name, size_bytes=MIB)
    changed = client.volumes.update(volume.id, name="another", metadata={})
    assert (changed.name, changed.metadata) == ("another", {})
    assert changed.generation > volume.generation
    assert client.volumes.delete("another").freed_bytes == volume.space.own_bytes
    with pytest.raises(VolumeNotFoundError):
        client.volumes.get(volume.id)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB + 1, -MIB, (16 << 40) + MIB])
def test_sizes_that_cannot_be(client: Client, size: int) -> None:
    with pytest.raises(InvalidResourcesError):
        client.volumes.create(size_bytes=size)


def test_the_smallest_and_the_largest(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    box = guests()
    for size in (MIB, 1 << 40):
        volume = volumes(size)
        assert volume.space.own_bytes < size // 1000 + MIB
        box.attach_volume(volume.id, "/mnt/v")
        assert sh(box, "echo fits > /mnt/v/file && sync && cat /mnt/v/file") == "fits"
        box.detach_volume(volume.id)


def test_the_same_key_makes_one(client: Client) -> None:
    made = [client.volumes.create(size_bytes=MIB, idempotency_key="just one") for _ in range(2)]
    assert made[0] == made[1]
    client.volumes.delete(made[0].id)


def test_one_writer_or_any_number_of_readers(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    volume, one, other, third = volumes(), guests(name="one"), guests(), guests()
    one = one.attach_volume(volume.name, "/srv/da ta/")
    (mount,) = one.volumes
    assert (mount.volume, mount.path, mount.state) == (volume.id, "/srv/da ta", "attached")
    assert one.attach_volume(volume.id, "/srv/da ta").volumes == one.volumes, "twice is once"
    sum_ = sh(
        one,
        "cd '/srv/da ta'; dd if=/dev/urandom of=x bs=1M count=4 2>/dev/null; md5sum <x",
    )
    for read_only in (False, True):
        with pytest.raises(
            VolumeInUseError, match="'one' has it to write, at /srv/da ta"
        ) as refused:
            other.attach_volume(volume.id, "/v", read_only=read_only)
        assert refused.value.metadata["holders"] == one.id
    with pytest.raises(VolumeInUseError):
        client.volumes.delete(volume.id)
    assert one.detach_volume(volume.id).volumes == ()
    assert "da ta" not in sh(one, "cat /proc/mounts")
    # No sync: what was written is there because the guest has let go in order.
    for box in (other, third):
        box.attach_volume(volume.id, "/v", read_only=True)
        assert sh(box, "md5sum </v/x") == sum_
        assert box.execute("touch /v/y").exit_code != 0
        assert box.execute("echo 1 >/dev/sda").exit_code != 0, "not past the file system, either"
    with pytest.raises(VolumeInUseError, match="to read"):
        one.attach_volume(volume.id, "/v")
    assert len(client.volumes.get(volume.id).attachments) == 2
    other.detach_volume(volume.id)
    third.terminate()
    assert client.volumes.get(volume.id).attachments == ()


def test_at_creation_over_a_stop_and_a_reboot(
    client: Client, tiny: Image, volumes: Callable[..., Volume], guests: object, sh: Sh
) -> None:
    writes, reads = volumes(), volumes()
    mounts: list[VolumeMount | str] = [
        f"{writes.name}:/data",
        VolumeMount(volume=reads.id, path="/ro", read_only=True),
    ]
    with client.sandboxes.create(image=tiny.id, memory=192, volumes=mounts) as box:
        sh(box, "echo kept > /data/file")
        assert box.execute("touch /ro/file").exit_code != 0
        box = box.stop()
        assert [each.state for each in box.volumes] == ["attached", "attached"]
        with pytest.raises(VolumeInUseError):
            client.volumes.delete(writes.id)
        assert client.volumes.get(writes.id).clean, "its guest has shut down in order"
        # Claimed while it is stopped; there when it is ready.
        third = volumes()
        box.attach_volume(third.id, "/data/below")
        box.detach_volume(reads.id)
        box = box.start()
        assert sh(box, "cat /data/file; grep -c ' /data/below ext4 ' /proc/mounts") == "kept\n1"
        assert "/ro" not in sh(box, "cat /proc/mounts")
        with watching(client, box.id) as events:
            assert next(events).sandbox.ready
            sh(box, "sync")
            soon(box, "reboot")
            next(event for event in events if not event.sandbox.ready)
        box = client.sandboxes.wait_ready(box.id, timeout=300)
        assert sh(box, "cat /data/file; grep -c ' /data/below ext4 ' /proc/mounts") == "kept\n1"


def test_a_guest_that_does_not_let_go_keeps_it(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    volume, box = volumes(), guests()
    box.attach_volume(volume.id, "/v")
    pid = sh(box, "cd /v; sleep 1000 >/dev/null 2>&1 & echo $!")
    with pytest.raises(VolumeBusyError, match="sleep") as busy:
        box.detach_volume(volume.id)
    assert f"{pid} (sleep)" in busy.value.metadata["processes"]
    assert [each.state for each in box.refresh().volumes] == ["attached"]
    assert sh(box, "echo goes on > /v/file && cat /v/file") == "goes on"
    sh(box, f"kill {pid}")
    assert box.detach_volume(volume.id).volumes == ()
    with pytest.raises(VolumeNotAttachedError):
        box.detach_volume(volume.id)
    # By force: nothing is asked of the guest, and the file system was not closed.
    box.attach_volume(volume.id, "/v")
    sh(box, "cd /v; sleep 1000 >/dev/null 2>&1 & sync; echo lost > /v/late")
    assert box.detach_volume(volume.id, force=True).volumes == ()
    assert not client.volumes.get(volume.id).clean
    other = guests()
    with pytest.raises(VolumeNotCleanError):
        other.attach_volume(volume.id, "/v", read_only=True)
    other.attach_volume(volume.id, "/v")
    assert sh(other, "cat /v/file") == "goes on"
    other.detach_volume(volume.id)
    other.attach_volume(volume.id, "/v", read_only=True)
    assert client.volumes.get(volume.id).clean


def test_a_copy_of_a_guest_leaves_its_volume_behind(
    client: Client,
    shared_daemon: DaemonProcess,
    volumes: Callable[..., Volume],
    guests: Callable[..., Sandbox],
    sh: Sh,
) -> None:
    volume, mine, box = volumes(), volumes(), guests()
    box.attach_volume(volume.id, "/v")
    # Written and not yet on the disk: the copy has it in its memory, and would write it.
    sh(box, "echo first > /v/file; sync; echo dirty > /v/file; cd /v; sleep 1000 >/dev/null 2>&1 &")
    snapshot = box.snapshot(level="memory")
    box = box.pause()
    before = disks.digest(layer_of(shared_daemon, volume))
    assert [(each.volume, each.path) for each in snapshot.volumes] == [(volume.id, "/v")]
    with client.snapshots.restore(snapshot.id, volumes=[f"{mine.id}:/v"]) as copy:
        assert [(each.volume, each.path) for each in copy.left_behind] == [(volume.id, "/v")]
        assert [(each.volume, each.path) for each in copy.volumes] == [(mine.id, "/v")]
        assert plugged(shared_daemon, copy) == {"vol0"}
        assert sh(copy, "sync; ls /v; grep -c ' /v ' /proc/mounts") == "lost+found\n1"
        sh(copy, "echo of the copy > /v/file; sync")
    with client.snapshots.restore(snapshot.id) as copy:
        assert copy.volumes == ()
        assert plugged(shared_daemon, copy) == set()
        assert sh(copy, "sync; ls /v /sys/block") == "/sys/block:\nvda\n\n/v:"
        assert " /v " not in sh(copy, "cat /proc/mounts")
    with client.snapshots.restore(snapshot.id, cold=True) as copy:
        assert [each.volume for each in copy.left_behind] == [volume.id]
        assert copy.volumes == ()
    assert disks.digest(layer_of(shared_daemon, volume)) == before
    box = box.resume()
    assert sh(box, "cat /v/file") == "dirty"
    client.snapshots.delete(snapshot.id)


def test_snapshots_of_a_guest_do_not_hold_its_volumes(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    volume, box = volumes(), guests()
    box.attach_volume(volume.id, "/v")
    sh(box, "echo here > /v/file")
    taken = [box.snapshot(level=level) for level in ("crash", "application")]
    assert taken[1].frozen_filesystems == 2, "its own and the volume's"
    assert [len(each.volumes) for each in taken] == [1, 1]
    with client.snapshots.restore(taken[1].id) as copy:
        assert [each.volume for each in copy.left_behind] == [volume.id]
        assert sh(copy, "ls /v /sys/block") == "/sys/block:\nvda\n\n/v:"
    for snapshot in taken:
        client.snapshots.delete(snapshot.id)


def test_a_paused_guest_keeps_its_claim(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    volume, box, other = volumes(), guests(), guests()
    box.attach_volume(volume.id, "/v")
    sh(box, "(while :; do echo tick; sleep 0.1; done) >/v/ticks 2>&1 &")
    for to_disk in (False, True):
        box = box.pause(to_disk=to_disk)
        with pytest.raises(VolumeInUseError):
            other.attach_volume(volume.id, "/v")
        for refused in (
            partial(box.detach_volume, volume.id),
            partial(box.attach_volume, volume.id, "/w"),
            partial(client.volumes.resize, volume.id, 64 * MIB),
        ):
            with pytest.raises(InvalidStateError):
                refused()
        # Its disk can be captured all the same, as after a power cut.
        assert client.volumes.snapshot(volume.id).consistency is SnapshotLevel.CRASH
        box = box.resume()
        before = int(sh(box, "wc -l </v/ticks"))
        sh(box, f"while [ $(wc -l </v/ticks) -le {before} ]; do sleep 0.05; done")
    for snapshot in client.volumes.list_snapshots(volume=volume.id):
        client.volumes.delete_snapshot(snapshot.id)


def test_a_revert_leaves_the_volume_as_it_is_now(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    kept, given = volumes(), volumes()
    box = guests()
    for volume in (kept, given):
        box.attach_volume(volume.id, f"/{volume.name}")
    sh(box, f"echo then > /{kept.name}/file; echo then > /here")
    snapshot = box.snapshot(level="memory")
    sh(box, f"echo now > /{kept.name}/file; echo now > /here; sync")
    box.detach_volume(given.id)
    reverted = box.revert(snapshot.id).sandbox
    assert [each.volume for each in reverted.volumes] == [kept.id]
    assert [each.volume for each in reverted.left_behind] == [given.id]
    assert sh(reverted, f"cat /here /{kept.name}/file") == "then\nnow"
    for each in client.snapshots.list(sandbox=box.id):
        client.snapshots.delete(each.id)


def test_a_volume_grows(
    client: Client, volumes: Callable[..., Volume], guests: Callable[..., Sandbox], sh: Sh
) -> None:
    volume, box = volumes(16 * MIB), guests()
    with pytest.raises(InvalidResourcesError):
        client.volumes.resize(volume.id, 15 * MIB)
    client.volumes.resize(volume.id, 64 * MIB)
    box.attach_volume(volume.id, "/v", read_only=True)
    with pytest.raises(VolumeInUseError):
        client.volumes.resize(volume.id, 128 * MIB)
    box.detach_volume(volume.id)
    box.attach_volume(volume.id, "/v")

    def mib() -> int:
        return int(sh(box, "df -m /v | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2"))

    assert 50 < mib() <= 64, "what grew while nobody had it, grows when it is mounted to write"
    assert client.volumes.resize(volume.id, 300 * MIB).size_bytes == 300 * MIB
    assert 250 < mib() <= 300
    sh(box, "dd if=/dev/zero of=/v/large bs=1M count=200 2>/dev/null; sync")
    snapshot = client.volumes.snapshot(volume.id)
    client.volumes.resize(volume.id, 400 * MIB)
    assert 350 < mib() <= 400, "also on top of a sealed layer"
    box.detach_volume(volume.id)
    client.volumes.resize(volume.id, 500 * MIB)
    box.attach_volume(volume.id, "/v")
    assert 450 < mib() <= 500
    assert int(sh(box, "du -m /v/large | cut -f 1")) >= 200
    client.volumes.delete_snapshot(snapshot.id)


def test_snapshots_and_copies_of_volumes(
    client: Client,
    shared_daemon: DaemonProcess,
    volumes: Callable[..., Volume],
    guests: Callable[..., Sandbox],
    sh: Sh,
) -> None:
    volume, box = volumes(), guests()
    fresh = client.volumes.snapshot(volume.id, name="fresh")
    assert fresh.consistency is SnapshotLevel.APPLICATION, "nobody has written it"
    box.attach_volume(volume.id, "/v")
    sh(box, "echo one > /v/file; (while :; do date > /v/busy; done) >/dev/null 2>&1 &")
    taken = client.volumes.snapshot(volume.id)
    assert (taken.consistency, taken.volume_name) == (SnapshotLevel.APPLICATION, volume.name)
    ((layer,),) = shared_daemon.rows(f"SELECT layer FROM volume_snapshots WHERE id = '{taken.id}'")
    sealed = shared_daemon.state / "layers" / f"{layer}.qcow2"
    assert not disks.needs_recovery(sealed)
    before = disks.digest(sealed)
    crash = client.volumes.snapshot(volume.id, level="crash")
    assert crash.consistency is SnapshotLevel.CRASH
    sh(box, "echo two > /v/file; sync")
    with pytest.raises(InvalidArgumentError):
        client.volumes.snapshot(volume.id, level="memory")
    copy = volumes(64 * MIB, from_snapshot=taken.id)
    live = volumes(0, from_volume=volume.id)
    rough = volumes(0, from_snapshot=crash.id)
    assert (copy.source_id, live.source_id) == (taken.id, volume.id)
    assert (copy.clean, live.clean, rough.clean) == (True, True, False)
    reader = guests(volumes=[f"{copy.id}:/a", f"{live.id}:/b:ro", f"{rough.id}:/c"])
    assert sh(reader, "cat /a/file /b/file /c/file") == "one\ntwo\none"
    sh(reader, "echo three > /a/file; sync")
    assert sh(box, "cat /v/file") == "two"
    assert int(sh(reader, "df -m /a | tail -n 1 | tr -s ' ' | cut -d ' ' -f 2")) > 50
    reader.detach_volume(live.id)  # shares layers with what stays
    assert sh(reader, "cat /a/file /c/file") == "three\none"
    box.detach_volume(volume.id, force=True)
    client.volumes.delete(volume.id)
    assert client.volumes.list_snapshots(volume=volume.id) == [crash, taken, fresh]
    assert disks.digest(sealed) == before
    for each in (fresh, taken, crash):
        client.volumes.delete_snapshot(each.id)
    with pytest.raises(VolumeSnapshotNotFoundError):
        client.volumes.get_snapshot(fresh.id)
    assert sh(reader, "cat /a/file /c/file") == "three\none"


def test_what_cannot_be_attached(
    client: Client, tiny: Image, volumes: Callable[..., Volume], guests: Callable[..., Sandbox]
) -> None:
    box, volume, other = guests(), volumes(), volumes()
    with pytest.raises(VolumeNotFoundError):
        box.attach_volume("no such volume", "/v")
    for path in ("", "relative", "/", "/etc/", "/a/../../proc/1"):
        with pytest.raises(InvalidArgumentError, match="cannot be mounted"):
            box.attach_volume(volume.id, path)
    box.attach_volume(volume.id, "/v")
    with pytest.raises(InvalidArgumentError, match="has volume"):
        box.attach_volume(other.id, "/v/")
    with pytest.raises(VolumeInUseError):
        box.attach_volume(volume.id, "/elsewhere")
    with pytest.raises(InvalidArgumentError, match="two volumes"):
        client.sandboxes.create(image=tiny.id, volumes=[f"{other.id}:/a", f"{volume.id}:/a"])
    before = len(client.sandboxes.list(include_terminated=True))
    with pytest.raises(VolumeInUseError):
        client.sandboxes.create(image=tiny.id, volumes=[f"{other.id}:/a", f"{volume.id}:/b"])
    assert len(client.sandboxes.list(include_terminated=True)) == before
    assert client.volumes.get(other.id).attachments == (), "all or nothing"
    terminated = box.terminate()
    assert terminated.volumes == ()
    with pytest.raises(InvalidStateError):
        terminated.attach_volume(volume.id, "/v")
    assert client.volumes.get(volume.id).attachments == ()
    assert terminated.state is SandboxState.TERMINATED


def test_by_the_command_line(
    shared_daemon: DaemonProcess, guests: Callable[..., Sandbox], sh: Sh
) -> None:
    box = guests(name="a box with a disk")

    def run(*words: str, code: int = 0) -> dict[str, Any]:
        environment = {"STRATABOX_ADDRESS": shared_daemon.address}
        done = CliRunner().invoke(cli, [*words, "--json"], env=environment)
        assert done.exit_code == code, done.output
        answer: dict[str, Any] = json.loads(done.stderr if code else done.stdout)
        return answer

    made = run("volume", "create", "by hand", "--size", "8MiB", "--metadata", "a=b")
    assert (made["size_bytes"], made["state"], made["metadata"]) == (8 * MIB, "ready", {"a": "b"})
    assert run("volume", "update", "by hand", "--name", "disk")["id"] == made["id"]
    attached = run("volume", "attach", "disk", "--session", box.name, "--path", "/v")
    assert [each["volume_name"] for each in attached["volumes"]] == ["disk"]
    sh(box, "echo typed > /v/file")
    assert run("volume", "resize", "disk", "--size", "16MiB")["size_bytes"] == 16 * MIB
    (listed,) = run("volume", "list", "--name", "disk")["volumes"]
    assert [each["sandbox_id"] for each in listed["attachments"]] == [box.id]
    refused = run("volume", "delete", "disk", code=4)["error"]
    assert (refused["reason"], refused["metadata"]["holders"]) == ("VOLUME_IN_USE", box.id)
    taken = run("volume", "snapshot", "create", "disk", "--name", "typed", "--level", "application")
    assert run("volume", "snapshot", "get", "typed") == taken
    found = run("volume", "snapshot", "list", "--volume", "disk")["volume_snapshots"]
    assert found == [taken]
    run("volume", "create", "copy", "--from-snapshot", "typed")
    assert run("volume", "detach", "disk", "--session", box.id)["volumes"] == []
    new = run("sandbox", "snapshot", "create", box.id, "--quick")
    words = ("sandbox", "create", "--snapshot", new["id"], "--volume", "copy:/c:ro")
    other = run(*words, "--volume", "disk:/d")
    assert [(each["path"], each["read_only"]) for each in other["volumes"]] == [
        ("/c", True), ("/d", False),
    ]  # fmt: skip
    run("sandbox", "delete", other["id"])
    run("snapshot", "delete", new["id"])
    run("volume", "snapshot", "delete", "typed")
    assert run("volume", "delete", "copy")["deleted"]
    assert run("volume", "delete", "disk")["freed_bytes"] > 0
    assert run("volume", "get", "disk", code=3)["error"]["reason"] == "VOLUME_NOT_FOUND"
    assert run("volume", "create", "none", code=2)["error"]["reason"] == "USAGE"
