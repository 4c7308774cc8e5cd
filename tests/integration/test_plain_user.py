"""A daemon without privileges: it may read its guests' memory, or it says so beforehand."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    Image,
    Sandbox,
    SandboxState,
    SnapshotLevel,
    SnapshotState,
    StrataboxError,
)
from support.daemon import DaemonProcess, daemon
from support.images import add_tiny

IS_ROOT = os.geteuid() == 0
# What a plain user's daemon needs is in folders of root's here: it may read them, and no more.
PLAIN = (
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    "--bounding-set=-all,+dac_read_search",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
    "--",
)
NO_PTRACE = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", "--")


@contextmanager
def daemon_as(wrapper: Sequence[str]) -> Iterator[DaemonProcess]:
    """A daemon in a folder that everybody may use; pytest's own is private."""
    with tempfile.TemporaryDirectory(prefix="stratabox-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        # Built images are locked while they are used, and that takes the right to write.
        asyncio.run(add_tiny(folder / "cache"))
        (folder / "cache").chmod(0o777)
        environment = {
            "HOME": name,
            "STRATABOX_BUILD_CACHE": str(folder / "cache"),
            "STRATABOX_LIBVIRT_FOLDER": str(folder / "emulator"),  # where libvirt is used
        }
        with daemon(folder, environment, wrapper if IS_ROOT else ()) as process:
            yield process


def start(process: DaemonProcess, **environment: str) -> tuple[Client, Sandbox]:
    client = process.start(environment=environment)
    client.images.build_tiny()
    box = client.sandboxes.create(image="tiny", memory=128)
    box.execute("mkdir -p /mnt && mount -t tmpfs none /mnt && echo kept > /mnt/mark").check()
    return client, box


@pytest.fixture
def plain(tiny: Image) -> Iterator[DaemonProcess]:
    """A daemon of a plain user; the image is in the cache by now."""
    with daemon_as(PLAIN) as process:
        yield process


@pytest.fixture
def without_right(tiny: Image) -> Iterator[DaemonProcess]:
    """A daemon that may not look into its guests."""
    with daemon_as(NO_PTRACE) as process:
        if not IS_ROOT:
            # The kernel lets no user look into a program whose file he may not read.
            qemu = process.folder / "qemu"
            found = shutil.which("qemu-system-x86_64")
            assert found
            shutil.copyfile(found, qemu)
            qemu.chmod(0o111)
            process.environment["STRATABOX_QEMU_BINARY"] = str(qemu)
        yield process


def test_memory_also_of_guests_that_an_earlier_daemon_started(plain: DaemonProcess) -> None:
    """Where the kernel has Yama's ptrace_scope=1 this takes the preloaded library's word."""
    client, box = start(plain)
    if IS_ROOT:
        assert Path(f"/proc/{plain.pid}").stat().st_uid == 65534
    first = box.snapshot(level="memory")
    client.close()
    plain.kill()
    client = plain.start()
    second = client.sandboxes.snapshot(box.id, level="memory")
    for snapshot in (first, second):
        with client.snapshots.restore(snapshot.id) as restored:
            assert restored.execute("cat /mnt/mark").stdout == b"kept\n"
    client.close()


def test_unreadable_memory_is_told_before_anything_is_done(without_right: DaemonProcess) -> None:
    client, box = start(without_right, STRATABOX_DEFAULT_LEVEL="memory")
    for call in (lambda: box.snapshot(level="memory"), lambda: box.pause(to_disk=True)):
        with pytest.raises(StrataboxError) as refused:
            call()
        assert refused.value.reason == "MEMORY_UNREADABLE"
        assert "CAP_SYS_PTRACE" in str(refused.value)
        assert client.snapshots.list() == []
        assert box.refresh().state is SandboxState.RUNNING
    # Where nobody insists, the strongest level that is possible.
    snapshot = box.snapshot()
    assert (snapshot.state, snapshot.consistency) == (
        SnapshotState.READY,
        SnapshotLevel.APPLICATION,
    )
    clones = box.clone(wait_for_ready=False)
    assert clones.snapshot.consistency is SnapshotLevel.APPLICATION
    client.close()
