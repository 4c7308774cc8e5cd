"""Memory snapshots of all kinds of guests: vCPUs, disks under load, Debian, very much RAM."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest

from stratabox.client import (
    AgentUnavailableError,
    Client,
    Image,
    Sandbox,
    SandboxState,
    SnapshotLevel,
)
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]

WRITER = """
cat > /run/writer <<'END'
block() {
    dd if=/dev/$1 bs=512 skip=$2 count=1 iflag=direct 2>/dev/null | tr -d '\\0'
}
number=0
while :; do
    number=$((number + 1))
    for disk in vdb vdc; do
        before=$(block $disk $((number - 1))) here=$(block $disk $number)
        if [ "$here" ] || [ "$before" != $((number - 1)) -a $number != 1 ]; then
            echo "$disk at $number: before it '$before', here '$here'" >> /run/broken
        fi
        printf '%s\\n' $number |
            dd of=/dev/$disk bs=512 seek=$number conv=sync,notrunc oflag=direct,dsync 2>/dev/null
    done
    echo $number > /run/number.new
    mv /run/number.new /run/number
    head -c 65536 /dev/urandom > /busy && sync
done
END
setsid /bin/sh /run/writer > /dev/null 2>&1 < /dev/null &
until [ -s /run/number ]; do sleep 0.1; done
"""
"""Counts in RAM and writes each number to a block of its own on both disks, one after the other.
Before each it looks: the block before must be there and this one must not. So a guest whose disks
are of another instant than its RAM finds out by itself."""


@pytest.fixture(autouse=True)
def deleted_after(client: Client) -> Iterator[None]:
    """Snapshots that a test leaves are deleted."""
    yield
    for snapshot in client.snapshots.list():
        client.snapshots.delete(snapshot.id)


def number(sh: Shell, sandbox: Sandbox) -> int:
    return int(sh(sandbox, "cat /run/number"))


def writes_on(sh: Shell, sandbox: Sandbox) -> None:
    """See it write two numbers more, and find everything where its RAM says."""
    start = number(sh, sandbox)
    eventually(lambda: number(sh, sandbox) > start + 1)
    assert sh(sandbox, "cat /run/broken 2>/dev/null; true") == ""


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_disks_and_ram_are_of_one_instant(
    client: Client, tiny: Image, sh: Shell, cpus: int
) -> None:
    """Three disks under write load; in the second generation, too."""
    with client.sandboxes.create(image=tiny.id, memory=256, cpus=cpus, data_disks=[1, 1]) as source:
        assert source.execute(WRITER, timeout=120).exit_code == 0
        assert sh(source, "nproc") == str(cpus)
        snapshots = []
        for _ in range(2):
            writes_on(sh, source)
            reached = number(sh, source)
            snapshots.append((source.snapshot(level="memory"), reached))
        for snapshot, reached in snapshots:
            assert snapshot.consistency is SnapshotLevel.MEMORY
            with client.snapshots.restore(snapshot.id) as restored:
                assert number(sh, restored) >= reached
                writes_on(sh, restored)
                assert sh(restored, "nproc") == str(cpus)
        with client.snapshots.restore(snapshots[0][0].id) as restored:
            writes_on(sh, restored)
            second = restored.snapshot(level="memory")
            with client.snapshots.restore(second.id) as grandchild:
                writes_on(sh, grandchild)
        writes_on(sh, source)


def test_debian_goes_on_and_reboots(client: Client, debian: Image, sh: Shell) -> None:
    with client.sandboxes.create(image=debian.id, memory=512, cpus=2) as source:
        sh(source, "systemd-run --unit=nonce --quiet sh -c 'echo $$ > /run/pid; exec sleep 9999'")
        eventually(lambda: sh(source, "cat /run/pid 2>/dev/null; true") != "")
        pid = sh(source, "cat /run/pid; systemctl show -p MainPID nonce")
        snapshot = source.snapshot(level="memory")
        with client.snapshots.restore(snapshot.id) as restored:
            assert sh(restored, "cat /run/pid; systemctl show -p MainPID nonce") == pid
            assert sh(restored, "nproc") == "2"
            with contextlib.suppress(AgentUnavailableError):
                restored.execute("systemctl reboot", timeout=60)

            def rebooted() -> bool:
                with contextlib.suppress(AgentUnavailableError):
                    # Ended as the guest goes down, it has no exit code.
                    return restored.execute("test -e /run/pid", timeout=20).exit_code == 1
                return False

            eventually(rebooted, 180)
            assert restored.refresh().state is SandboxState.RUNNING


def test_a_guest_with_more_ram_than_half_the_host_s(client: Client, tiny: Image, sh: Shell) -> None:
    """Both generations side by side have more than the host; what is not touched costs nothing."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = min(pages * 6 // 10 >> 20, 32768)
    with client.sandboxes.create(image=tiny.id, memory=memory) as source:
        sh(source, "echo kept > /run/kept")
        snapshot = source.snapshot(level="memory")
        assert snapshot.memory_bytes < memory << 20 >> 2
        with client.snapshots.restore(snapshot.id) as restored:
            assert sh(restored, "cat /run/kept") == "kept"
            total = int(sh(restored, "grep MemTotal /proc/meminfo | tr -dc 0-9")) >> 10
            assert total > memory * 9 // 10
