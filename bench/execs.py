"""Commands as streams: what the daemon adds to the bare transport, and to a restore.

The bare transport is the same socket of the same guest and the same library, without a daemon and
without the API.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.bench import Bench
from bench.figures import Figure
from bench.files import connection
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians
from stratabox.client import Sandbox

TIMES = 15
"""Round trips of a command that does nothing, in a round."""
MB = 200
GUESTS, EXECS = 10, 100
SHARE = 0.8
_ROUNDS = 5
_SETTLED = 4.0
"""Seconds after a connection until the guest is at rest: the sshd of the one before ended with its
daemon, and makes room for the new one before the next takes its place (keeper_channel.h, LATER)."""


def streams(bench: Bench) -> Iterator[Figure]:
    """Round trip and bytes a second against the transport alone; a first one after a restore."""
    with bench.new_product() as made:
        box = made.client.sandboxes.create(image="tiny", memory=256)
        samples = alternate(
            min(bench.rounds, _ROUNDS),
            {"ours": lambda: _ours(made, box), "bare": lambda: _bare(made, box)},
        )
        made.client.processes.spawn(box.id, ["true"]).wait()
        time.sleep(_SETTLED)
        snapshot = made.client.snapshots.create(box.id, level="memory")
        firsts = alternate(bench.rounds, {"copy": lambda: _first(made, snapshot.id)})
    median = medians(samples | firsts)
    yield Figure(
        name="exec of true, round trip, over the bare transport's",
        unit="ms",
        bound="≤ 1.2 x",
        measured=median["ours.true"],
        floor=median["bare.true"],
        limit=1.2 * median["bare.true"],
        samples={key: each for key, each in samples.items() if key.endswith(".true")},
    )
    yield Figure(
        name="memory restore and its first streamed exec, over the restore",
        unit="ms",
        bound="≤ 2.5 x",
        measured=median["copy.first"],
        floor=median["copy.restore"],
        limit=2.5 * median["copy.restore"],
        samples=firsts,
    )
    yield Figure(
        name=f"stdout of {MB} MB to a client, over the bare transport",
        unit="ms/MB",
        bound=f"≥ {SHARE:.0%} of its bytes a second",
        measured=median["ours.stdout"],
        floor=median["bare.stdout"],
        limit=median["bare.stdout"] / SHARE,
        samples={key: each for key, each in samples.items() if key.endswith(".stdout")},
    )


def crowd(bench: Bench) -> Iterator[Figure]:
    """A hundred at once in ten guests: all there, and what the daemon takes for it."""
    with bench.new_product() as made:
        boxes = [made.client.sandboxes.create(image="tiny", memory=128) for _ in range(GUESTS)]
        for box in boxes:
            made.client.processes.spawn(box.id, ["true"]).wait()
        before = _resident(made)
        watch = Stopwatch()
        with ThreadPoolExecutor(EXECS) as pool:
            wrong = sum(pool.map(lambda n: _is_wrong(made, boxes[n % GUESTS], n), range(EXECS)))
        took, after = watch.ms, _resident(made)
    if wrong:
        raise RuntimeError(f"{wrong} of {EXECS} commands printed something else")
    yield Figure(
        name=f"{EXECS} execs at once in {GUESTS} guests: growth of the daemon",
        unit="MB",
        bound="≤ 50 MB",
        measured=(after - before) / 1e6,
        limit=50,
        note=f"all correct after {took:.0f} ms",
    )


def _ours(made: Product, box: Sandbox) -> Mapping[str, float]:
    processes = made.client.processes
    processes.spawn(box.id, ["true"]).wait()  # connects
    time.sleep(_SETTLED)
    trips = []
    for _ in range(TIMES):
        watch = Stopwatch()
        assert processes.spawn(box.id, ["true"]).wait().ok
        trips.append(watch.ms)
    watch = Stopwatch()
    with processes.spawn(box.id, _flood()) as process:
        assert sum(len(piece.data) for piece in process) == MB * 10**6
    return {"true": statistics.median(trips), "stdout": watch.ms / MB}


def _bare(made: Product, box: Sandbox) -> Mapping[str, float]:
    made.stop()
    try:
        return asyncio.run(_transport(made, box))
    finally:
        made.start({})


async def _transport(made: Product, box: Sandbox) -> Mapping[str, float]:
    async with connection(made, box) as carried:
        await asyncio.sleep(_SETTLED)
        trips = []
        for _ in range(TIMES):
            watch = Stopwatch()
            await carried.run("/bin/true", check=True)
            trips.append(watch.ms)
        watch = Stopwatch()
        count = 0
        async with carried.create_process(" ".join(_flood()), encoding=None) as process:
            while data := await process.stdout.read(1 << 18):
                count += len(data)
        assert count == MB * 10**6
        return {"true": statistics.median(trips), "stdout": watch.ms / MB}


def _flood() -> list[str]:
    return ["dd", "if=/dev/zero", "bs=100000", f"count={MB * 10}", "status=none"]


def _first(made: Product, snapshot: str) -> Mapping[str, float]:
    watch = Stopwatch()
    copy = made.restore(snapshot)
    restored = watch.ms
    assert made.client.processes.spawn(copy.id, ["true"]).wait().ok
    first = watch.ms
    copy.delete()
    return {"restore": restored, "first": first}


def _is_wrong(made: Product, box: Sandbox, number: int) -> bool:
    line = f"echo {number}; head -c 100000 /dev/zero; echo {number} >&2"
    with made.client.processes.spawn(box.id, line) as process:
        out, err = process.communicate()
    said = f"{number}\n".encode()
    return (out, err) != (said + bytes(100_000), said)


def _resident(made: Product) -> int:
    """Bytes of the daemon's memory."""
    status = Path(f"/proc/{made.client.host().pid}/statm").read_text()
    return int(status.split()[1]) * 4096
