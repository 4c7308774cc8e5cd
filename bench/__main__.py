"""``python -m bench``: measure, print a table, write JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from bench import (
    catalog,
    chains,
    clones,
    execs,
    existence,
    files,
    launchers,
    pauses,
    quick,
    restores,
    stalls,
    transfers,
    virsh,
)
from bench.bench import Bench
from bench.figures import Figure, table, write
from bench.rounds import told
from stratabox.daemon.hypervisor import accelerator, qemu_host

Measure = Callable[[Bench], Iterator[Figure]]

MEASUREMENTS: Mapping[str, Measure] = {
    "restore": restores.keep,
    "renew": restores.renew,
    "spare": restores.spare,
    "flat": restores.flat,
    "pause": pauses.tenth,
    "debian": pauses.debian,
    "clone": clones.sixteen,
    "chain": chains.twenty,
    "catalog": catalog.hundred_thousand,
    "virsh": virsh.compare,
    "launchers": launchers.compare,
    "stall": stalls.crash,
    "quick": quick.snapshot,
    "export": transfers.export,
    "files": files.both_ways,
    "exec": execs.streams,
    "crowd": execs.crowd,
    "existence": existence.another_tenants,
}
DEFAULT_JSON = Path(__file__).parent / "results" / "latest.json"


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=MEASUREMENTS,
        default=list(MEASUREMENTS),
        metavar="NAME",
        help=f"some of: {', '.join(MEASUREMENTS)} (default: all)",
    )
    parser.add_argument("--rounds", type=int, default=9, help="runs of each side (default: 9)")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="where figures are written")
    parser.add_argument(
        "--dir", type=Path, help="where state lies meanwhile (default: temp folder)"
    )
    asked = parser.parse_args()
    host = asyncio.run(qemu_host.probe())
    chosen = asyncio.run(accelerator.choose())
    figures: list[Figure] = []
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="sb-bench-", dir=asked.dir) as folder:
            bench = Bench(folder=Path(folder), host=host, rounds=asked.rounds)
            for name in asked.only:
                with told(name):
                    figures += MEASUREMENTS[name](bench)
    finally:  # what was measured before something failed took minutes, too
        about = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "cpus": os.cpu_count(),
            "accelerator": chosen.name,
            "qemu": host.version_text,
            "kernel": platform.release(),
            "rounds": asked.rounds,
            "seconds": round(time.monotonic() - begun),
        }
        print(table(figures))
        print(f"\n{', '.join(f'{key} {value}' for key, value in about.items())}")
        write(asked.json, figures, about)
        print(f"written to {asked.json}")


if __name__ == "__main__":
    main()
