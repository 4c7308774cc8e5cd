"""A crash-consistent snapshot, as its caller waits for it: against the bare steps, and virsh."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench import libvirt, scene
from bench.bench import Bench
from bench.figures import Figure
from bench.floor import Guest
from bench.product import Product
from bench.rounds import Stopwatch, alternate, medians
from stratabox.client import Sandbox
from stratabox.daemon.hypervisor import command_line
from stratabox.daemon.hypervisor.machine import ChainLayer
from stratabox.storage.files.durable import sync_folder
from stratabox.storage.model.ids import LayerId, mint

MEMORY = 256
ROUNDS = 20
_NO_JOBS = {"chains_max_depth": "128"}
"""Nothing shortens the product's chain meanwhile, as nothing shortens the others'."""


def snapshot(bench: Bench) -> Iterator[Figure]:
    """`snapshot create --quick`: RPC sent to record received."""
    raw = bench.new_floor()
    without_libvirt = libvirt.absent()
    with bench.new_product(_NO_JOBS) as made, ExitStack() as stack:
        box = made.client.sandboxes.create(image="tiny", memory=MEMORY)
        below = scene.of_sandbox(made.state, box.id)
        guest = stack.enter_context(raw.booted(below))
        sides: dict[str, Callable[[], Mapping[str, float]]] = {
            "product": partial(round_trip, made, box),
            "bare": partial(_bare, guest),
        }
        if not without_libvirt:
            stack.enter_context(libvirt.daemon())
            stack.enter_context(libvirt.domain(bench.folder, below))
            sides["virsh"] = partial(_virsh, bench.folder, itertools.count())
        samples = alternate(ROUNDS, sides)
    median = medians(samples)
    ours, bare = median["product.ms"], median["bare.ms"]
    yield Figure(
        name="snapshot create --quick, RPC round trip",
        unit="ms",
        bound="≤ 2 x qemu-img create, fsync, blockdev-add, transaction",
        measured=ours,
        floor=bare,
        limit=2 * bare,
        samples=samples,
    )
    yield Figure(
        name="the same, against virsh snapshot-create-as --disk-only",
        unit="ms",
        bound="< virsh",
        measured=None if without_libvirt else ours,
        floor=median.get("virsh.ms"),
        limit=median.get("virsh.ms"),
        note=f"not measured: {without_libvirt}" if without_libvirt else "",
    )


def round_trip(made: Product, box: Sandbox) -> Mapping[str, float]:
    """One quick snapshot of it, in ms."""
    watch = Stopwatch()
    made.client.snapshots.create(box.id, level="crash")
    return {"ms": watch.ms}


def _bare(guest: Guest) -> Mapping[str, float]:
    folder = guest.overlay.path.parent
    layer = LayerId(mint())
    overlay = ChainLayer(id=layer, path=folder / f"{layer}.qcow2")
    watch = Stopwatch()
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-F", "qcow2"]
    names = ["-b", guest.overlay.path.name, str(overlay.path), str(guest.scene.disk_bytes)]
    subprocess.run([*command, *names], check=True)
    sync_folder(folder)
    node = command_line.layer_node(overlay, str(overlay.path), read_only=False, backing=None)
    guest.monitor.execute("blockdev-add", **{key.replace("-", "_"): node[key] for key in node})
    switch = {"node": guest.overlay.node, "overlay": overlay.node}
    guest.monitor.execute("transaction", actions=[{"type": "blockdev-snapshot", "data": switch}])
    done = watch.ms
    guest.overlay = overlay
    return {"ms": done}


def _virsh(folder: Path, numbers: Iterator[int]) -> Mapping[str, float]:
    number = next(numbers)
    path = folder / f"virsh-{number}.qcow2"
    watch = Stopwatch()
    libvirt.virsh(
        *("snapshot-create-as", libvirt.NAME, f"s{number}", "--disk-only", "--atomic"),
        *("--no-metadata", "--diskspec", f"vda,snapshot=external,file={path}"),
    )
    done = watch.ms
    assert path.exists()
    return {"ms": done}
