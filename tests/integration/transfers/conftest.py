"""One scene for all tests of transfers: a guest is booted once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import counting as counter
from support.daemon import daemon
from support.transfers import ENV, Scene, sh


@pytest.fixture(scope="package")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("transfers")
    (folder / "here").mkdir()
    (folder / "there").mkdir()
    with daemon(folder / "here") as here, daemon(folder / "there") as there:
        client, other = here.start(), there.start()
        client.images.build_tiny()
        box = client.sandboxes.create(
            image="tiny", memory=128, env=ENV, metadata={"a": "b"}, data_disks=[1]
        )
        sh(box, "echo one > /one && dd if=/dev/urandom of=/noise bs=1M count=9 && sync")
        sh(box, "echo marked | dd of=/dev/vdb bs=512 conv=sync,fsync,notrunc")
        first = box.snapshot(name="first", level="application", metadata={"team": "db"})
        sh(box, "echo two > /two && rm /noise && sync")
        nonce = sh(box, "cat /proc/sys/kernel/random/boot_id")
        counter.start(box)
        second = box.snapshot(name="second", level="memory")
        box.terminate()
        yield Scene(here, client, there, other, folder, first, second, nonce)
        client.close()
        other.close()


@pytest.fixture
def clean(scene: Scene) -> Iterator[Scene]:
    """The other daemon is empty before and after."""
    scene.clear()
    yield scene
    scene.clear()
    scene.assert_nothing_is_there()
