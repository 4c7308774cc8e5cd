"""libvirt for a plain user: qemu:///session, whose libvirtd and guests are the user's."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.test_plain_user import IS_ROOT, PLAIN
from stratabox.client import SnapshotState
from support.daemon import DaemonProcess, daemon
from support.images import add_tiny
from support.rig import eventually

pytestmark = pytest.mark.launcher


@pytest.fixture
def process() -> Iterator[DaemonProcess]:
    """A daemon of a plain user, and that user's libvirtd."""
    if shutil.which("libvirtd") is None:
        pytest.skip("needs libvirtd")
    wrapper = PLAIN if IS_ROOT else ()
    with tempfile.TemporaryDirectory(prefix="sb-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        asyncio.run(add_tiny(folder / "cache"))
        (folder / "cache").chmod(0o777)
        runtime = folder / "run"
        subprocess.run([*wrapper, "mkdir", "-m", "700", runtime], check=True)
        mine = {"HOME": name, "XDG_RUNTIME_DIR": str(runtime)}
        environment = {
            **mine,
            "STRATABOX_BUILD_CACHE": str(folder / "cache"),
            "STRATABOX_LAUNCHER": "libvirt",
            "STRATABOX_LIBVIRT_URI": "qemu:///session",
            "STRATABOX_LIBVIRT_FOLDER": str(folder / "emulator"),
        }
        with (
            (folder / "libvirtd.log").open("wb") as log,
            subprocess.Popen(
                [*wrapper, "libvirtd"], env=os.environ | mine, stdout=log, stderr=log
            ) as libvirtd,
        ):
            try:
                eventually((runtime / "libvirt/libvirt-sock").is_socket)
                with daemon(folder, environment, wrapper) as process:
                    yield process
            finally:
                libvirtd.terminate()


def virsh(process: DaemonProcess, *arguments: str) -> str:
    command = [*process.wrapper, "virsh", "--quiet", "--connect", "qemu:///session", *arguments]
    done = subprocess.run(command, env=process.environment, capture_output=True, check=True)
    return done.stdout.decode()


def test_a_plain_user_has_domains_of_its_own(process: DaemonProcess) -> None:
    client = process.start()
    client.images.build_tiny()
    with client.sandboxes.create(image="tiny", memory=128) as box:
        assert client.host().launcher == "libvirt"
        assert box.id in virsh(process, "list", "--uuid")
        box.execute("mkdir -p /mnt && mount -t tmpfs none /mnt && echo kept > /mnt/mark").check()
        snapshot = box.snapshot(level="memory")
        assert snapshot.state is SnapshotState.READY
        with client.snapshots.restore(snapshot.id) as restored:
            assert restored.execute("cat /mnt/mark").stdout_text == "kept\n"
            assert restored.id in virsh(process, "list", "--uuid")
    eventually(lambda: virsh(process, "list", "--uuid", "--all").strip() == "")
    client.snapshots.delete(snapshot.id)
    client.close()
    process.stop()
