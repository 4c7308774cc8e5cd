"""Saved memory on the disk: what it costs, what leaves it, and that damage is found.

One guest and its snapshots serve all tests; whoever damages a file puts it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratabox.client import (
    Client,
    CorruptError,
    Finding,
    InvalidArgumentError,
    PageTracking,
    Sandbox,
    Snapshot,
)
from support.daemon import DaemonProcess, daemon
from support.rig import eventually

MIB = 1 << 20
WRITTEN = 16 * MIB


@dataclass
class Kept:
    """A daemon, a guest with a file system in its RAM, and its snapshots, oldest first."""

    process: DaemonProcess
    client: Client
    box: Sandbox
    snapshots: list[Snapshot]
    digests: list[str]
    """Of what the guest's RAM held at each."""

    def ram(self, number: int) -> Path:
        return self.process.state / "ram" / f"{self.snapshots[number].id}.ram"

    def state(self, number: int) -> Path:
        return self.ram(number).with_suffix(".state")

    def layer(self, number: int) -> Path:
        ((layer,),) = self.process.rows(
            f"SELECT layer FROM snapshot_disks WHERE snapshot = '{self.snapshots[number].id}'"
        )
        return self.process.state / "layers" / f"{layer}.qcow2"

    def blob(self) -> Path:
        (kernel,) = {row[0] for row in self.process.rows("SELECT kernel FROM images")}
        return self.process.state / "blobs" / str(kernel)

    def check_restore(self, number: int, *, verify: bool = False) -> None:
        """It is what it was."""
        copy = self.client.snapshots.restore(self.snapshots[number].id, verify=verify)
        try:
            assert digest(copy) == self.digests[number]
        finally:
            copy.delete()


def digest(sandbox: Sandbox) -> str:
    result = sandbox.execute("cat /ram/* | sha256sum", timeout=300)
    assert result.exit_code == 0
    return result.stdout.decode()


def write(sandbox: Sandbox, name: str, size: int = WRITTEN) -> None:
    line = f"head -c {size} /dev/urandom > /ram/{name}"
    assert sandbox.execute(line, timeout=300).exit_code == 0


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    with daemon(tmp_path_factory.mktemp("saved")) as process:
        client = process.start()
        client.images.build_tiny()
        box = client.sandboxes.create(image="tiny", memory=192)
        assert box.execute("mkdir -p /ram && mount -t tmpfs none /ram").exit_code == 0
        taken, digests = [], []
        for number in range(4):
            write(box, f"file{number % 2}")
            digests.append(digest(box))
            taken.append(box.snapshot(level="memory"))
        yield Kept(process, client, box, taken, digests)
        client.close()
        process.stop()


@pytest.fixture
def found(kept: Kept) -> Iterator[Callable[[], tuple[Finding, ...]]]:
    """What a check finds; nothing before the test, and nothing after it."""

    def check() -> tuple[Finding, ...]:
        return kept.client.check().findings

    assert check() == ()
    yield check
    assert check() == ()


@contextlib.contextmanager
def put_back(path: Path) -> Iterator[None]:
    """A file that is what it was once the context ends."""
    content, mode = path.read_bytes(), path.stat().st_mode
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        path.chmod(mode)


def flip(path: Path, position: float) -> None:
    """Turn one bit around, as a bad disk does: the mode stays."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(int(position * path.stat().st_size))
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    path.chmod(mode)


# -- what it costs --------------------------------------------------------------------------------


def test_a_snapshot_costs_what_was_written(kept: Kept) -> None:
    """Random data, of which nothing can be saved; the rest, the kernel's own writing, is packed."""
    first, *others = (kept.ram(number).stat().st_blocks * 512 for number in range(4))
    assert kept.snapshots[0].memory_bytes <= first
    # Half of what a guest has written when it has booted is left.
    assert first < 16 * MIB + 40 * MIB
    if kept.snapshots[0].page_tracking is PageTracking.WRITTEN:
        assert max(others) <= WRITTEN * 1.1


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.9, 0.9999])
def test_a_flipped_bit_in_saved_memory_is_found(
    kept: Kept, found: Callable[[], tuple[Finding, ...]], position: float
) -> None:
    """In the header, in pages, in the tables; of a file that others stand on."""
    ram = kept.ram(1)
    with put_back(ram):
        flip(ram, position)
        (finding,) = found()
        assert (finding.reason, finding.kind) == ("RAM_CORRUPT", "snapshot")
        assert finding.subject == kept.snapshots[1].id
        assert kept.snapshots[3].id in finding.message
        assert kept.snapshots[0].id not in finding.message
        assert "--cold" in finding.cure
        with pytest.raises(CorruptError) as caught:
            kept.client.snapshots.restore(kept.snapshots[3].id, verify=True)
        assert caught.value.reason == "RAM_CORRUPT"
        assert caught.value.metadata["file"] == ram.name
        assert kept.client.sandboxes.list(include_terminated=True) == [kept.box.refresh()]
        if position == 0.3:
            # The one below is as good as ever.
            kept.check_restore(0, verify=True)


