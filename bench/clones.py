"""Sixteen copies of a running guest: until all have run a command, and what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

from bench import scene
from bench.bench import Bench
from bench.figures import Figure
from bench.floor import Floor, Guest, anonymous_bytes
from bench.product import Product, allocated
from bench.rounds import Stopwatch, alternate, medians
from stratabox.client import Sandbox

COUNT = 16
MEMORY = 256
_ROUNDS = 3
_IDLE_SECONDS = 2.0


def sixteen(bench: Bench) -> Iterator[Figure]:
    """Clone of 16 from one running sandbox, against the floor's own snapshot and fan-out."""
    raw = bench.new_floor()
    with bench.new_product() as made:
        box = made.client.sandboxes.create(image="tiny", memory=MEMORY)
        below = scene.of_sandbox(made.state, box.id)
        sides: dict[str, Callable[[], Mapping[str, float]]] = {
            "keep": lambda: _clone(made, box, "keep"),
            "renew": lambda: _clone(made, box, "renew"),
        }
        with raw.booted(below) as source:
            sides["floor1"] = partial(_floor, raw, source, 1)
            sides["floor2"] = partial(_floor, raw, source, 2)
            samples = alternate(min(bench.rounds, _ROUNDS), sides)
    median = medians(samples)
    yield from _figures("keep", "floor1", "floor", samples, median)
    yield from _figures("renew", "floor2", "(floor + sh -c true)", samples, median)


def _figures(
    identity: str,
    floor: str,
    floor_words: str,
    samples: Mapping[str, Sequence[float]],
    median: Mapping[str, float],
) -> Iterator[Figure]:
    own = {key: each for key, each in samples.items() if key.partition(".")[0] in (identity, floor)}
    yield Figure(
        name=f"clone of {COUNT} → all answer an exec, identity={identity}",
        unit="ms",
        bound=f"≤ 1.3 x {floor_words}",
        measured=median[f"{identity}.all"],
        floor=median[f"{floor}.all"],
        limit=1.3 * median[f"{floor}.all"],
        note=f"all ready after {median[f'{identity}.ready']:.0f} ms",
        samples=own,
    )
    yield Figure(
        name=f"memory of an idle clone, identity={identity}",
        unit="MB",
        bound="≤ floor + 2 MB",
        measured=median[f"{identity}.memory"],
        floor=median[f"{floor}.memory"],
        limit=median[f"{floor}.memory"] + 2,
        note="Anonymous of smaps_rollup; most of it is QEMU's own",
    )
    yield Figure(
        name=f"disk of an idle clone, identity={identity}",
        unit="MB",
        bound="≤ 300 KiB",
        measured=median[f"{identity}.disk"],
        limit=300 * 1024 / 1e6,
    )


def _floor(raw: Floor, source: Guest, execs: int) -> Mapping[str, float]:
    with ExitStack() as stack:
        copies, ms = raw.fan_out(source, COUNT, stack, execs=execs)
        time.sleep(_IDLE_SECONDS)  # until what the commands left behind is done
        memory = statistics.median(copy.anonymous_bytes() for copy in copies)
    return {"all": ms, "memory": memory / 1e6}


def _clone(made: Product, box: Sandbox, identity: str) -> Mapping[str, float]:
    with ThreadPoolExecutor(COUNT) as threads:
        watch = Stopwatch()
        cloned = made.clone(box, COUNT, identity)
        ready = watch.ms
        copies = list(cloned.sandboxes)
        list(threads.map(lambda each: made.run(each, "true"), copies))
        done = watch.ms
        if len(copies) != COUNT:
            raise RuntimeError(f"{len(copies)} of {COUNT} clones were made: {cloned.errors}")
        time.sleep(_IDLE_SECONDS)  # as the floor's
        guests = made.guests()
        memory = statistics.median(anonymous_bytes(guests[each.id]) for each in copies)
        disk = statistics.median(
            allocated(scene.active_layer(made.state, each.id))
            + allocated(made.state / "sandboxes" / each.id)
            for each in copies
        )
        list(threads.map(lambda each: each.delete(), copies))
    made.client.snapshots.delete(cloned.snapshot.id)
    return {"ready": ready, "all": done, "memory": memory / 1e6, "disk": disk / 1e6}
