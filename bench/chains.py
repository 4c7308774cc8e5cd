"""Twenty snapshots of one guest, 32 MB apart: what they take, and how the last restores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.bench import Bench
from bench.figures import Figure
from bench.load import WRITTEN, Writer
from bench.product import Product, allocated
from bench.rounds import Stopwatch, alternate, medians

COUNT = 20
MEMORY = 256
_EARLY, _LATE = 2, COUNT


def twenty(bench: Bench) -> Iterator[Figure]:
    """Disk before any restore; then the 20th against the 2nd, assembled anew and kept ready."""
    with bench.new_product() as made:
        box = made.client.sandboxes.create(image="tiny", memory=MEMORY)
        writer = Writer(made, box)
        base = box.snapshot(level="memory")
        before = _disk(made)
        taken = []
        for _ in range(COUNT):
            writer.write()
            taken.append(box.snapshot(level="memory"))
        grown = (_disk(made) - before) / 1e6
        box.delete()
        yield Figure(
            name=f"disk of {COUNT} snapshots, 32 MB apart",
            unit="MB",
            bound=f"≤ {COUNT} x 32 MiB + 10 %",
            measured=grown,
            floor=COUNT * WRITTEN / 1e6,
            limit=1.1 * COUNT * WRITTEN / 1e6,
            note=f"beside the first of that guest, which saved {(base.memory_bytes or 0) / 1e6:.0f}"
            " MB; RAM, devices' state and disk layers, before any restore",
        )
        early, late = taken[_EARLY - 1].id, taken[_LATE - 1].id
        yield _compare(bench, made, early, late, "kept ready")
        made.restart({"memory_cache": "0"})
        yield _compare(bench, made, early, late, "assembled anew")


def _compare(bench: Bench, made: Product, early: str, late: str, what: str) -> Figure:
    samples = alternate(
        bench.rounds,
        {"2nd": lambda: _restore(made, early), "20th": lambda: _restore(made, late)},
    )
    median = medians(samples)
    return Figure(
        name=f"restore of the 20th, over the 2nd, {what}",
        unit="ms",
        bound="≤ 1.3 x the 2nd",
        measured=median["20th.first_exec"],
        floor=median["2nd.first_exec"],
        limit=1.3 * median["2nd.first_exec"],
        samples=samples,
    )


def _restore(made: Product, snapshot: str) -> Mapping[str, float]:
    watch = Stopwatch()
    sandbox = made.restore(snapshot)
    made.run(sandbox, "true")
    done = watch.ms
    sandbox.delete()
    return {"first_exec": done}


def _disk(made: Product) -> int:
    return allocated(made.state / "ram") + allocated(made.state / "layers")
