"""Outer hosts: sandboxes in which the package is installed. They are whole machines."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from installed.host import LINE_SECONDS, PACKAGES, SYSTEM_API, CommandError, Host
from stratabox.client import Client, Sandbox, Snapshot

CPUS = 2
MEMORY_MIB = 2048
_NO_KVM = (
    "udevadm settle; for each in kvm_amd kvm_intel; do"
    ' echo "install $each /bin/false" >>/etc/modprobe.d/no-kvm.conf; modprobe -q -r $each || true;'
    " done"
)
"""An emulated CPU may have SVM. With several of them, a machine in it stands still sooner or later;
see tests/kvm/outer.py."""
_numbers = itertools.count()


class Outer(Host):
    """A sandbox with systemd.

    :param folder: for the sockets that lead into it; its path is short.
    """

    def __init__(self, client: Client, box: Sandbox, folder: Path) -> None:
        self._client = client
        self.box = box
        self._folder = folder

    def run(self, line: str, *, seconds: float = LINE_SECONDS) -> tuple[int, str]:
        done = self.box.execute(f"{{ {line}\n}} 2>&1", timeout=seconds)
        if done.exit_code is None:
            why = f"{seconds:.0f} s were not enough" if done.timed_out else "killed"
            raise CommandError(f"{line}: {why}:\n{done.stdout_text}")
        return done.exit_code, done.stdout_text.rstrip("\n")

    def put(self, source: Path) -> str:
        path = f"/root/{source.name}"
        with source.open("rb") as file:
            self.box.files.write(path, file)
        return path

    @contextlib.contextmanager
    def api(self, socket: str = SYSTEM_API) -> Iterator[str]:
        path = self._folder / f"{next(_numbers)}.sock"
        port = self._client.ports.add(self.box.id, socket, str(path))
        try:
            yield f"unix://{path}"
        finally:
            self._client.ports.remove(port.id)


def boot(
    client: Client,
    folder: Path,
    tell: Callable[[str], None],
    *,
    name: str,
    more: Sequence[str] = (),
) -> Outer:
    """Boot an outer host without the package; its image is built where the cache has none.

    :param name: the image's, and the sandbox's.
    :param more: Debian packages beside those that ours depends on.
    """
    tell(f"{name}: its image")
    client.images.build_debian(name=name, include=[*PACKAGES, *more])
    tell(f"{name}: it boots")
    box = client.sandboxes.create(image=name, name=name, cpus=CPUS, memory=MEMORY_MIB)
    outer = Outer(client, box, folder)
    outer.settle()
    outer.sh(_NO_KVM)
    return outer


def again(client: Client, snapshot: Snapshot, folder: Path) -> Outer:
    """An outer host that goes on from the instant of a snapshot, as itself."""
    return Outer(client, client.snapshots.restore(snapshot.id, identity="keep"), folder)
