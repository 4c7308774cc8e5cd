"""Outer hosts: sandboxes in which the package is installed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from stratabox.client import Client, Sandbox, Snapshot, StrataboxError

IMAGE = "host"
PACKAGES = (
    "libpam-systemd",  # user managers
    # What the package depends on, and what Debian has of what it recommends.
    "e2fsprogs",
    "libslirp0",
    "qemu-system-x86",
    "qemu-utils",
    "seabios",
)
CPUS = 2
MEMORY_MIB = 2048
SYSTEM_API = "/run/stratabox/api.sock"
DAEMON = "strataboxd.service"
_NO_KVM = (
    "udevadm settle; for each in kvm_amd kvm_intel; do"
    ' echo "install $each /bin/false" >>/etc/modprobe.d/no-kvm.conf; modprobe -q -r $each || true;'
    " done"
)
"""An emulated CPU may have SVM. With several of them, a machine in it stands still sooner or later;
see tests/kvm/outer.py."""
_LINE_SECONDS = 600.0
_numbers = itertools.count()


class CommandError(AssertionError):
    """A command in the outer host has failed."""


class Outer:
    """A host with systemd, seen from outside.

    :param folder: for the sockets that lead into it; its path is short.
    """

    def __init__(self, client: Client, box: Sandbox, folder: Path) -> None:
        self._client = client
        self.box = box
        self._folder = folder

    def run(self, line: str, *, seconds: float = _LINE_SECONDS) -> tuple[int, str]:
        """Run a line as root; its exit code, and all that it said."""
        done = self.box.execute(f"{{ {line}\n}} 2>&1", timeout=seconds)
        if done.exit_code is None:
            why = f"{seconds:.0f} s were not enough" if done.timed_out else "killed"
            raise CommandError(f"{line}: {why}:\n{done.stdout_text}")
        return done.exit_code, done.stdout_text.rstrip("\n")

    def sh(self, line: str, *, seconds: float = _LINE_SECONDS) -> str:
        """Run a line as root and return what it said, without the last newline.

        :raise CommandError: when it fails.
        """
        code, text = self.run(line, seconds=seconds)
        if code != 0:
            raise CommandError(f"{line}: exit code {code}:\n{text}")
        return text

    def put(self, source: Path) -> str:
        """Bring a file into /root; its path there."""
        path = f"/root/{source.name}"
        with source.open("rb") as file:
            self.box.files.write(path, file)
        return path

    @contextlib.contextmanager
    def api(self, socket: str = SYSTEM_API) -> Iterator[str]:
        """Lead to an API in there, as its root: the address by which that is reached here."""
        path = self._folder / f"{next(_numbers)}.sock"
        port = self._client.ports.add(self.box.id, socket, str(path))
        try:
            yield f"unix://{path}"
        finally:
            self._client.ports.remove(port.id)

    @contextlib.contextmanager
    def client(self, socket: str = SYSTEM_API) -> Iterator[Client]:
        """A client of an API in there."""
        with self.api(socket) as address, Client(address) as client:
            yield client

    def show(self, unit: str, name: str) -> str:
        """Give one property of a unit."""
        return self.sh(f"systemctl show --value -p {name} {unit}")

    def daemon_pid(self) -> int:
        """The system's daemon; 0: none runs."""
        return int(self.show(DAEMON, "MainPID"))

    def settle(self) -> None:
        """Wait until its boot is over."""
        self.run("systemctl is-system-running --wait", seconds=900)

    def journal(self) -> str:
        """The last words of the daemon, and of systemd about it."""
        try:
            return self.run(
                "systemctl --no-pager --full status 'strataboxd*' 'stratabox*.scope';"
                " journalctl --no-pager -n 80 -o short-precise"
            )[1]
        except (CommandError, StrataboxError) as error:
            return f"none: {error}"


def boot(client: Client, folder: Path, tell: Callable[[str], None]) -> Outer:
    """Boot an outer host without the package; its image is built where the cache has none."""
    tell("the outer host's image")
    client.images.build_debian(name=IMAGE, include=PACKAGES)
    tell("the outer host boots")
    box = client.sandboxes.create(image=IMAGE, name="outer", cpus=CPUS, memory=MEMORY_MIB)
    outer = Outer(client, box, folder)
    outer.settle()
    outer.sh(_NO_KVM)
    return outer


def again(client: Client, snapshot: Snapshot, folder: Path) -> Outer:
    """An outer host that goes on from the instant of a snapshot, as itself."""
    return Outer(client, client.snapshots.restore(snapshot.id, identity="keep"), folder)