def test_what_is_ready_in_memory_does_not_hide_damage(
    kept: Kept, found: Callable[[], tuple[Finding, ...]]
) -> None:
    kept.check_restore(3)
    with put_back(kept.ram(3)):
        flip(kept.ram(3), 0.5)
        with pytest.raises(CorruptError, match=kept.ram(3).name):
            kept.client.snapshots.restore(kept.snapshots[3].id, verify=True)
        assert [finding.reason for finding in found()] == ["RAM_CORRUPT"]
    kept.check_restore(3, verify=True)
    kept.check_restore(3)


def test_what_was_assembled_of_damaged_files_is_not_taken_for_verified(
    kept: Kept, found: Callable[[], tuple[Finding, ...]]
) -> None:
    """Pages that are stored as they are, are not compared by a restore that was not told to."""
    with put_back(kept.ram(2)):
        flip(kept.ram(2), 0.5)
        with contextlib.suppress(CorruptError):
            kept.client.snapshots.restore(kept.snapshots[2].id, wait_for_ready=False).delete()
    kept.check_restore(2, verify=True)


def test_lost_and_foreign_files(kept: Kept, found: Callable[[], tuple[Finding, ...]]) -> None:
    for path, reason, kind, subject in (
        (kept.ram(2), "RAM_CORRUPT", "snapshot", kept.snapshots[2].id),
        (kept.state(2), "STATE_CORRUPT", "snapshot", kept.snapshots[2].id),
        (kept.layer(2), "LAYER_MISSING", "layer", kept.layer(2).stem),
    ):
        with put_back(path):
            path.unlink()
            (finding,) = found()
            assert (finding.reason, finding.kind, finding.subject) == (reason, kind, subject)
            assert kept.snapshots[2].id in finding.message
            with pytest.raises(CorruptError) as caught:
                kept.client.snapshots.restore(kept.snapshots[2].id, verify=True)
            assert caught.value.reason == reason
    stray = kept.ram(0).with_name("00000000-0000-4000-8000-000000000000.ram")
    stray.write_bytes(b"x")
    (finding,) = found()
    assert (finding.reason, finding.kind, finding.subject) == ("STRAY_FILE", "file", stray.name)
    stray.unlink()


def test_a_flipped_bit_elsewhere_is_found(
    kept: Kept, found: Callable[[], tuple[Finding, ...]]
) -> None:
    with put_back(kept.state(3)):
        flip(kept.state(3), 0.5)
        (finding,) = found()
        assert (finding.reason, finding.subject) == ("STATE_CORRUPT", kept.snapshots[3].id)
        with pytest.raises(CorruptError, match=kept.state(3).name):
            kept.client.snapshots.restore(kept.snapshots[3].id, verify=True)
    with put_back(kept.layer(0)):
        flip(kept.layer(0), 0.0)
        (finding,) = found()
        assert (finding.reason, finding.subject) == ("LAYER_CORRUPT", kept.layer(0).stem)
        assert kept.box.id in finding.message
    with put_back(kept.blob()):
        flip(kept.blob(), 0.5)
        (finding,) = found()
        assert (finding.reason, finding.kind) == ("BLOB_CORRUPT", "image")
        assert finding.subject == kept.client.images.get("tiny").id


def test_damage_to_a_parked_guest_s_memory_is_found(
    kept: Kept, found: Callable[[], tuple[Finding, ...]]
) -> None:
    with kept.client.snapshots.restore(kept.snapshots[3].id) as copy:
        copy.pause(to_disk=True)
        ((ram,),) = kept.process.rows(f"SELECT ram_parked FROM sandboxes WHERE id = '{copy.id}'")
        path = kept.ram(0).with_name(f"{ram}.ram")
        with put_back(path):
            flip(path, 0.0)
            (finding,) = found()
            assert (finding.reason, finding.kind) == ("RAM_CORRUPT", "sandbox")
            assert finding.subject == copy.id
        copy.resume()
        assert digest(copy) == kept.digests[3]


