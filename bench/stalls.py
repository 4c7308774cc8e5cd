"""How long a guest's writes stall for a crash-consistent snapshot, as the guest itself sees it.

A Debian guest writes and fsyncs without a pause and notes when each began and how long it took. The
worst one around each snapshot is compared with the worst one of spans as long without any.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.bench import Bench
from bench.figures import Figure
from bench.product import Product
from stratabox.client import Sandbox

MEMORY = 512
SNAPSHOTS = 20
AROUND = 0.1
"""Seconds before and after the snapshot's request that count as its own."""
_BOUND_MS = 25
_REST = 0.7
"""Seconds between two snapshots: the others' spans lie in the middle of it."""
_LOOP = """
import json, os, sys, time
path, log = sys.argv[1], []
number = os.open(path, os.O_RDWR | os.O_CREAT)
end = time.time() + float(sys.argv[2])
open(path + ".begun", "w").close()
while (begun := time.time()) < end:
    os.pwrite(number, os.urandom(4096), 0)
    os.fsync(number)
    log.append((begun, time.time() - begun))
print(json.dumps(log))
"""


@dataclass(frozen=True, kw_only=True)
class Write:
    """One write with its fsync, by the guest's clock."""

    begun: float
    seconds: float


def crash(bench: Bench) -> Iterator[Figure]:
    """At the smallest depth of the chain, and at the bound that the daemon keeps it to."""
    with bench.new_product({"chains_max_depth": "128"}) as made:
        made.client.images.build_debian()
        box = made.client.sandboxes.create(image="debian", memory=MEMORY)
        base = box.snapshot(level="memory", name="shallow")
        box.delete()
        yield _measure(made, base.id, "depth 1")
        deep = made.client.snapshots.restore(base.id)
        for number in range(12):
            made.run(deep, f"dd if=/dev/urandom of=/var/tmp/{number} bs=64k count=4; sync")
            deep.snapshot(level="crash")
        base = deep.snapshot(level="memory", name="deep")
        depth = made.client.sandboxes.get(deep.id).disks[0].chain_depth
        deep.delete()
        yield _measure(made, base.id, f"depth {depth}")


def _measure(made: Product, snapshot: str, what: str) -> Figure:
    """Two snapshots of each copy: so the depth stays about what it is."""
    with_it: list[float] = []
    without: list[float] = []
    for _ in range(SNAPSHOTS // 2):
        box = made.restore(snapshot)
        own, others = _one(made, box)
        with_it += own
        without += others
        box.delete()
    quiet = statistics.median(without)
    return Figure(
        name=f"guest I/O stall of a crash snapshot, {what}",
        unit="ms",
        bound=f"≤ {_BOUND_MS} ms, without subtracted",
        measured=statistics.median(with_it) - quiet,
        limit=_BOUND_MS,
        note=f"worst fsync within ±{AROUND * 1e3:.0f} ms: {statistics.median(with_it):.1f} ms,"
        f" without a snapshot {quiet:.1f} ms, medians",
        samples={"with": with_it, "without": without},
    )


def _one(made: Product, box: Sandbox) -> tuple[list[float], list[float]]:
    seconds = 2 * _REST + 2.5
    path = "/var/tmp/stall"
    made.run(box, f"cat > {path}.py <<'END'\n{_LOOP}\nEND\nsync")
    made.run(box, f"python3 {path}.py {path} {seconds} > {path}.log 2>&1 &")
    made.run(box, f"until test -e {path}.begun; do sleep 0.05; done")
    time.sleep(_REST)
    moments = []
    for _ in range(2):
        moments.append(time.time())
        made.client.snapshots.create(box.id, level="crash")
        time.sleep(_REST)
    wait = f"until test -s {path}.log; do sleep 0.1; done; cat {path}.log"
    log = made.client.sandboxes.execute(box.id, wait).check().stdout_text
    writes = [Write(begun=begun, seconds=length) for begun, length in json.loads(log)]
    offset = _offset(made, box)
    own = [_worst(writes, moment + offset) for moment in moments]
    others = [_worst(writes, moment + offset - _REST / 2) for moment in moments]
    return own, others


def _worst(writes: Sequence[Write], moment: float) -> float:
    """Milliseconds of the longest write that touches the span around a moment."""
    return 1e3 * max(
        write.seconds
        for write in writes
        if write.begun <= moment + AROUND and write.begun + write.seconds >= moment - AROUND
    )


def _offset(made: Product, box: Sandbox) -> float:
    """The guest's clock less the host's; the quickest of some answers is the truest."""
    found = []
    for _ in range(5):
        before = time.time()
        told = float(made.client.sandboxes.execute(box.id, "date +%s.%N").check().stdout_text)
        after = time.time()
        found.append((after - before, told - (before + after) / 2))
    return min(found)[1]
