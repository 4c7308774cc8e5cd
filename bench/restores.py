"""From a call of restore to the result of a first command in the guest.

The floor is QEMU's process start → a first ``sh -c true`` has ended, from the same saved state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from bench import floor, scene
from bench.bench import Bench
from bench.figures import Figure
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians
from bench.scene import Frozen

MEMORY = 256
SIZES = (256, 1024, 4096, 8192)
_WHAT = "restore → first exec"
_STARTED = "/etc/resolv.conf"
"""What the tiny guest's start writes last, once it has an address."""


def keep(bench: Bench) -> Iterator[Figure]:
    """The guest goes on as it was."""
    with bench.new_product() as made:
        samples = _against_floor(bench, made, identity="keep")
    yield _figure("identity=keep", "≤ 1.3 x floor", 1.3, "floor.first_exec", samples)


def renew(bench: Bench) -> Iterator[Figure]:
    """The guest gets an identity of its own before its first command."""
    with bench.new_product() as made:
        samples = _against_floor(bench, made, identity="renew")
    bound = "≤ 1.3 x (floor + sh -c true)"
    yield _figure("identity=renew", bound, 1.3, "floor.second_exec", samples)


def spare(bench: Bench) -> Iterator[Figure]:
    """A started QEMU waits for the snapshot's state."""
    with bench.new_product({"warm_spares": "1"}) as made:
        samples = _against_floor(bench, made, identity="keep", spares=True)
    yield _figure("warm spare", "≤ 1.0 x floor", 1.0, "floor.first_exec", samples)


def _figure(
    case: str, bound: str, times: float, floor: str, samples: Mapping[str, list[float]]
) -> Figure:
    median = medians(samples)
    return Figure(
        name=f"{_WHAT}, {case}",
        unit="ms",
        bound=bound,
        measured=median["product.first_exec"],
        floor=median[floor],
        limit=times * median[floor],
        note=_steps(median),
        samples=samples,
    )


def flat(bench: Bench) -> Iterator[Figure]:
    """The same at several sizes of RAM."""
    with bench.new_product() as made:
        snapshots = {}
        for memory in SIZES:
            snapshots[memory] = settled(made, memory)
        samples = alternate(
            bench.rounds,
            {
                f"{memory} MiB": partial(until_exec, made, id, "keep")
                for memory, id in snapshots.items()
            },
        )
    median = medians(samples)
    exact = {memory: median[f"{memory} MiB.first_exec"] for memory in SIZES}
    yield Figure(
        name=f"{_WHAT}, 256 MiB … 8 GiB of RAM: largest, over smallest",
        unit="ms",
        bound="≤ 1.3 x smallest",
        measured=max(exact.values()),
        floor=min(exact.values()),
        limit=1.3 * min(exact.values()),
        note=", ".join(f"{memory} MiB {ms:.0f} ms" for memory, ms in exact.items()),
        samples=samples,
    )


def settled(made: Product, memory: int) -> str:
    """The memory of a guest whose start is over.

    Its agent answers earlier. What is still under way then (modules, network) would be gone through
    by every copy, in the very time that is measured.
    """
    box = made.client.sandboxes.create(image="tiny", memory=memory)
    made.run(box, f"until [ -e {_STARTED} ]; do sleep 0.1; done")
    snapshot = box.snapshot(level="memory").id
    box.delete()
    return snapshot


def _against_floor(
    bench: Bench, made: Product, *, identity: str, spares: bool = False
) -> dict[str, list[float]]:
    raw = bench.new_floor()
    snapshot = settled(made, MEMORY)

    def ours() -> Mapping[str, float]:
        told = until_exec(made, snapshot, identity)
        if spares:  # the next one's; the floor should not have it made beside it, either
            made.wait_spare(snapshot)
        return told

    with scene.of_snapshot(made.state, snapshot) as frozen:
        return alternate(
            bench.rounds, {"floor": lambda: _floor(raw, frozen), "product": ours}, warm_up=2
        )


def _floor(raw: floor.Floor, frozen: Frozen) -> Mapping[str, float]:
    with raw.prepared(frozen) as guest:
        restored = floor.restore(guest, frozen.state)
        watch = Stopwatch()
        guest.agent.sh("true")
        return {**vars(restored), "second_exec": restored.first_exec + watch.ms}


def until_exec(made: Product, snapshot: str, identity: str) -> Mapping[str, float]:
    """Restore it, in ms until it is ready and until a first command has ended."""
    watch = Stopwatch()
    sandbox = made.restore(snapshot, identity)
    ready = watch.ms
    made.run(sandbox, "true")
    done = watch.ms
    sandbox.delete()
    return {"ready": ready, "first_exec": done}


def _steps(median: Mapping[str, float]) -> str:
    took = median["product.first_exec"] - median["product.ready"]
    raw = " → ".join(
        f"{what} {median[f'floor.{key}']:.0f}"
        for what, key in (
            ("monitor", "greeted"),
            ("runs", "running"),
            ("agent", "agent"),
            ("exec", "first_exec"),
            ("second exec", "second_exec"),
        )
    )
    ready = median["product.ready"]
    return f"floor: {raw} ms; product: ready {ready:.0f} ms, exec {took:.0f} ms more"
