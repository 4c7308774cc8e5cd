#!/usr/bin/env python3
"""Memory snapshots through the whole daemon: pause, restore, clones, on the tiny guest.

A first look, printed as lines: `.venv/bin/python bench/memory.py`. It has no floor to compare
with yet.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stratabox.client import Client, Sandbox

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratabox"
WRITE = (
    "mkdir -p /m; mountpoint -q /m || mount -t tmpfs none /m; head -c 33554432 /dev/urandom >/m/x"
)


def timed_restore(client: Client, snapshot: str) -> tuple[float, float]:
    """Milliseconds from the call to a ready guest, and to the end of a first `true` in it."""
    begun = time.monotonic()
    restored = client.snapshots.restore(snapshot)
    ready = time.monotonic()
    restored.execute("true")
    done = time.monotonic()
    restored.delete()
    return (ready - begun) * 1e3, (done - begun) * 1e3


def measure(client: Client, memory: int) -> None:
    """Print the figures for a guest of so many MiB."""
    box = client.sandboxes.create(image="tiny", memory=memory)
    first = box.snapshot(level="memory")
    print(f"{memory} MiB: first snapshot: paused {first.pause_ms:.1f} ms,"
          f" {first.memory_bytes >> 20} MiB, tracking {first.page_tracking}")  # fmt: skip
    pauses = []
    for _ in range(5):
        box.execute(WRITE).check()
        last = box.snapshot(level="memory")
        pauses.append(last.pause_ms or 0)
    print(f"{memory} MiB: 32 MiB written since: paused {statistics.median(pauses):.1f} ms"
          f" (median of 5), {last.memory_bytes >> 20} MiB")  # fmt: skip
    cold, *hot = [timed_restore(client, last.id) for _ in range(6)]
    ready = statistics.median(each[0] for each in hot)
    done = statistics.median(each[1] for each in hot)
    print(f"{memory} MiB: restore: call to ready {ready:.0f} ms, to a first exec {done:.0f} ms"
          f" (medians of 5); the very first {cold[0]:.0f} ms")  # fmt: skip
    begun = time.monotonic()
    clones: list[Sandbox] = list(box.clone(count=8).sandboxes)
    print(f"{memory} MiB: clone of 8: call to all ready {time.monotonic() - begun:.2f} s")
    for sandbox in (*clones, box):
        sandbox.delete()
    for snapshot in client.snapshots.list():
        client.snapshots.delete(snapshot.id)


def main() -> None:
    """Run a daemon of its own on a folder of its own, and measure."""
    with tempfile.TemporaryDirectory(prefix="stratabox-bench-") as folder:
        address = f"unix://{folder}/api.sock"
        environment = os.environ | {
            "STRATABOX_STATE_DIR": f"{folder}/state",
            "STRATABOX_ADDRESS": address,
            "STRATABOX_BUILD_CACHE": str(CACHE),
        }
        daemon = subprocess.Popen(
            [sys.executable, "-m", "stratabox.daemon"], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            while not Path(folder, "api.sock").exists():
                assert daemon.poll() is None, "the daemon did not start"
                time.sleep(0.02)
            with Client(address) as client:
                client.images.build_tiny()
                for memory in (256, 2048):
                    measure(client, memory)
        finally:
            daemon.terminate()
            daemon.wait(60)


if __name__ == "__main__":
    main()
