"""A real daemon as a process of its own, on a folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from stratabox.client import Client

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratabox"
"""Built images are kept here between runs, and built again when they are absent."""

LAUNCHER: dict[str, str] = {}
"""Settings of every daemon here, by which another launcher than the usual one is used."""

_SECONDS = 180
"""What a daemon may take for anything here: waits end when it is done, on a slow host later."""
_HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Does what systemd does before it becomes a daemon that a socket is handed to."""
_NAME = re.compile(rb"guest=stratabox-([0-9a-f-]{36})-([0-9a-f-]{36})")


class DaemonProcess:
    """One state folder, and the daemon that runs on it, if one does.

    `start`, `stop` and `kill` as often as a test likes: guests outlive all of them.

    :param wrapper: a program, and its first arguments, that becomes the daemon: setpriv(1).
    :param handed: a listening socket at the API's path, which it gets as from systemd.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        handed: socket.socket | None = None,
    ) -> None:
        self.folder = folder
        self.wrapper = wrapper
        self._handed = handed
        if handed is not None:
            self.wrapper = (*wrapper, sys.executable, "-c", _HAND_OVER, str(handed.fileno()))
        self.state = folder / "state"
        self.log = folder / "daemon.log"
        self.address = f"unix://{folder}/api.sock"
        self.environment = {
            **{key: value for key, value in os.environ.items() if "STRATABOX" not in key},
            "STRATABOX_STATE_DIR": str(self.state),
            "STRATABOX_ADDRESS": self.address,
            "STRATABOX_BUILD_CACHE": str(CACHE),
            "STRATABOX_CONFIG": str(folder / "config.toml"),
            # Whatever else this host's memory is used for: admission has tests of its own.
            "STRATABOX_ADMISSION_MEMORY_OVERCOMMIT": "32",
            **LAUNCHER,
            **(environment or {}),
        }
        (folder / "config.toml").touch()
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self, *, failpoints: str = "", environment: Mapping[str, str] | None = None
    ) -> Client:
        """Start the daemon and return a client for it once it serves."""
        process = self._process = self._launch(failpoints, environment)
        deadline = time.monotonic() + _SECONDS
        while True:
            if process.poll() is not None:
                self._process = None
                raise AssertionError(f"the daemon ended:\n{self.log.read_text()}")
            client = Client(self.address)
            # The socket of a daemon that was killed lies there too: only an answer counts.
            with contextlib.suppress(Exception):
                if client.host().pid == process.pid:
                    return client
            client.close()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def start_to_die(self, failpoints: str) -> None:
        """Start a daemon that kills itself there without a call, be it before it has answered one,
        and see it gone.
        """
        self._process = self._launch(failpoints, None)
        self.wait_killed()

    def _launch(
        self, failpoints: str, environment: Mapping[str, str] | None
    ) -> subprocess.Popen[bytes]:
        assert self._process is None
        extra = {"STRATABOX_FAILPOINTS": failpoints, **(environment or {})}
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*self.wrapper, sys.executable, "-m", "stratabox.daemon"],
                env=self.environment | extra,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=() if self._handed is None else (self._handed.fileno(),),
            )

    @property
    def runs(self) -> bool:
        """A daemon has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None
        return self._process.pid

    def stop(self) -> None:
        """End the daemon in good order."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(_SECONDS) == 0, self.log.read_text()
            self._process = None

    def kill(self) -> None:
        """End the daemon as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_SECONDS)
            self._process = None

    def wait_killed(self, seconds: float = _SECONDS) -> None:
        """Wait until the daemon has killed itself at a failpoint."""
        assert self._process is not None
        assert self._process.wait(seconds) == -signal.SIGKILL
        self._process = None

    def wipe(self) -> None:
        """End the daemon and every guest of its store, whatever state they are in."""
        self.kill()
        end(self.guests().values())

    def kill_guest(self, sandbox: str) -> None:
        """End one sandbox's QEMU, as the host's own killer would, and see it gone."""
        end([self.guests()[sandbox]])

    def store_id(self) -> str:
        """The store's id, as its domains' names carry it."""
        ((id,),) = self.rows("SELECT id FROM store")
        return str(id)

    def guests(self) -> dict[str, int]:
        """Sandbox id → pid of every QEMU of this store that runs, seen from outside."""
        if not (self.state / "catalog.db").exists():
            return {}
        store = self.store_id().encode()
        found = {}
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                try:
                    match = _NAME.search((process / "cmdline").read_bytes())
                except OSError:
                    continue
                if match and match[1] == store:
                    found[match[2].decode()] = int(process.name)
        return found

    def layers(self) -> set[str]:
        """Names of the files that lie in the layers' folder."""
        return {path.name for path in (self.state / "layers").iterdir()}

    def rows(self, sql: str) -> list[tuple[object, ...]]:
        """Look into the catalog, from outside."""
        path = self.state / "catalog.db"
        with contextlib.closing(sqlite3.connect(path, timeout=_SECONDS)) as catalog:
            return catalog.execute(sql).fetchall()

    def _layers_are_consistent(self) -> bool:
        rows = {f"{row[0]}.qcow2" for row in self.rows("SELECT id FROM layers")}
        active = "state IN ('running', 'paused')"
        targets = {
            f"{row[0]}.qcow2" for row in self.rows(f"SELECT target FROM jobs WHERE {active}")
        }
        return self.layers() - targets == rows - targets

    def _saved_memory_is_consistent(self) -> bool:
        saved = {str(row[0]) for row in self.rows("SELECT id FROM rams")}
        expected = {f"{each}.{kind}" for each in saved for kind in ("ram", "state")}
        return {path.name for path in (self.state / "ram").iterdir()} == expected

    def check_consistent(self, *, spares: bool = False) -> None:
        """Nothing is half-made: every file has a row, every row its file, nothing is under way.

        :param spares: it may have some, which are guests of no record.
        """
        # Layers may just be written anew, or memory merged, in the background: that ends.
        deadline = time.monotonic() + _SECONDS
        while not self._layers_are_consistent():
            assert time.monotonic() < deadline, self.layers()
            time.sleep(0.05)
        while not self._saved_memory_is_consistent():
            assert time.monotonic() < deadline, [*(self.state / "ram").iterdir()]
            time.sleep(0.05)
        assert self.rows("SELECT kind FROM operations") == []
        assert self.rows("SELECT id FROM sandboxes WHERE state IN ('creating','terminating')") == []
        assert self.rows("SELECT id FROM snapshots WHERE state IN ('creating','deleting')") == []
        assert list((self.state / "work").iterdir()) == []
        living = {
            str(row[0])
            for row in self.rows(
                "SELECT id FROM sandboxes"
                " WHERE state IN ('running', 'paused') AND ram_parked IS NULL"
            )
        }
        guests = set(self.guests())
        assert living <= guests
        assert spares or guests == living


