"""How long a guest stands still for a snapshot, by the daemon's own account (`pause_ms`)."""

from __future__ import annotations

import ctypes
import mmap
import statistics
from collections.abc import Iterator

from bench.bench import Bench
from bench.figures import Figure
from bench.load import Writer
from bench.product import Product
from bench.rounds import Stopwatch
from stratabox.client import Snapshot

_DISK_WRITE = "dd if=/dev/urandom of=/var/tmp/big bs=1M count=256 oflag=direct 2>/dev/null"
_POPULATE_WRITE = 23
_REPEATS = 5


def tenth(bench: Bench) -> Iterator[Figure]:
    """The tenth of one process, 32 MB written since the ninth, with little and with much RAM."""
    with bench.new_product() as made:
        yield _tenth(made, 256, "256 MiB")
        yield _tenth(made, 4096, "4 GiB, 1.5 GB touched", touched=1536 << 20)


def _tenth(made: Product, memory: int, what: str, touched: int = 0) -> Figure:
    box = made.client.sandboxes.create(image="tiny", memory=memory)
    writer = Writer(made, box)
    writer.touch(touched)
    taken = []
    copies = []
    for _ in range(10 + _REPEATS - 1):
        writer.write()
        taken.append(box.snapshot(level="memory"))
        copies.append(copy_ms(taken[-1].memory_bytes or 0))
    box.delete()
    made.clear()
    # The tenth and those after it, which are as good as it: one alone would be a lottery.
    pauses, reference = [_pause(each) for each in taken[9:]], copies[9:]
    limit = 1.5 * statistics.median(reference) + 10
    return Figure(
        name=f"pause, 10th snapshot, 32 MB since the 9th, {what}",
        unit="ms",
        bound="≤ 1.5 x copy + 10 ms",
        measured=statistics.median(pauses),
        floor=statistics.median(reference),
        limit=limit,
        note=f"first: {_pause(taken[0]):.1f} ms, {(taken[0].memory_bytes or 0) / 1e6:.0f} MB;"
        f" tenth: {pauses[0]:.1f} ms, {(taken[9].memory_bytes or 0) / 1e6:.0f} MB,"
        f" tracking {taken[9].page_tracking}",
        samples={"product.pause": [_pause(each) for each in taken], "copy": copies},
    )


def debian(bench: Bench) -> Iterator[Figure]:
    """A booted Debian's first snapshot, and one with much written to the disk before it."""
    with bench.new_product() as made:
        made.client.images.build_debian()
        firsts, quiet, written = [], [], []
        for _ in range(3):
            box = made.client.sandboxes.create(image="debian", memory=512)
            firsts.append(box.snapshot(level="memory"))
            quiet.append(box.snapshot(level="memory"))
            made.run(box, _DISK_WRITE)
            written.append(box.snapshot(level="memory"))
            quiet.append(box.snapshot(level="memory"))
            box.delete()
            made.clear()
    size = statistics.median((each.memory_bytes or 0) / 1e6 for each in firsts)
    yield Figure(
        name="pause, first snapshot of a booted Debian",
        unit="ms",
        bound="≤ 80 ms",
        measured=statistics.median(map(_pause, firsts)),
        limit=80,
        note=f"{size:.0f} MB saved",
        samples={"product.pause": [*map(_pause, firsts)]},
    )
    without = statistics.median(map(_pause, quiet))
    yield Figure(
        name="pause, 256 MB written to the disk since the last",
        unit="ms",
        bound="≤ without + 20 ms",
        measured=statistics.median(map(_pause, written)),
        floor=without,
        limit=without + 20,
        note="the guest wrote past its page cache and did not flush",
        samples={"product.pause": [*map(_pause, written)], "without": [*map(_pause, quiet)]},
    )


def copy_ms(size: int) -> float:
    """Milliseconds that copying so many bytes takes, from memory to memory that is there."""
    with mmap.mmap(-1, size) as source, mmap.mmap(-1, size) as target:
        source.madvise(_POPULATE_WRITE)
        target.madvise(_POPULATE_WRITE)
        pins = [ctypes.c_char.from_buffer(each) for each in (target, source)]
        watch = Stopwatch()
        ctypes.memmove(ctypes.addressof(pins[0]), ctypes.addressof(pins[1]), size)
        taken = watch.ms
        pins.clear()
        return taken


def _pause(snapshot: Snapshot) -> float:
    assert snapshot.pause_ms is not None
    return snapshot.pause_ms
