"""A host's disk that fails (EIO) under a running guest: it is told, marked, never tried blindly.

The failure is injected between QEMU's qcow2 layer and its file (blkdebug), over the monitor that
the daemon uses in need only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    Image,
    Sandbox,
    SandboxRecord,
    SandboxState,
    Volume,
    VolumeNotCleanError,
)
from support import disks
from support.daemon import DaemonProcess
from support.waiting import until


def failing_writes(folder: Path, device: str) -> None:
    """From now on every write to that disk's file fails with EIO."""
    top = str(
        disks.ask_qemu(folder, "qom-get", path=f"/machine/peripheral/{device}", property="drive")
    )
    file = "F" + top[1:]
    disks.ask_qemu(
        folder,
        "blockdev-add",
        **{
            "driver": "blkdebug", "node-name": f"fail-{device}", "image": file,
            "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "once": False}],
        },
    )  # fmt: skip
    reopen(folder, top, f"fail-{device}")


def good_again(folder: Path, device: str) -> None:
    """Let go of what `failing_writes` has put in between, once the device itself is gone."""
    disks.ask_qemu(folder, "blockdev-del", **{"node-name": f"fail-{device}"})


def failed_writes(folder: Path, device: str) -> int:
    """How many writes to a disk have failed, as QEMU counts them."""
    stats = disks.ask_qemu(folder, "query-blockstats")
    assert isinstance(stats, list)
    (one,) = [each for each in stats if device in str(each.get("qdev")).split("/")]
    return int(one["stats"]["failed_wr_operations"])


def reopen(folder: Path, top: str, file: str) -> None:
    disks.ask_qemu(
        folder,
        "blockdev-reopen",
        options=[
            {
                "driver": "qcow2", "node-name": top, "file": file, "backing": None,
                "read-only": False, "discard": "ignore", "detect-zeroes": "off",
                "cache": {"direct": False, "no-flush": False},
            }
        ],
    )  # fmt: skip


def is_marked(record: SandboxRecord) -> bool:
    return "DISK FAILED: disk 1" in str(record.state_reason)


def test_a_disk_that_fails_is_marked_until_it_is_started_again(
    client: Client, tiny: Image, shared_daemon: DaemonProcess, sh: Callable[[Sandbox, str], str]
) -> None:
    with client.sandboxes.create(image=tiny.id, memory=128, data_disks=[1]) as box:
        sh(box, "echo good | dd of=/dev/vdb bs=512 conv=sync,fsync 2>/dev/null")
        failing_writes(shared_daemon.state / "sandboxes" / box.id, "disk1")
        told = box.execute("dd if=/dev/zero of=/dev/vdb bs=64k seek=4 count=4 conv=fsync")
        assert told.exit_code != 0, "the guest is told"
        marked = until(client, box.id, is_marked)
        assert marked.state is SandboxState.RUNNING, "it is the guest's to say what it does then"
        assert "Input/output error" in str(marked.state_reason)
        # It is one finding, with its cure, and no repair of ours takes it away.
        (finding,) = client.check(repair=True).left
        assert (finding.reason, finding.subject) == ("DISK_FAILED", box.id)
        assert "start" in finding.cure
        # Pausing and going on does not take it away.
        paused = box.pause()
        assert is_marked(client.sandboxes.get(box.id))
        assert "paused by request" in str(paused.state_reason)
        box.resume()
        assert is_marked(client.sandboxes.get(box.id))
        # A start with a good disk does; what was on it before is there.
        box.stop(force=True)
        started = box.start()
        assert not started.state_reason
        assert sh(started, "head -c 4 /dev/vdb") == "good"
        sh(started, "dd if=/dev/zero of=/dev/vdb bs=64k seek=4 count=4 conv=fsync 2>/dev/null")
        assert client.check().findings == ()


@pytest.fixture
def box(client: Client, tiny: Image) -> Iterator[Sandbox]:
    with client.sandboxes.create(image=tiny.id, memory=128) as box:
        yield box


