"""The host loses power: what was promised is there, in a folder of nothing but what was synced.

After every cut another daemon starts on what is left (`support.power`). Acknowledged snapshots are
ready and hold what they must, what the guest has synced is on its disks, files and rows agree, and
a check that reads everything finds nothing. More cuts: ``STRATABOX_SOAK_CUTS=…``; others:
``STRATABOX_SOAK_SEED=…``. The moments are the machine's own, too.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from stratabox.client import (
    Client,
    DaemonUnavailableError,
    Sandbox,
    SandboxState,
    SnapshotState,
    StrataboxError,
)
from support import disks
from support.daemon import DaemonProcess
from support.power import Power, power
from support.stored import Stored

CUTS = int(os.environ.get("STRATABOX_SOAK_CUTS", "3"))
LONGEST_ROUND = 3.0
"""Seconds of work before a cut, at most."""


@dataclass
class Promised:
    """What a client was told, so that it must be there after the cut."""

    snapshots: dict[str, str] = field(default_factory=dict)
    """Id → what its data disk begins with."""
    gone: set[str] = field(default_factory=set)
    mark: str = ""
    """The last thing that the guest has synced to its data disk."""
    marks: int = 0
    seals: dict[str, str] = field(default_factory=dict)
    """Name of a sealed layer → SHA-256 of its file."""


def number(mark: str) -> int:
    return int(mark.removeprefix("mark-"))


def write(box: Sandbox, promised: Promised) -> str:
    promised.marks += 1
    mark = f"mark-{promised.marks}"
    line = f"echo {mark} | dd of=/dev/vdb bs=512 conv=sync,fsync,notrunc 2>/dev/null"
    assert box.execute(line, timeout=60).exit_code == 0
    promised.mark = mark
    return mark


def work(client: Client, box: Sandbox, promised: Promised, chance: random.Random) -> None:
    """All that changes the store, in a random order, until the power goes."""

    def take() -> None:
        mark = write(box, promised)
        level = chance.choice(["crash", "application", "memory"])
        snapshot = client.snapshots.create(box.id, level=level)
        promised.snapshots[snapshot.id] = mark

    def drop() -> None:
        if len(promised.snapshots) > 3:
            snapshot = chance.choice(sorted(promised.snapshots))
            del promised.snapshots[snapshot]  # from the request on, either is right
            client.snapshots.delete(snapshot)
            promised.gone.add(snapshot)

    def copy() -> None:
        copies = client.sandboxes.clone(box.id, quick=True, wait_for_ready=False)
        client.sandboxes.delete(copies.sandbox.id)
        client.snapshots.delete(copies.snapshot.id)
        promised.gone.add(copies.snapshot.id)

    def image() -> None:
        client.images.build_tiny(name="another")
        client.images.delete("another")

    steps: list[Callable[[], None]] = [take, take, drop, copy, image]
    try:
        while True:
            chance.choice(steps)()
    except (DaemonUnavailableError, StrataboxError):
        return


def check(process: DaemonProcess, client: Client, box: str, promised: Promised) -> None:
    process.check_consistent()
    stored = Stored(process)
    present = {snapshot.id: snapshot for snapshot in client.snapshots.list()}
    for snapshot, mark in promised.snapshots.items():
        assert present[snapshot].state is SnapshotState.READY
        assert disks.marker_of(partial(stored.of_snapshot, snapshot, 1)) == mark
    assert not promised.gone & present.keys()
    sealed = stored.sealed()
    for name, digest in promised.seals.items():
        assert sealed.get(name, digest) == digest
    promised.seals = sealed
    # What was being written when the power went may be there, too.
    found = disks.marker_of(partial(stored.of_sandbox, box, 1))
    assert number(promised.mark) <= number(found)
    checked = client.check(deep=True)
    assert checked.findings == ()
    assert checked.quarantined_files == 0
    for sandbox in client.sandboxes.list():
        assert sandbox.state is SandboxState.STOPPED
        assert sandbox.state_reason
        if sandbox.id != box:
            client.sandboxes.delete(sandbox.id)
    for record in present.values():
        if record.state is SnapshotState.FAILED:
            assert record.failure_reason
            client.snapshots.delete(record.id)
    for image in client.images.list():
        if image.name != "tiny":
            client.images.delete(image.id)


def restore_some(client: Client, promised: Promised, chance: random.Random) -> None:
    """One of those that were promised starts, and its guest reads what it must."""
    snapshot = chance.choice(sorted(promised.snapshots))
    with client.snapshots.restore(snapshot) as copy:
        line = "dd if=/dev/vdb bs=512 count=1 2>/dev/null | head -n 1"
        assert (
            copy.execute(line, timeout=60).stdout.decode().strip() == promised.snapshots[snapshot]
        )


def one_round(host: Power, box: str, promised: Promised, chance: random.Random) -> None:
    with Client(host.process.address) as client, Client(host.process.address) as other:
        if client.sandboxes.get(box).state is not SandboxState.RUNNING:
            client.sandboxes.start(box)
        working = threading.Thread(
            target=work, args=(other, other.sandboxes.get(box), promised, chance)
        )
        working.start()
        time.sleep(chance.uniform(0, LONGEST_ROUND))  # the moment is what is random
        worst = chance.random() < 0.5
        process = host.cut(None if worst else chance)
        working.join()
    with process.start() as client:
        check(process, client, box, promised)
        if promised.snapshots:
            restore_some(client, promised, chance)


def test_power_cuts(tmp_path: Path) -> None:
    seed = int(os.environ.get("STRATABOX_SOAK_SEED") or 4)
    print(f"seed {seed}")
    chance = random.Random(seed)
    promised = Promised()
    with power() as host:
        with host.process.start() as client:
            client.images.build_tiny()
            box = client.sandboxes.create(image="tiny", memory=128, data_disks=[1])
            write(box, promised)
        for _ in range(CUTS):
            one_round(host, box.id, promised, chance)
        host.process.stop()
