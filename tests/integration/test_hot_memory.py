"""The memory of what was saved or restored last is ready before anybody asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.client import Client, Sandbox
from support.daemon import DaemonProcess, daemon
from support.rig import eventually

MEMFD = "/memfd:stratabox-ram (deleted)"


class Scene:
    """A daemon, and a guest to take snapshots of."""

    def __init__(self, process: DaemonProcess) -> None:
        self.process = process
        self.client: Client = process.start()
        self.client.images.build_tiny()
        self.box: Sandbox = self.client.sandboxes.create(image="tiny", memory=128)

    def restart(self, **environment: str) -> None:
        self.client.close()
        self.process.stop()
        self.client = self.process.start(environment=environment)
        self.box = self.client.sandboxes.get(self.box.id)

    def ready(self) -> int:
        """How many snapshots' memory the daemon holds, assembled and sealed."""
        found = set()
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                if str(link.readlink()) == MEMFD:
                    found.add(link.stat().st_ino)
            except FileNotFoundError:
                continue
        return len(found)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with daemon(tmp_path_factory.mktemp("hot")) as process:
        made = Scene(process)
        yield made
        made.client.close()


def test_a_snapshot_is_ready_soon_after_it_was_taken_and_goes_with_it(scene: Scene) -> None:
    assert scene.ready() == 0
    first = scene.box.snapshot(level="memory")
    eventually(lambda: scene.ready() == 1)
    second = scene.box.snapshot(level="memory")
    eventually(lambda: scene.ready() == 2)
    scene.client.snapshots.delete(first.id)
    eventually(lambda: scene.ready() == 1)
    with scene.client.snapshots.restore(second.id):
        assert scene.ready() == 1
    scene.client.snapshots.delete(second.id)
    eventually(lambda: scene.ready() == 0)
    # Of one that is deleted at once nothing stays either, whether it was begun or not.
    for _ in range(3):
        scene.client.snapshots.delete(scene.box.snapshot(level="memory").id)
    last = scene.box.snapshot(level="memory")
    eventually(lambda: scene.ready() == 1)  # perhaps half made
    scene.client.snapshots.delete(last.id)
    eventually(lambda: scene.ready() == 0)


def test_a_new_daemon_makes_it_ready_again(scene: Scene) -> None:
    snapshot = scene.box.snapshot(level="memory")
    scene.restart()
    eventually(lambda: scene.ready() == 1)
    scene.client.snapshots.delete(snapshot.id)
    eventually(lambda: scene.ready() == 0)


def test_not_beyond_its_bound(scene: Scene) -> None:
    scene.restart(STRATABOX_MEMORY_CACHE="1MiB")
    snapshot = scene.box.snapshot(level="memory")
    # The log says why not; the restore assembles it, and lets go of it.
    eventually(lambda: "there is room for 1048576" in scene.process.log.read_text())
    assert scene.ready() == 0
    scene.client.snapshots.restore(snapshot.id).delete()
    eventually(lambda: scene.ready() == 0)
    scene.client.snapshots.delete(snapshot.id)
    scene.restart()