def test_a_right_to_write_is_found(kept: Kept, found: Callable[[], tuple[Finding, ...]]) -> None:
    for path in (kept.ram(1), kept.state(1), kept.layer(1)):
        mode = path.stat().st_mode & 0o777
        path.chmod(0o600)
        (finding,) = found()
        assert finding.reason == "NOT_SEALED"
        path.chmod(mode)


def test_the_command_tells_and_exits_by_what_it_found(kept: Kept) -> None:
    def check(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stratabox.client.cli", "check", *words],
            env=kept.process.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    clean = check("--json")
    assert clean.returncode == 0
    assert json.loads(clean.stdout)["findings"] == []
    assert json.loads(clean.stdout)["bytes"] > kept.snapshots[0].memory_bytes
    with put_back(kept.ram(1)):
        flip(kept.ram(1), 0.5)
        damaged = check()
        assert damaged.returncode == 1
        assert "RAM_CORRUPT" in damaged.stdout
        assert kept.ram(1).name in damaged.stdout
        assert "--cold" in damaged.stdout
        (finding,) = json.loads(check("--json").stdout)["findings"]
        assert finding["subject"] == kept.snapshots[1].id


def test_there_must_be_something_to_verify(kept: Kept) -> None:
    disks = kept.box.snapshot(quick=True)
    for snapshot, cold in ((disks, False), (kept.snapshots[0], True)):
        with pytest.raises(InvalidArgumentError, match="verify"):
            kept.client.snapshots.restore(snapshot.id, verify=True, cold=cold)
    kept.client.snapshots.delete(disks.id)
    with pytest.raises(InvalidArgumentError, match="verify"):
        kept.client.sandboxes.create(image="tiny", verify=True)


# -- what leaves it -------------------------------------------------------------------------------


def test_nothing_is_found_while_things_come_and_go(kept: Kept) -> None:
    """Snapshots, their deletion, and the merges that follow."""
    ended = threading.Event()

    def check() -> int:
        count = 0
        while not ended.is_set():
            assert kept.client.check().findings == ()
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(check)
        try:
            for _ in range(3):
                taken = [kept.box.snapshot(level="memory") for _ in range(3)]
                for snapshot in taken[::-1]:
                    kept.client.snapshots.delete(snapshot.id)
        finally:
            ended.set()
        assert checking.result() > 0


def test_deleted_memory_goes_into_the_next_and_restores_go_on(kept: Kept) -> None:
    """The last test: it deletes. Copies are restored all the time while files leave the chain."""
    before = sum(kept.ram(number).stat().st_blocks * 512 for number in range(4))
    ended = threading.Event()

    def restore() -> int:
        count = 0
        while not ended.is_set():
            kept.check_restore(3, verify=bool(count % 2))
            count += 1
        return count

    def files() -> set[str]:
        return {path.name for path in kept.ram(0).parent.iterdir()}

    with ThreadPoolExecutor(1) as pool:
        restoring = pool.submit(restore)
        try:
            for number in (2, 1):
                gone = kept.ram(number)
                kept.client.snapshots.delete(kept.snapshots[number].id)
                eventually(lambda gone=gone: gone.name not in files(), seconds=400)  # type: ignore[misc]
        finally:
            ended.set()
        assert restoring.result() > 0
    kept.process.check_consistent()
    assert kept.client.check().findings == ()
    kept.check_restore(0, verify=True)
    kept.check_restore(3, verify=True)
    # What was written over is gone, as far as the guest used the same pages for it again.
    after = sum(kept.ram(number).stat().st_blocks * 512 for number in (0, 3))
    if kept.snapshots[0].page_tracking is PageTracking.WRITTEN:
        assert after <= before - WRITTEN // 2
    with kept.client.snapshots.restore(kept.snapshots[3].id) as copy:
        # And a snapshot of what goes on from there stands on it.
        write(copy, "more", MIB)
        again = copy.snapshot(level="memory")
        expected = digest(copy)
        kept.client.snapshots.delete(kept.snapshots[0].id)
        eventually(lambda: kept.ram(0).name not in files(), seconds=400)
        with kept.client.snapshots.restore(again.id, verify=True) as copied:
            assert digest(copied) == expected
    kept.client.snapshots.delete(again.id)
    kept.check_restore(3, verify=True)
