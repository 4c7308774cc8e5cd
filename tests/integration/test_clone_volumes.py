"""Clones with volumes of their own choice."""

from __future__ import annotations

from collections.abc import Callable

from stratabox.client import Client, Image, Sandbox, VolumeInUseError


def test_clones_get_volumes(client: Client, tiny: Image, sh: Callable[[Sandbox, str], str]) -> None:
    volume = client.volumes.create("for-clones", size_bytes=64 << 20)
    try:
        with client.sandboxes.create(image=tiny.id, memory=128) as box:
            (writer,) = box.clone(volumes=[f"{volume.id}:/data"]).sandboxes
            with writer:
                sh(writer, "echo from a copy >/data/file")
                (mount,) = writer.volumes
                assert (mount.path, mount.read_only) == ("/data", False)
                writer.stop()
            readers = box.clone(count=2, volumes=[f"{volume.id}:/data:ro"])
            assert readers.errors == ()
            for reader in readers.sandboxes:
                assert sh(reader, "cat /data/file") == "from a copy"
                reader.delete()
            # One writer: of two copies the other is missing, and says why.
            rivals = box.clone(count=2, volumes=[f"{volume.id}:/data"])
            assert len(rivals.sandboxes) == 1
            assert [type(error) for error in rivals.errors] == [VolumeInUseError]
            rivals.sandboxes[0].delete()
    finally:
        client.volumes.delete(volume.id)
