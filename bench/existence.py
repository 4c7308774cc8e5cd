"""What a tenant learns of another's things by how long the answer takes: it should be nothing.

Each call asks for a thing by its id, in turns: one that another workspace has, and one that nobody
has. Both are answered NOT_FOUND. Who can tell the two apart by the time knows what there is.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

from bench.bench import Bench
from bench.figures import Figure
from bench.product import Product
from bench.rounds import Stopwatch, alternate
from stratabox.client import Client, NotFoundError
from stratabox.storage.model.ids import mint

_CALLS = 200
"""For each of the rounds that were asked for."""
_MOST = 1.05
_SETTINGS = {"limits_rate": "0"}


def another_tenants(bench: Bench) -> Iterator[Figure]:
    """Sandboxes, snapshots and volumes, by gRPC on TCP."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with bench.new_product({"listen": url, **_SETTINGS}) as made:
        for name in ("ann", "bob"):
            made.client.workspaces.create(name)
        with (
            Client(url, api_key=_key(made, "ann")) as ann,
            Client(url, api_key=_key(made, "bob")) as bob,
        ):
            box = bob.sandboxes.create(image="tiny", memory=128)
            kinds: dict[str, tuple[str, Callable[[str], object]]] = {
                "sandbox": (box.id, ann.sandboxes.get),
                "snapshot": (box.snapshot(quick=True).id, ann.snapshots.get),
                "volume": (bob.volumes.create(size_bytes=1 << 26).id, ann.volumes.get),
            }
            for kind, (id, get) in kinds.items():
                yield _figure(bench.rounds * _CALLS, kind, id, get)


def _figure(calls: int, kind: str, id: str, get: Callable[[str], object]) -> Figure:
    def asked(wanted: Callable[[], str]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            name, watch = wanted(), Stopwatch()
            try:
                get(name)
            except NotFoundError:
                return {"us": watch.ms * 1e3}
            raise RuntimeError(f"{kind} {name} is there for another workspace")

        return run

    samples = alternate(calls, {"theirs": asked(lambda: id), "nobodys": asked(mint)}, warm_up=100)
    theirs, nobodys = samples["theirs.us"], samples["nobodys.us"]
    spread = statistics.quantiles(nobodys, n=4)
    floor = statistics.median(nobodys)
    return Figure(
        name=f"get of another workspace's {kind}, against one that is not there",
        unit="µs",
        bound=f"{_MOST}x",
        measured=statistics.median(theirs),
        floor=floor,
        limit=floor * _MOST,
        note=f"{calls} calls of each in turns; half of the latter take {spread[0]:.0f} to"
        f" {spread[2]:.0f} µs",
        samples={"theirs": theirs, "nobodys": nobodys},
    )


def _key(made: Product, workspace: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "stratabox.daemon"),
            *("key", "create", "--workspace", workspace, "--json"),
        ],
        env=os.environ | {"STRATABOX_STATE_DIR": str(made.state)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return str(json.loads(done.stdout)["key"])
