"""A libvirtd of its own, for a measurement or a test: beside the host's, and beside others.

A privileged libvirtd has its folders compiled in. So each one here sees folders of its own in their
places, in a mount namespace of its own, and is reached by its socket's real path.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FOLDERS = ("etc/libvirt", "run/libvirt", "var/lib/libvirt", "var/cache/libvirt", "var/log/libvirt")
_SECONDS = 60


class Libvirtd:
    """One libvirtd: `start`, `kill`, `stop` and `hang` as one likes.

    :param folder: all that it has; open to all users.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "run/libvirt/libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.log = folder / "libvirtd.log"
        self._process: subprocess.Popen[bytes] | None = None
        for each in _FOLDERS:
            (folder / each).mkdir(parents=True)
            (folder / each).chmod(0o755)
        etc = folder / "etc/libvirt"
        (etc / "libvirtd.conf").write_text('auth_unix_rw = "none"\nunix_sock_rw_perms = "0777"\n')
        # Without virtlogd, and without cgroups, where another share of the CPUs would be had.
        (etc / "qemu.conf").write_text('stdio_handler = "file"\ncgroup_controllers = [ ]\n')

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def settings(self) -> dict[str, str]:
        """Keys of the configuration that have a daemon use it, and their values."""
        return {
            "launcher": "libvirt",
            "libvirt_uri": self.uri,
            "libvirt_folder": str(self.folder / "emulator"),
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables."""
        return {f"STRATABOX_{key.upper()}": value for key, value in self.settings.items()}

    def start(self) -> None:
        """Start it and wait until it answers."""
        assert self._process is None
        # It sees a /dev/kvm that does not open: one that opens and does not work costs it minutes
        # before each start, and one that is no such device at all 20 s.
        absent = self.folder / "kvm"
        if not absent.exists():
            os.mknod(absent, 0o600 | stat.S_IFCHR, os.makedev(10, 250))
        masks = [f"test ! -e /dev/kvm || mount --bind {absent} /dev/kvm"]
        for each in _FOLDERS:
            masks += [f"mkdir -p /{each}", f"mount --bind {self.folder / each} /{each}"]
        run = f"exec libvirtd --pid-file {self.folder / 'libvirtd.pid'}"
        command = ["unshare", "--mount", "sh", "-c", "; ".join([*masks, run])]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + _SECONDS
        while self.virsh("uri", check=False).returncode:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as a crash would; its domains live on."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order; its domains live on."""
        self._end(signal.SIGTERM)

    def hang(self) -> None:
        """Stop it in its tracks, until `wake`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def virsh(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of virsh's on it."""
        return subprocess.run(
            ["virsh", "--quiet", "--connect", self.uri, *arguments],
            capture_output=True,
            text=True,
            check=check,
            timeout=_SECONDS,
        )

    def domains(self) -> list[str]:
        """The uuids of all its domains."""
        return self.virsh("list", "--all", "--uuid").stdout.split()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(number)
            self._process.wait(_SECONDS)
            self._process = None


def absent() -> str:
    """Why none can be had; "" when one can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("libvirtd", "virsh"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


@contextmanager
def running() -> Iterator[Libvirtd]:
    """One that runs, in a folder that all users may enter; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="stratabox-libvirt-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        libvirtd = Libvirtd(folder)
        try:
            libvirtd.start()
            yield libvirtd
        finally:
            libvirtd.kill()
