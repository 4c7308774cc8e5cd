"""Both launchers side by side: one daemon with each, and the same calls in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from bench import libvirtd, quick, restores
from bench.bench import Bench
from bench.figures import Figure, missing
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians
from stratabox.client import Sandbox

COPIES = 4
MEMORY = 256
_NO_JOBS = {"chains_max_depth": "128"}
"""Nothing is compressed or shortened beside what is measured."""

Measure = Callable[[], Mapping[str, float]]


def compare(bench: Bench) -> Iterator[Figure]:
    """What starts guests, and a snapshot, which starts none: libvirt against the plain one."""
    if why := libvirtd.absent():
        yield missing("libvirt against the plain launcher", "", f"not measured: {why}")
        return
    with (
        libvirtd.running() as virt,
        bench.new_product(_NO_JOBS) as plain,
        bench.new_product(_NO_JOBS | virt.settings) as under,
    ):
        made = {"plain": plain, "libvirt": under}
        launchers = {name: each.client.host().launcher for name, each in made.items()}
        if launchers != {"plain": "qemu", "libvirt": "libvirt"}:
            raise RuntimeError(f"the daemons have other launchers: {launchers}")
        creating = {name: partial(_create, each) for name, each in made.items()}
        yield _figure(bench, "create → ready, tiny", creating)
        saved = {name: restores.settled(each, MEMORY) for name, each in made.items()}
        yield _figure(
            bench,
            "restore from memory → first exec",
            {
                name: partial(restores.until_exec, each, saved[name], "keep")
                for name, each in made.items()
            },
        )
        boxes = {
            name: each.client.sandboxes.create(image="tiny", memory=MEMORY)
            for name, each in made.items()
        }
        yield _figure(
            bench,
            f"clone of {COPIES} → all answer an exec",
            {name: partial(_clone, each, boxes[name]) for name, each in made.items()},
        )
        yield _figure(
            bench,
            "snapshot create --quick",
            {name: partial(quick.round_trip, each, boxes[name]) for name, each in made.items()},
        )


def _figure(bench: Bench, name: str, sides: Mapping[str, Measure]) -> Figure:
    samples = alternate(bench.rounds, sides)
    median = medians(samples)
    key = "first_exec" if "plain.first_exec" in median else "ms"
    theirs, ours = samples[f"libvirt.{key}"], samples[f"plain.{key}"]
    return Figure(
        name=f"{name}: libvirt, against the plain launcher",
        unit="ms",
        bound="none",
        measured=median[f"libvirt.{key}"],
        floor=median[f"plain.{key}"],
        note=f"best: {min(theirs):.0f} ms, against {min(ours):.0f}",
        samples=samples,
    )


def _create(made: Product) -> Mapping[str, float]:
    watch = Stopwatch()
    box = made.client.sandboxes.create(image="tiny", memory=MEMORY)
    done = watch.ms
    box.delete()
    return {"ms": done}


def _clone(made: Product, box: Sandbox) -> Mapping[str, float]:
    with ThreadPoolExecutor(COPIES) as threads:
        watch = Stopwatch()
        cloned = made.clone(box, COPIES, "keep")
        copies = list(cloned.sandboxes)
        list(threads.map(lambda each: made.run(each, "true"), copies))
        done = watch.ms
        if len(copies) != COPIES:
            raise RuntimeError(f"{len(copies)} of {COPIES} clones were made: {cloned.errors}")
        list(threads.map(lambda each: each.delete(), copies))
    made.client.snapshots.delete(cloned.snapshot.id)
    return {"ms": done}
