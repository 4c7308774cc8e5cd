"""A catalog with a hundred thousand snapshots: what a page, one record and a new one take.

The rows are written straight into the catalog of a daemon that is down: copies of a real snapshot,
in chains as deep as a daemon keeps them, each with its layer's file (hard links of a real one).
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from bench.bench import Bench
from bench.figures import Figure
from bench.product import Product
from stratabox.client import Sandbox
from stratabox.storage.catalog import snapshots
from stratabox.storage.catalog.database import Catalog, Transaction, text_of
from stratabox.storage.model.ids import SnapshotId, mint

COUNT = 100_000
SANDBOXES = 200
DEPTH = 14
"""Layers of each chain above the image's."""
CALLS = 300
LIMIT_MS = 20
LIMIT_RSS = 200
"""MB."""
_LINKS = 30_000
"""Names that one file gets; ext4 allows 65,000."""


def hundred_thousand(bench: Bench, count: int = COUNT) -> Iterator[Figure]:
    """p99 of what is asked for most, and what the daemon takes of memory."""
    made = Product(bench.folder / "catalog")
    made.start({})
    try:
        made.client.images.build_tiny()
        box = made.client.sandboxes.create(image="tiny", memory=128, wait_for_ready=False)
        box.stop(force=True)
        taken = box.snapshot(level="crash")
        box.snapshot(level="crash")
        made.stop()
        ids, sources = _fill(made.state, taken.id, count)
        begun = time.monotonic()
        made.start({})
        started = time.monotonic() - begun
        _wait_for_backup(made.state, count)
        yield from _measure(made, ids, sources, box.id, count)
        yield Figure(
            name=f"daemon's memory with {count:,} snapshots",
            unit="MB",
            bound=f"≤ {LIMIT_RSS} MB",
            measured=_resident(made) / 1e6,
            limit=LIMIT_RSS,
            note=f"resident, after all of the calls above; it was up in {started:.1f} s",
        )
    finally:
        made.stop()
        made.wipe()


def _measure(
    made: Product, ids: list[str], sources: list[str], box: str, count: int
) -> Iterator[Figure]:
    chosen = random.Random(1)
    client = made.client
    token: list[str | None] = [None]

    def next_page() -> None:
        token[0] = client.snapshots.list_page(page_size=100, page_token=token[0]).next_page_token

    def page_of_one() -> None:
        client.snapshots.list_page(page_size=100, sandbox=chosen.choice(sources))

    def get() -> None:
        client.snapshots.get(chosen.choice(ids))

    def get_by_prefix() -> None:
        client.snapshots.get(chosen.choice(ids)[:18])

    def foresee() -> None:
        client.snapshots.delete(chosen.choice(ids), dry_run=True)

    for name, call, limited in (
        ("list, pages of 100, one after another", next_page, True),
        ("list, a page of 100 of one sandbox", page_of_one, True),
        ("get by id", get, True),
        ("get by the start of an id", get_by_prefix, True),
        ("delete --dry-run", foresee, False),
    ):
        yield _figure(name, count, [_timed(call) for _ in range(CALLS)], limited=limited)
    created, deleted = _create(made, client.sandboxes.get(box))
    yield _figure("create, until it is written down", count, created)
    yield _figure("delete, files and all", count, deleted, limited=False)


