#!/usr/bin/env python3
"""The main job on one screen: a real Debian guest, created, worked in, snapshotted two ways,
restored, cloned and deleted, through the daemon's API.

`make demo` calls it. It runs a daemon of its own on a folder of its own and leaves neither behind;
built images stay in ~/.cache/stratabox, so that the next time is quicker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from stratabox.client import BuildProgress, Client, Sandbox, Snapshot

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratabox"


class Screen:
    """One line for each step: what, how long, what came of it."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """Time a step; the caller puts what came of it in the list."""
        begun, notes = time.monotonic(), list[str]()
        yield notes
        print(f"{time.monotonic() - begun:7.2f} s  {what:<46} {'; '.join(notes)}", flush=True)

    def total(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[Client]:
    """A daemon on `folder`, and a client for it; the daemon is ended at the end."""
    environment = os.environ | {
        "STRATABOX_STATE_DIR": str(folder / "state"),
        "STRATABOX_ADDRESS": f"unix://{folder}/api.sock",
        "STRATABOX_BUILD_CACHE": str(CACHE),
    }
    log = folder / "daemon.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "stratabox.daemon"],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        while not (folder / "api.sock").exists():
            if process.poll() is not None:
                raise SystemExit(f"the daemon did not start:\n{log.read_text()}")
            time.sleep(0.02)
        with Client(environment["STRATABOX_ADDRESS"]) as client:
            yield client
    except Exception:
        print(f"--- the daemon's log ---\n{log.read_text()}", file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def show_progress(progress: BuildProgress) -> None:
    """A build's step; on a terminal only the last one stays visible."""
    if sys.stdout.isatty():
        print(f"\r\033[K           {progress.step}", end="\r", flush=True)


def text_of(sandbox: Sandbox, command: str) -> str:
    """What a command in the guest prints; it must succeed."""
    result = sandbox.execute(command)
    if result.exit_code != 0:
        raise SystemExit(f"{command!r} failed in the guest: {result.stderr!r}")
    return result.stdout.decode().strip()


def stall_ms(snapshot: Snapshot) -> float:
    """How long the guest's writes stood still for it."""
    return snapshot.stall.total_seconds() * 1e3 if snapshot.stall else 0


def main() -> None:
    """Do it."""
    screen = Screen()
    with (
        tempfile.TemporaryDirectory(prefix="stratabox-demo-") as folder,
        daemon(Path(folder)) as client,
    ):
        host = client.host()
        print(f"Stratabox {host.version}, QEMU {host.qemu_version}, {host.accelerator}")
        print(f"{host.accelerator_reason}\n")
        show(client, screen)
    print(f"\nAll done in {screen.total():.0f} s; nothing is left running.")


def show(client: Client, screen: Screen) -> None:
    """The main job."""
    with screen.step("build a Debian image") as notes:
        image = client.images.build_debian(progress=show_progress)
        notes.append(f"{image.layer_bytes >> 20} MiB, {image.origin}")
    with screen.step("create a sandbox from it and wait until ready") as notes:
        box = client.sandboxes.create(image="debian", name="debugbox", cpus=1, memory=512)
        notes.append(text_of(box, ". /etc/os-release; echo $PRETTY_NAME, Linux $(uname -r)"))
    with screen.step("work in it") as notes:
        text_of(box, "echo 'before the upgrade' > /root/notes && sync")
        notes.append("wrote /root/notes")
    with screen.step("snapshot, application-consistent") as notes:
        baseline = box.snapshot(name="baseline")
        stall = stall_ms(baseline)
        frozen = f"{baseline.frozen_filesystems} file system frozen"
        notes.append(f"{baseline.consistency}: {frozen}, writes stalled {stall:.0f} ms")
        notes.append(f"{baseline.layer_bytes >> 10} KiB")
    text_of(box, "echo 'after the upgrade' > /root/notes && sync")
    with screen.step("snapshot, crash-consistent, of the changed guest") as notes:
        quick = box.snapshot(name="changed", quick=True)
        notes.append(f"{quick.consistency}: writes stalled {stall_ms(quick):.0f} ms")
    with screen.step("restore the first snapshot as a new sandbox") as notes:
        restored = client.snapshots.restore(baseline.id, name="restored-copy")
        notes.append(f"its /root/notes: {text_of(restored, 'cat /root/notes')!r}")
    with screen.step("clone the running sandbox, twice at once") as notes:
        clones = box.clone(name="worker", count=2)
        copies = [copy for copy in clones.results if isinstance(copy, Sandbox)]
        notes.append(f"{len(copies)} clones from one {clones.snapshot.consistency} snapshot")
        for copy in copies:
            text_of(copy, f"echo {copy.name} > /root/mine")
        notes.append("each with its own /root/mine: "
                     + ", ".join(text_of(copy, "cat /root/mine") for copy in copies))  # fmt: skip
    with screen.step("delete the snapshot that all stand on") as notes:
        deleted = client.snapshots.delete(baseline.id)
        notes.append(f"{len(deleted.kept_for)} sandboxes and snapshots stand on it")
        kept = text_of(restored, "cat /root/notes")
        notes.append(f"the restored one still reads {kept!r}")
    with screen.step("delete everything") as notes:
        for sandbox in client.sandboxes.list():
            sandbox.delete()
        for snapshot in client.snapshots.list():
            client.snapshots.delete(snapshot.id)
        client.images.delete(image.id)
        notes.append("no sandbox, no snapshot, no image")


if __name__ == "__main__":
    main()
