"""A daemon of its own, on a folder of its own, and a client of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from stratabox.client import Client, CloneResult, Sandbox, StrataboxError
from stratabox.daemon.hypervisor import process
from stratabox.storage.catalog.database import Catalog

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratabox"
_START_SECONDS = 60
_SPARE_SECONDS = 30


class Product:
    """The daemon and its client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._address = f"unix://{folder}/api.sock"
        self._log = folder / "daemon.log"
        self._spares = 0
        self.state = folder / "state"
        folder.mkdir()
        (folder / "config.toml").touch()

    def start(self, settings: Mapping[str, str]) -> None:
        """Start the daemon.

        :param settings: keys of the configuration, and their values.
        """
        own = {
            "state_dir": str(self.state),
            "address": self._address,
            "build_cache": str(CACHE),
            "config": f"{self._folder}/config.toml",
            **settings,
        }
        environment = {key: value for key, value in os.environ.items() if "STRATABOX" not in key}
        environment |= {f"STRATABOX_{key.upper()}": value for key, value in own.items()}
        with self._log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [sys.executable, "-m", "stratabox.daemon"], env=environment, stdout=log, stderr=log
            )
        self.client = Client(self._address)
        self._wait()

    def stop(self) -> None:
        """End the daemon in good order; its guests run on."""
        self.client.close()
        self._daemon.terminate()
        self._daemon.wait(60)

    def restart(self, settings: Mapping[str, str]) -> None:
        """End it and start it with other settings."""
        self.stop()
        self.start(settings)

    def restore(self, snapshot: str, identity: str = "keep") -> Sandbox:
        """Restore a snapshot; its guest is ready on return."""
        return self.client.snapshots.restore(snapshot, identity=identity)

    def clone(self, sandbox: Sandbox, count: int, identity: str) -> CloneResult[Sandbox]:
        """Clone a running sandbox at level memory; all copies are ready on return."""
        return self.client.sandboxes.clone(
            sandbox.id, count=count, level="memory", identity=identity
        )

    def run(self, sandbox: Sandbox, line: str) -> None:
        """Run a line in a guest; it must end well."""
        self.client.sandboxes.execute(sandbox.id, line).check()

    def wait_spare(self, snapshot: str) -> None:
        """Wait until one more spare of a snapshot waits than when this was last called."""
        said = f"a spare of snapshot {snapshot} waits".encode()
        deadline = time.monotonic() + _SPARE_SECONDS
        while (count := self._log.read_bytes().count(said)) <= self._spares:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no spare:\n{self._log.read_text()}")
            time.sleep(0.05)
        self._spares = count

    def guests(self) -> dict[str, int]:
        """Sandbox id → pid of its QEMU."""
        with closing(Catalog(self.state / "catalog.db")) as catalog:
            return {each.sandbox: each.pid for each in process.find_all(catalog.store_id)}

    def clear(self) -> None:
        """Remove every sandbox and every snapshot."""
        for sandbox in self.client.sandboxes.list(include_terminated=True):
            self.client.sandboxes.delete(sandbox.id)
        for snapshot in self.client.snapshots.list():
            self.client.snapshots.delete(snapshot.id)

    def wipe(self) -> None:
        """End what is left of the guests."""
        for pid in self.guests().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(StrataboxError):
                self.client.host()
                return
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no daemon:\n{self._log.read_text()}")
            time.sleep(0.05)


@contextmanager
def running(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[Product]:
    """Run a daemon with the tiny image; it and its guests are gone when the context ends.

    :param settings: keys of the configuration, and their values.
    """
    made = Product(folder)
    made.start(settings or {})
    try:
        made.client.images.build_tiny()
        yield made
        made.clear()
    finally:
        made.stop()
        made.wipe()


def allocated(path: Path) -> int:
    """Bytes that a file, or all files of a folder, take on the disk."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_blocks * 512 for each in files)
