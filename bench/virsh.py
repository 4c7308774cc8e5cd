"""The same guest under libvirt: ``virsh save`` and ``virsh restore``, until its agent answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import libvirt, load, scene
from bench.bench import Bench
from bench.figures import Figure, missing
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians
from bench.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Case:
    """A guest, and how many times faster than virsh its restore must be."""

    what: str
    memory: int
    """MiB."""
    in_use: int
    """Bytes that were written in it."""
    factor: int

    @property
    def name(self) -> str:
        """Of its figure."""
        return f"restore → agent, {self.what}, against virsh restore"

    @property
    def bound(self) -> str:
        """Of its figure."""
        return f"≤ 1/{self.factor} of virsh's"


_CASES = (
    Case(what="256 MiB", memory=256, in_use=0, factor=4),
    Case(what="2 GiB", memory=2048, in_use=0, factor=15),
    Case(what="2 GiB, 1.5 GB of it in use", memory=2048, in_use=1536 << 20, factor=15),
)
_ROUNDS = 5


def compare(bench: Bench) -> Iterator[Figure]:
    """Restore to the agent's answer, at two sizes of RAM."""
    why = libvirt.absent()
    if why:
        for case in _CASES:
            yield missing(case.name, case.bound, f"not measured: {why}")
        return
    with libvirt.daemon(), bench.new_product() as made:
        for case in _CASES:
            yield _compare(bench, made, case)


def _compare(bench: Bench, made: Product, case: Case) -> Figure:
    box = made.client.sandboxes.create(image="tiny", memory=case.memory)
    if case.in_use:
        made.run(box, load.using(case.in_use))
    snapshot = box.snapshot(level="memory").id
    seen = scene.of_sandbox(made.state, box.id)
    box.delete()
    with _saved(bench.folder, seen, case) as saved:
        samples = alternate(
            min(bench.rounds, _ROUNDS),
            {"virsh": lambda: _virsh_restore(saved), "product": lambda: _restore(made, snapshot)},
        )
        size = saved.stat().st_size / 1e6
    made.client.snapshots.delete(snapshot)
    median = medians(samples)
    ours, theirs = median["product.agent"], median["virsh.agent"]
    return Figure(
        name=case.name,
        unit="ms",
        bound=case.bound,
        measured=ours,
        floor=theirs,
        limit=theirs / case.factor,
        note=f"{theirs / ours:.1f} times faster; virsh's file has {size:.0f} MB",
        samples=samples,
    )


def _restore(made: Product, snapshot: str) -> Mapping[str, float]:
    watch = Stopwatch()
    sandbox = made.restore(snapshot)
    done = watch.ms
    sandbox.delete()
    return {"agent": done}


def _virsh_restore(saved: Path) -> Mapping[str, float]:
    watch = Stopwatch()
    libvirt.virsh("restore", str(saved))
    libvirt.wait_agent()
    done = watch.ms
    libvirt.virsh("destroy", libvirt.NAME)
    return {"agent": done}


@contextmanager
def _saved(folder: Path, seen: Scene, case: Case) -> Iterator[Path]:
    """A file that ``virsh save`` has made of the booted guest."""
    saved = folder / "virsh.save"
    with libvirt.domain(folder, seen):
        if case.in_use:
            libvirt.run(load.using(case.in_use))
        libvirt.virsh("save", libvirt.NAME, str(saved))
        try:
            yield saved
        finally:
            saved.unlink(missing_ok=True)