def end(pids: Iterable[int]) -> None:
    """Kill processes that run, and see them gone: nothing of them does anything any more."""
    with contextlib.ExitStack() as opened:
        ended = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                opened.callback(os.close, pidfd)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                ended.append(pidfd)
        for pidfd in ended:
            assert select.select([pidfd], [], [], _SECONDS)[0]


@contextlib.contextmanager
def daemon(
    folder: Path, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
) -> Iterator[DaemonProcess]:
    """A state folder whose daemon and guests are gone when the context ends."""
    process = DaemonProcess(folder, environment, wrapper)
    try:
        yield process
    finally:
        process.wipe()


@contextlib.contextmanager
def activated(
    folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[DaemonProcess]:
    """As `daemon`, but the API's socket is held by somebody else, as by systemd."""
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(folder / "api.sock"))
        held.listen(128)
        process = DaemonProcess(folder, environment, handed=held)
        try:
            yield process
        finally:
            process.wipe()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[DaemonProcess]:
    """As `daemon`, on a file system of 400 MiB of its own. Mounting that takes root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    state = folder / "state"
    state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "none", state], check=True)
    try:
        # What fills up here is to be met, not refused beforehand.
        with daemon(folder, {"STRATABOX_STORE_HIGH_WATER": "100"}) as process:
            yield process
    finally:
        subprocess.run(["umount", "--lazy", state], check=True)
