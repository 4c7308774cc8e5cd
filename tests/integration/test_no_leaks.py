"""What comes and goes leaves nothing: not in the daemon, not in QEMU, not on the disk."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import Client
from support import disks
from support.daemon import LAUNCHER, DaemonProcess, daemon
from support.rig import eventually, wait_idle

CYCLES = 30
SNAPSHOTS = 20

TABLES = (
    "layers", "images", "sandboxes", "disks", "snapshots", "snapshot_disks", "operations",
    "idempotency",
)  # fmt: skip


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    # No chain is flattened meanwhile: QEMU would hold less of it.
    settings = {"STRATABOX_CHAINS_MAX_DEPTH": "128"}
    with daemon(tmp_path_factory.mktemp("leaks"), settings) as process:
        yield process


@pytest.fixture(scope="module")
def client(process: DaemonProcess) -> Iterator[Client]:
    with process.start() as client:
        client.images.build_tiny()
        yield client


def cycle(client: Client) -> None:
    """Everything that is made is unmade; no guest is waited for."""
    box = client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
    snapshot = box.snapshot(quick=True)
    copies = box.clone(quick=True, wait_for_ready=False)
    restored = client.snapshots.restore(snapshot.id, wait_for_ready=False)
    for copy in (restored, *copies.sandboxes):
        copy.terminate()
        copy.delete()
    client.snapshots.delete(snapshot.id)
    box.delete()
    client.snapshots.delete(copies.snapshot.id)


def descriptors(process: DaemonProcess) -> Counter[str]:
    """What the daemon has open, by kind; connections of clients count too."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            found[str(link.readlink()).partition(":[")[0]] += 1
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


STANDING = dict.fromkeys(
    (
        "jobs",
        "warming",
        "merging",
        "backups",
        "ports",
        "expiry",
        "gate",
        "history",
        "full disk",
        "clock",
    ),
    1,
)
"""Tasks that a daemon at rest has: name → how many."""


def standing() -> Counter[str]:
    """`STANDING`, and the one that holds the connection where libvirt starts the guests."""
    return Counter(STANDING) + Counter(["libvirt"] if LAUNCHER else [])


def tasks(process: DaemonProcess) -> Counter[str]:
    """Names of the daemon's asyncio tasks, without numbers and ids, as it logs them on SIGUSR1."""
    before = process.log.read_text().count(" tasks: ")
    os.kill(process.pid, signal.SIGUSR1)
    eventually(lambda: process.log.read_text().count(" tasks: ") > before)
    (*_, line) = [line for line in process.log.read_text().splitlines() if " tasks: " in line]
    names = line.partition(" tasks: ")[2].split(", ")
    # asyncio numbers its own; gRPC's are those of connections, as this very test's.
    return Counter(name for name in names if not name.startswith("Task-"))


def count_threads(process: DaemonProcess) -> int:
    return len(list(Path(f"/proc/{process.pid}/task").iterdir()))


def children(process: DaemonProcess) -> list[str]:
    """States of the daemon's child processes."""
    states = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == process.pid:
                states.append(fields[0])
    return states


def files(process: DaemonProcess) -> set[str]:
    """Every file and folder of the state folder, but the backups: they come by the clock."""
    found = {path.relative_to(process.state) for path in process.state.rglob("*")}
    return {str(path) for path in found if path.parts[0] != "backups"}


def rows(process: DaemonProcess) -> dict[str, int]:
    """How many rows each table has."""
    return {table: len(process.rows(f"SELECT 1 FROM {table}")) for table in TABLES}


def test_cycles_leave_nothing(process: DaemonProcess, client: Client) -> None:
    for _ in range(3):  # pools are full and caches warm after these
        cycle(client)
    # What ends the last calls may linger for a moment.
    eventually(lambda: tasks(process) == standing())
    wait_idle(process)
    before = files(process), rows(process)
    opened, threads = descriptors(process), count_threads(process)
    for _ in range(CYCLES):
        cycle(client)
    process.check_consistent()
    eventually(lambda: tasks(process) == standing())
    eventually(lambda: descriptors(process) <= opened)
    wait_idle(process)
    assert (files(process), rows(process)) == before
    # Pools breathe, and grow on a busy host. A leak would be one in each cycle.
    assert count_threads(process) < threads + CYCLES // 2
    eventually(lambda: children(process) == [])
    assert process.guests() == {}


def test_qemu_holds_what_its_chain_needs(process: DaemonProcess, client: Client) -> None:
    with client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False) as box:
        pid, folder = process.guests()[box.id], process.state / "sandboxes" / box.id

        def labels() -> list[str]:
            answer = disks.ask_qemu(folder, "query-fdsets")
            assert isinstance(answer, list)
            return sorted(each["opaque"] for one in answer for each in one["fds"])

        def opened() -> int:
            found = 0
            for link in Path(f"/proc/{pid}/fd").iterdir():
                # A connection of the daemon's may come and go.
                with contextlib.suppress(FileNotFoundError):
                    found += link.readlink().suffix == ".qcow2"
            return found

        first, before = len(labels()), opened()
        snapshots = [box.snapshot(quick=True) for _ in range(SNAPSHOTS)]
        # One for each layer to read it, and one more to write the topmost.
        assert len(labels()) == first + SNAPSHOTS
        assert sum(label.startswith("rw:") for label in labels()) == 1
        # QEMU has a duplicate of each for the node itself.
        assert opened() == before + 2 * SNAPSHOTS
        for snapshot in snapshots:
            client.snapshots.delete(snapshot.id)
    process.check_consistent()
