"""The daemon dies, or is ended, at moments that nobody chose, again and again, under load.

In good order it cancels what goes on, which is not what a kill does to it. The named moments are in
test_failpoints; this looks for those that nobody has thought of. More rounds:
``STRATABOX_SOAK_KILLS=500``; other moments: ``STRATABOX_SOAK_SEED=…``.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stratabox.client import (
    DaemonEndingError,
    DaemonUnavailableError,
    SnapshotState,
)
from support import disks
from support.rig import Rig, rig

KILLS = int(os.environ.get("STRATABOX_SOAK_KILLS", "20"))
LONGEST_ROUND = 0.8
"""Seconds of load before a kill, at most."""
_IN_ORDER = 0.3
"""How many of the ends are no kills."""


def take_snapshots(rig: Rig) -> None:
    """Each is named after what the witness had written by then; the one before goes."""
    while True:
        mark = rig.mark()
        older = rig.client.snapshots.list(sandbox=rig.witness.id)
        level = random.choice(["crash", "application"])  # not seeded: threads are not, either
        rig.client.snapshots.create(rig.witness.id, name=mark, level=level)
        for snapshot in older[1:]:
            rig.client.snapshots.delete(snapshot.id)


def come_and_go(rig: Rig) -> None:
    """Sandboxes and clones that are never waited for."""
    while True:
        box = rig.create()
        copies = rig.client.sandboxes.clone(box.id, quick=True, wait_for_ready=False)
        rig.client.sandboxes.delete(box.id)
        rig.client.snapshots.delete(copies.snapshot.id)
        for copy in copies.sandboxes:
            rig.client.sandboxes.delete(copy.id)


def until_it_dies(work: Callable[[Rig], None], rig: Rig) -> None:
    try:
        work(rig)
    except (DaemonUnavailableError, DaemonEndingError):
        return


def check(rig: Rig) -> None:
    """Every snapshot that is there holds what its name says, acknowledged or not."""
    for snapshot in rig.client.snapshots.list(sandbox=rig.witness.id):
        if snapshot.state is SnapshotState.READY:
            found = disks.marker_of(lambda id=snapshot.id: rig.disks_of(id)[1])  # type: ignore[misc]
            assert found == snapshot.name
    rig.check()
    checked = rig.client.check()
    assert (checked.findings, checked.quarantined_files) == ((), 0)
    ready = rig.client.snapshots.list(sandbox=rig.witness.id, states=[SnapshotState.READY])
    if ready:
        rig.client.snapshots.restore(ready[0].id, wait_for_ready=False).delete()


def clear(rig: Rig) -> None:
    """Remove what was left half-way through: it is whole, and it can be removed."""
    for sandbox in rig.client.sandboxes.list():
        if sandbox.id != rig.witness.id:
            rig.client.sandboxes.delete(sandbox.id)
    for snapshot in rig.client.snapshots.list():
        if snapshot.source_sandbox_id != rig.witness.id or snapshot.state is SnapshotState.FAILED:
            rig.client.snapshots.delete(snapshot.id)


def test_random_kills(tmp_path: Path) -> None:
    # `make test` tries the same moments each time; `make soak` others.
    seed = int(os.environ.get("STRATABOX_SOAK_SEED") or 4)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with rig(tmp_path) as survivor, ThreadPoolExecutor() as threads:
        for _ in range(KILLS):
            load = [
                threads.submit(until_it_dies, work, survivor)
                for work in (take_snapshots, come_and_go)
            ]
            time.sleep(chance.uniform(0, LONGEST_ROUND))  # the moment is what is random
            if chance.random() < _IN_ORDER:
                survivor.process.stop()
            else:
                survivor.process.kill()
            for each in load:
                each.result()
            survivor.restart()
            check(survivor)
            clear(survivor)
        mark = survivor.mark()
        last = survivor.client.snapshots.create(survivor.witness.id, level="application")
        with survivor.client.snapshots.restore(last.id) as restored:
            assert restored.execute("cat /marker").stdout.decode() == f"{mark}\n"
