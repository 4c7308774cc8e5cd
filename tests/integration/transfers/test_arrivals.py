"""Archives between two daemons: what arrives is what was sent."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stratabox.client import (
    AsyncClient,
    ImageAlreadyExistsError,
    InvalidArchiveError,
    MissingBaseError,
    SnapshotLevel,
    TrustRequiredError,
)
from support import disks
from support.daemon import DaemonProcess
from support.rig import wait_idle
from support.stored import Stored, assert_ext4_is_clean, to_raw
from support.transfers import ENV, MIB, Scene, sh


def test_a_snapshot_arrives_whole(clean: Scene) -> None:
    done: list[tuple[int, int]] = []
    path = clean.folder / "progress.sbx"
    result = clean.client.snapshots.export(
        clean.first.id, path, progress=lambda so_far, total: done.append((so_far, total))
    )
    assert (result.path, result.resumed_bytes) == (path, 0)
    assert result.archive_bytes == path.stat().st_size
    assert result.content_bytes == done[-1][0] == done[-1][1] > result.archive_bytes
    assert done == sorted(done)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not path.with_name("progress.sbx.part").exists()

    sent: list[tuple[int, int]] = []
    came = clean.other.snapshots.import_file(
        path, progress=lambda so_far, total: sent.append((so_far, total))
    )
    assert sent[-1] == (path.stat().st_size, path.stat().st_size)
    assert came.left_out is None
    snapshot = came.snapshot
    assert snapshot == clean.other.snapshots.get(snapshot.id)
    assert snapshot.id != clean.first.id
    assert (snapshot.name, snapshot.metadata) == ("first", {"team": "db"})
    assert (snapshot.consistency, snapshot.state) == (SnapshotLevel.APPLICATION, "ready")
    assert (snapshot.source_sandbox_id, snapshot.image_id) == (None, None)
    assert snapshot.env == {}  # not asked for
    assert clean.content(clean.there, snapshot.id) == clean.content(clean.here, clean.first.id)
    root = to_raw(Stored(clean.there).of_snapshot(snapshot.id), clean.folder / "root.raw")
    assert_ext4_is_clean(root)
    root.unlink()
    assert disks.marker(Stored(clean.there).of_snapshot(snapshot.id, 1)) == "marked"
    assert clean.other.check().findings == ()
    with clean.other.snapshots.restore(snapshot.id) as box:
        assert sh(box, "cat /one; ls /two 2>/dev/null || echo none") == "one\nnone"
        assert box.image_id is None
        assert box.snapshot(quick=True).image_id is None  # and works as any other does
    path.unlink()


def test_the_same_record_makes_the_same_bytes(scene: Scene) -> None:
    found = io.BytesIO()
    result = scene.client.snapshots.export("first", found)
    assert result.path is None
    assert found.getvalue() == scene.whole.read_bytes()
    assert ENV["SECRET"].encode() not in found.getvalue()


def test_memory_comes_only_with_trust_and_goes_on(clean: Scene) -> None:
    came = clean.other.snapshots.import_file(clean.memory, name="distrusted")
    assert isinstance(came.left_out, TrustRequiredError)
    assert (came.snapshot.name, came.snapshot.consistency) == ("distrusted", SnapshotLevel.CRASH)
    assert came.snapshot.memory_bytes == 0
    assert list((clean.there.state / "ram").iterdir()) == []

    came = clean.other.snapshots.import_file(clean.memory, trust=True)
    assert came.left_out is None
    assert came.snapshot.consistency is SnapshotLevel.MEMORY
    assert came.snapshot.memory_bytes > MIB
    assert came.snapshot.env == ENV
    assert clean.other.check().findings == ()
    with clean.other.snapshots.restore(came.snapshot.id, verify=True) as box:
        assert sh(box, "cat /proc/sys/kernel/random/boot_id") == clean.nonce
        pid, _, count = sh(box, "cat /mnt/test/now").split()
        sh(box, f"while read -r pid nonce n < /mnt/test/now && [ $n -le {count} ]; do :; done")
        assert sh(box, "cat /mnt/test/now").split()[0] == pid
        # What it saves next stands on what came.
        with clean.other.snapshots.restore(box.snapshot(level="memory").id) as copy:
            assert sh(copy, "cat /proc/sys/kernel/random/boot_id") == clean.nonce
    with clean.other.snapshots.restore(came.snapshot.id, cold=True) as box:
        assert sh(box, "cat /two") == "two"
        assert sh(box, "cat /proc/sys/kernel/random/boot_id") != clean.nonce


def test_only_what_came_since(clean: Scene) -> None:
    path = clean.export(clean.second, "since.sbx", since=clean.first.id)
    assert path.stat().st_size < clean.whole.stat().st_size / 10
    with pytest.raises(MissingBaseError, match="import the snapshot"):
        clean.other.snapshots.import_file(path)
    first = clean.other.snapshots.import_file(clean.whole).snapshot
    # What nobody names is merged into what stands on it, and what is compacted is written anew: the
    # layers are other ones then, and read the same.
    before = clean.there.layers()
    clean.other.snapshots.compact(first.id)
    wait_idle(clean.there)
    assert not clean.there.layers() >= before
    second = clean.other.snapshots.import_file(path).snapshot
    assert second.parent_snapshot_id == first.id
    assert clean.content(clean.there, second.id) == clean.content(clean.here, clean.second.id)
    # What it stands on stays for it.
    clean.other.snapshots.delete(first.id)
    assert clean.content(clean.there, second.id) == clean.content(clean.here, clean.second.id)


def test_what_it_stands_on_is_written_anew_while_it_comes(clean: Scene) -> None:
    path = clean.export(clean.second, "since-memory.sbx", since=clean.first.id, memory=True)
    first = clean.other.snapshots.import_file(clean.whole).snapshot
    wait_idle(clean.there)
    before = clean.there.layers()
    written = threading.Event()

    def write_anew(done: int, total: int) -> None:
        """In the middle: the daemon knows by then which layers it will stand on."""
        if done > total // 2 and not written.is_set():
            clean.other.snapshots.compact(first.id)
            # What comes is there by now, too: their number says nothing.
            assert not clean.there.layers() >= before
            written.set()

    second = clean.other.snapshots.import_file(path, trust=True, progress=write_anew).snapshot
    assert written.is_set()
    assert second.consistency is SnapshotLevel.MEMORY
    assert clean.content(clean.there, second.id) == clean.content(clean.here, clean.second.id)


def test_what_is_there_already_is_not_kept_twice(clean: Scene) -> None:
    """By what layers hold: an image that was built there, a snapshot that came before."""
    image = clean.other.images.build_tiny()
    before = clean.there.layers()
    first = clean.other.snapshots.import_file(clean.whole).snapshot
    assert first.image_id == image.id
    assert len(clean.there.layers()) == len(before) + 2
    again = clean.other.snapshots.import_file(clean.whole, name="again").snapshot
    assert len(clean.there.layers()) == len(before) + 2
    clean.other.snapshots.delete(first.id)
    assert clean.content(clean.there, again.id) == clean.content(clean.here, clean.first.id)


def test_an_image_arrives(clean: Scene) -> None:
    path = clean.folder / "tiny.sbx"
    clean.client.images.export("tiny", path)
    image = clean.other.images.import_archive(path)
    here = clean.client.images.get("tiny")
    assert (image.name, image.origin, image.boot) == ("tiny", "import", here.boot)
    assert (image.kernel_sha256, image.initrd_sha256) == (here.kernel_sha256, here.initrd_sha256)
    assert image.size_bytes == here.size_bytes
    with pytest.raises(ImageAlreadyExistsError):
        clean.other.images.import_archive(path)
    with pytest.raises(InvalidArchiveError, match="snapshot import"):
        clean.other.images.import_archive(clean.whole, name="other")
    with pytest.raises(InvalidArchiveError, match="image import"):
        clean.other.snapshots.import_file(path)
    with clean.other.sandboxes.create(image="tiny", memory=128) as box:
        assert sh(box, "echo lives") == "lives"


async def test_the_other_face(clean: Scene) -> None:
    path = clean.folder / "async.sbx"
    async with AsyncClient(clean.here.address) as here, AsyncClient(clean.there.address) as there:
        await here.snapshots.export(clean.first.id, path)
        assert path.read_bytes() == clean.whole.read_bytes()
        came = await there.snapshots.import_file(path)
        assert came.snapshot.name == "first"


def stratabox(
    process: DaemonProcess, *words: str | Path, given: bytes = b"", code: int = 0
) -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "stratabox.client.cli", *map(str, words)],
        env=process.environment,
        input=given,
        capture_output=True,
        check=False,
    )
    assert done.returncode == code, done
    return done.stdout if code == 0 else done.stderr


def test_the_command_line(clean: Scene, tmp_path: Path) -> None:
    path = tmp_path / "cli.sbx"
    told = json.loads(stratabox(clean.here, "snapshot", "export", "first", path, "--json"))
    assert told["path"] == str(path)
    assert told["archive_bytes"] == path.stat().st_size
    archive = stratabox(clean.here, "snapshot", "export", "second", "-", "--memory", "--env")
    assert archive == clean.memory.read_bytes()
    told = json.loads(
        stratabox(clean.there, "snapshot", "import", "-", "--name", "x", "--json", given=archive)
    )
    assert (told["snapshot"]["name"], told["left_out"]["reason"]) == ("x", "TRUST_REQUIRED")
    told = json.loads(
        stratabox(
            clean.there, "snapshot", "import", clean.memory, "--trust", "--json", given=archive
        )
    )
    assert (told["snapshot"]["consistency"], told["left_out"]) == ("memory", None)
    image = stratabox(clean.here, "image", "export", "tiny", "-")
    told = json.loads(
        stratabox(clean.there, "image", "import", "-", "--format", "archive", "--json", given=image)
    )
    assert told["name"] == "tiny"
    assert b"INVALID_ARCHIVE" in stratabox(
        clean.there, "snapshot", "import", "-", "--json", given=b"x" * 999, code=2
    )
    assert b"there already" in stratabox(clean.here, "snapshot", "export", "first", path, code=2)
