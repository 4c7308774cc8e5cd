"""libvirt as the launcher: it starts and ends a domain that is controlled like any other."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor.libvirt import LibvirtLauncher
from support.bench import make_bench, running


@pytest.fixture
def libvirtd(tmp_path: Path) -> Iterator[None]:
    """libvirt's daemons, started by hand where no service manager did."""
    if os.getuid() != 0 or shutil.which("libvirtd") is None:
        pytest.skip("needs root and libvirtd")
    if Path("/run/libvirt/libvirt-sock").is_socket() and not _is_stale():
        yield
        return
    # libvirtd sees a /dev/kvm that does not open: one that opens and does not work costs it minutes
    # before each start, and one that is no such device at all 20 s.
    absent = tmp_path / "kvm"
    os.mknod(absent, 0o600 | stat.S_IFCHR, os.makedev(10, 250))
    masked = f"! test -e /dev/kvm || mount --bind {absent} /dev/kvm; exec libvirtd"
    commands: Sequence[Sequence[str]] = (["virtlogd"], ["unshare", "-m", "sh", "-c", masked])
    with (tmp_path / "libvirt.log").open("wb") as log:
        daemons = [subprocess.Popen(command, stdout=log, stderr=log) for command in commands]
        try:
            deadline = time.monotonic() + 30
            while _is_stale():
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder with so short a name that sockets below it can be named by libvirt's QEMU."""
    with tempfile.TemporaryDirectory(prefix="sb-") as folder:
        yield Path(folder)


def _is_stale() -> bool:
    return subprocess.run(["virsh", "uri"], capture_output=True).returncode != 0


@pytest.mark.usefixtures("libvirtd")
async def test_the_same_control_through_libvirt(short_path: Path) -> None:
    bench = await make_bench(short_path)
    launcher = LibvirtLauncher(bench.host, f"virt{os.getpid()}", bench.folder)
    async with running(launcher, await bench.spec(uid=None)) as guest:
        assert await guest.sh("echo hi") == "hi"
        command = ["virsh", "list", "--name"]
        listed = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert guest.spec.sandbox in (await listed.communicate())[0].decode()
        old = guest.spec.disks[0].chain[0]
        new = bench.overlay(old.path)
        await guest.domain.disks.prepare([new])
        await guest.domain.disks.switch([(old, new)])
        assert await guest.domain.disks.active_layers() == {0: new.node}
        assert await launcher.list() == [guest.domain.handle]
    assert await launcher.list() == []