@pytest.fixture
def volume(client: Client, box: Sandbox) -> Iterator[Volume]:
    """A volume that the guest has at /data, with a file on it that is safe."""
    made = client.volumes.create("failing", size_bytes=16 << 20)
    box.attach_volume(made.id, "/data")
    box.execute("echo good >/data/good; sync").check()
    yield made
    for each in client.volumes.get(made.id).attachments:
        client.sandboxes.get(each.sandbox_id).detach_volume(made.id, force=True)
    client.volumes.delete(made.id)


def test_a_volume_that_fails_is_marked_until_it_is_mounted_anew(
    client: Client, box: Sandbox, volume: Volume, shared_daemon: DaemonProcess
) -> None:
    folder = shared_daemon.state / "sandboxes" / box.id
    failing_writes(folder, "vol0")
    told = box.execute("dd if=/dev/zero of=/data/lost bs=64k count=4 conv=fsync")
    assert told.exit_code != 0, "the guest is told"
    record = until(client, box.id, lambda record: "DISK FAILED" in str(record.state_reason))
    assert "DISK FAILED: volume 'failing'" in str(record.state_reason)
    assert record.state is SandboxState.RUNNING
    marked = client.volumes.get(volume.id)
    assert str(marked.reason).startswith("DISK FAILED: ")
    assert not marked.clean
    # Neither a repair nor a pause has anybody but the guest try again.
    box.execute("sync")
    before = failed_writes(folder, "vol0")
    assert before > 0
    (finding,) = client.check(repair=True).left
    assert (finding.reason, finding.subject) == ("DISK_FAILED", box.id)
    box.pause()
    box.resume()
    assert failed_writes(folder, "vol0") == before
    assert client.volumes.get(volume.id).reason == marked.reason
    # Taken out in good order it is marked still, and not clean: what was written is not there.
    box.detach_volume(volume.id)
    left = client.volumes.get(volume.id)
    assert (left.reason, left.clean, left.attachments) == (marked.reason, False, ())
    with pytest.raises(VolumeNotCleanError):
        box.attach_volume(volume.id, "/data", read_only=True)
    good_again(folder, "vol0")
    # Mounted anew to write, its file system recovers, and what was safe is there.
    box.attach_volume(volume.id, "/data")
    assert client.volumes.get(volume.id).reason is None
    assert box.execute("cat /data/good").stdout == b"good\n"
    box.execute("echo more >/data/more; sync").check()
    box.detach_volume(volume.id)
    assert client.volumes.get(volume.id).clean


def test_a_volume_that_fails_as_it_is_detached_is_not_taken_for_whole(
    client: Client, box: Sandbox, volume: Volume, shared_daemon: DaemonProcess
) -> None:
    """What the guest writes when it unmounts is lost, and its umount does not say so."""
    folder = shared_daemon.state / "sandboxes" / box.id
    box.execute("dd if=/dev/zero of=/data/lost bs=64k count=4").check()
    failing_writes(folder, "vol0")
    record = box.detach_volume(volume.id)
    assert record.volumes == ()
    left = client.volumes.get(volume.id)
    assert (left.clean, left.attachments) == (False, ())
    assert str(left.reason).startswith("DISK FAILED: ")
    # The next failure of it is told like the first.
    good_again(folder, "vol0")
    box.attach_volume(volume.id, "/data")
    assert client.volumes.get(volume.id).reason is None
    failing_writes(folder, "vol0")
    assert box.execute("dd if=/dev/zero of=/data/lost bs=64k count=4 conv=fsync").exit_code != 0
    until(client, box.id, lambda record: "volume 'failing'" in str(record.state_reason))
    assert client.volumes.get(volume.id).reason
    # Shut down in good order, it is not clean by that.
    box.stop()
    stopped = client.volumes.get(volume.id)
    assert (stopped.clean, bool(stopped.reason)) == (False, True)
    box.start()
    assert client.volumes.get(volume.id).reason is None
    assert box.execute("cat /data/good").stdout == b"good\n"