def _create(made: Product, box: Sandbox) -> tuple[list[float], list[float]]:
    """Of a stopped sandbox: how long until the record is there, and until it is gone again."""
    created, deleted = [], []
    for number in range(CALLS // 3):
        name = f"new {number}"
        take = partial(made.client.snapshots.create, box.id, name=name, level="crash", wait=False)
        created.append(_timed(take))
        record = made.client.snapshots.wait_ready(name)
        deleted.append(_timed(partial(made.client.snapshots.delete, record.id)))
    return created, deleted


def _wait_for_backup(state: Path, count: int) -> None:
    """Until the daemon has backed up what was written behind its back: that is no steady state."""
    size = (state / "catalog.db").stat().st_size
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size >= size // 2 for path in (state / "backups").glob("*.db")):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no backup of a catalog with {count} snapshots")
        time.sleep(0.1)


def _timed(call: Callable[[], object]) -> float:
    begun = time.monotonic()
    call()
    return (time.monotonic() - begun) * 1e3


def _figure(name: str, count: int, samples: list[float], *, limited: bool = True) -> Figure:
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    return Figure(
        name=f"{name}, {count:,} snapshots, p99",
        unit="ms",
        bound=f"≤ {LIMIT_MS} ms" if limited else "",
        measured=p99,
        limit=LIMIT_MS if limited else None,
        note=f"median {ordered[len(ordered) // 2]:.1f} ms of {len(ordered)} calls, by the SDK",
        samples={"ms": samples},
    )


def _resident(made: Product) -> int:
    status = Path(f"/proc/{made.client.host().pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def _fill(state: Path, pattern: str, count: int) -> tuple[list[str], list[str]]:
    """Write so many snapshots; their ids, and the ids of the sandboxes that they were taken of."""
    with closing(Catalog(state / "catalog.db")) as catalog, catalog.transaction() as tx:
        record = snapshots.get(tx, SnapshotId(pattern))
        (disk,) = record.disks
        row = tx.row("SELECT * FROM snapshots WHERE id = ?", (pattern,))
        image = tx.row("SELECT parent, bytes FROM layers WHERE id = ?", (disk.layer,))
        assert row is not None
        assert image is not None
        layers = state / "layers"
        sources = [mint() for _ in range(SANDBOXES)]
        ids = [mint() for _ in range(count)]
        tops: dict[str, tuple[str, int]] = {}
        now = datetime.now(UTC) - timedelta(days=30)
        links = _Links(layers, layers / f"{disk.layer}.qcow2")
        for number, id in enumerate(ids):
            source = sources[number % SANDBOXES]
            parent, depth = tops.get(source, (image["parent"], 0))
            layer = mint()
            tops[source] = (layer, depth + 1) if depth < DEPTH else (image["parent"], 0)
            moment = text_of(now + timedelta(seconds=number))
            _insert_layer(tx, layer, parent, disk.size, moment, image["bytes"])
            changes = {
                "id": id, "name": f"snapshot {number}", "source_sandbox": source,
                "source_sandbox_name": f"box {number % SANDBOXES}", "created_at": moment,
                "ready_at": moment, "parent": None, "generation": number + 1000,
            }  # fmt: skip
            tx.insert("snapshots", {**dict(row), **changes})
            tx.insert(
                "snapshot_disks",
                {"snapshot": id, "idx": 0, "layer": layer, "size": disk.size, "serial": "disk0"},
            )
            links.make(layer)
        tx.execute("UPDATE store SET generation = ?", (count + 2000,))
        # As it is once all that was noted has been looked at: nothing is to be swept or rewritten.
        for notes in ("suspects", "chain_hints"):
            tx.execute(f"DELETE FROM {notes}")
    return ids, sources


def _insert_layer(
    tx: Transaction, layer: str, parent: str, size: int, moment: str | None, taken: int
) -> None:
    values: Mapping[str, object] = {
        "id": layer, "parent": parent, "backing": parent, "state": "sealed", "size": size,
        "created_at": moment, "sealed_at": moment, "bytes": taken,
    }  # fmt: skip
    tx.insert("layers", values)


class _Links:
    """Names for one file's content, over as many copies as that takes."""

    def __init__(self, folder: Path, original: Path) -> None:
        self._folder = folder
        self._content = original.read_bytes()
        self._source = original
        self._numbers = itertools.count(1)

    def make(self, layer: str) -> None:
        """One more name."""
        target = self._folder / f"{layer}.qcow2"
        if next(self._numbers) % _LINKS == 1:
            target.write_bytes(self._content)
            target.chmod(0o400)
            self._source = target
        else:
            os.link(self._source, target)
