"""What the two levels promise, shown by what lies in the snapshots."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratabox.client import Client, Image, Sandbox, SandboxState, Snapshot, SnapshotLevel
from support import disks
from support.daemon import DaemonProcess
from support.stored import Stored, assert_ext4_is_clean, ext4_features, run_tool, to_raw, wait_until
from support.waiting import until

Shell = Callable[[Sandbox, str], str]

WRITER = """
number=0
while :; do
    number=$((number + 1))
    for disk in vdb vdc; do
        printf '%s\\n' $number | dd of=/dev/$disk bs=512 conv=sync,notrunc oflag=direct,dsync
    done
    echo $number >/run/acknowledged.new
    mv /run/acknowledged.new /run/acknowledged
    dd if=/dev/zero of=/busy bs=4096 count=1 conv=fsync
done
"""
"""Each number goes to the first data disk and then to the second, and then counts as written."""

MODES = ("wal", "delete")
"""SQLite's journals: the newer one that is read back, and the older one that is rolled back."""

DATABASES = """
import os, sqlite3, sys, threading

def work(mode):
    database = sqlite3.connect(f"/root/{mode}.db", isolation_level=None)
    assert database.execute(f"PRAGMA journal_mode={mode}").fetchone()[0] == mode
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE log (id INTEGER PRIMARY KEY, filler BLOB)")
    database.execute("CREATE TABLE total (rows INTEGER)")
    database.execute("INSERT INTO total VALUES (0)")
    number = 0
    while True:
        number += 1
        old = (os.urandom(2000), number - 5)
        database.execute("BEGIN")
        database.execute("INSERT INTO log VALUES (?, ?)", (number, os.urandom(3000)))
        database.execute("UPDATE total SET rows = rows + 1")
        database.execute("UPDATE log SET filler = ? WHERE id = ?", old)
        database.execute("COMMIT")
        with open(f"/run/{mode}.new", "w") as file:
            print(number, file=file)
        os.rename(f"/run/{mode}.new", f"/run/{mode}")

for mode in sys.argv[1:]:
    threading.Thread(target=work, args=(mode,)).start()
"""
"""What has been committed and is durable is told in /run/MODE."""

EXAMINE = """
import sqlite3, sys
for file in sys.argv[1:]:
    database = sqlite3.connect(file)
    verdict, = database.execute("PRAGMA integrity_check").fetchone()
    print(verdict, *database.execute("SELECT count(*), max(id) FROM log").fetchone(), end=" ")
    print(*database.execute("SELECT rows FROM total").fetchone())
    database.close()
"""
"""A line for each database. Run in the guest, and on the host."""


@pytest.fixture(scope="module")
def stored(shared_daemon: DaemonProcess) -> Stored:
    return Stored(shared_daemon)


@pytest.fixture(scope="module", autouse=True)
def _sealed_layers_stay(stored: Stored) -> Iterator[None]:
    """Whatever these tests do: a layer that is there before and after is the same."""
    before = stored.sealed()
    yield
    after = stored.sealed()
    assert {name: after[name] for name in before if name in after} == {
        name: digest for name, digest in before.items() if name in after
    }


@dataclass(frozen=True)
class Taken:
    """A snapshot, and what had been acknowledged before it was asked for and after it was there."""

    snapshot: Snapshot
    before: int
    after: int


@pytest.fixture(scope="module")
def busy(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """A guest that writes to its root disk and two more, without end."""
    with client.sandboxes.create(image=tiny.id, memory=192, data_disks=[1, 1]) as box:
        box.execute(f"cat >/run/writer <<'END'\n{WRITER}\nEND").check()
        box.execute("setsid /bin/sh /run/writer >/dev/null 2>&1 </dev/null &").check()
        wait_until(lambda: box.execute("cat /run/acknowledged").ok)
        yield box


@pytest.fixture(scope="module")
def taken(busy: Sandbox) -> list[Taken]:
    """Snapshots of the busy guest, of both levels, the last ones asked for at once."""

    def acknowledged() -> int:
        return int(busy.execute("cat /run/acknowledged").check().stdout)

    def take(level: SnapshotLevel) -> Taken:
        before = acknowledged()
        snapshot = busy.snapshot(level=level)
        assert snapshot.consistency is level
        return Taken(snapshot, before, acknowledged())

    levels = [SnapshotLevel.CRASH, SnapshotLevel.APPLICATION] * 4
    with ThreadPoolExecutor(4) as pool:
        taken = [take(level) for level in levels] + list(pool.map(take, levels[:4]))
    busy.pause()  # it takes a whole CPU
    return taken


def test_disks_are_of_one_instant(stored: Stored, taken: list[Taken]) -> None:
    """The first disk is written first: it is ahead by one at most, and the second never is."""
    seen = []
    for each in taken:
        first, second = (
            int(disks.marker(stored.of_snapshot(each.snapshot.id, index))) for index in (1, 2)
        )
        assert 0 <= first - second <= 1
        assert each.before <= second
        assert second <= each.after + 1
        seen.append(second)
    assert seen[:8] == sorted(seen[:8])
    assert seen[7] - seen[0] > 1, "the writer stood still: this shows nothing"


def test_application_level_needs_no_recovery_and_crash_level_does(
    stored: Stored, taken: list[Taken], tmp_path: Path
) -> None:
    for each in taken:
        raw = to_raw(stored.of_snapshot(each.snapshot.id), tmp_path / "root.raw")
        if each.snapshot.consistency is SnapshotLevel.APPLICATION:
            assert "needs_recovery" not in ext4_features(raw)
            assert_ext4_is_clean(raw)
        else:
            assert "needs_recovery" in ext4_features(raw)


def test_what_was_on_the_disk_before_the_call_is_in_the_restored_guest(
    client: Client, busy: Sandbox, sh: Shell
) -> None:
    busy.resume()
    digest = sh(
        busy,
        "dd if=/dev/urandom of=/precious bs=1M count=4 conv=fsync 2>/dev/null"
        " && sha256sum /precious",
    )
    snapshot = busy.snapshot(quick=True)
    sh(busy, "dd if=/dev/zero of=/precious bs=1M count=4 conv=fsync,notrunc 2>/dev/null")
    busy.pause()
    with client.snapshots.restore(snapshot.id) as restored:
        assert sh(restored, "sha256sum /precious") == digest


def test_databases_under_load_survive_a_crash_snapshot(
    client: Client, debian: Image, stored: Stored, sh: Shell, tmp_path: Path
) -> None:
    with client.sandboxes.create(image=debian.id, memory=512) as box:
        box.execute(
            f"cat >/root/writer.py <<'END'\n{DATABASES}\nEND\n"
            f"setsid python3 /root/writer.py {' '.join(MODES)} >/dev/null 2>&1 </dev/null &"
        ).check()

        def acknowledged() -> list[int]:
            return [int(line) for line in sh(box, "cat /run/wal /run/delete").split()]

        wait_until(lambda: box.execute("cat /run/wal /run/delete").ok)

        def is_beyond(before: list[int]) -> bool:
            return all(first < last for first, last in zip(before, acknowledged(), strict=True))

        taken = []
        for _ in range(4):
            before = acknowledged()
            taken.append((before, box.snapshot(level="crash")))
            wait_until(lambda before=before: is_beyond(before))  # type: ignore[misc]
    with client.snapshots.restore(taken[-1][1].id) as restored:
        files = " ".join(f"/root/{mode}.db" for mode in MODES)
        assert_sound(sh(restored, f"python3 - {files} <<'END'\n{EXAMINE}\nEND"), taken[-1][0])
    # The others without a boot: e2fsck plays the file system's journal in the guest's stead.
    for before, snapshot in taken[:-1]:
        raw = to_raw(stored.of_snapshot(snapshot.id), tmp_path / "root.raw")
        run_tool("e2fsck", "-fy", raw, fine=(0, 1))
        folder = tmp_path / snapshot.id
        folder.mkdir()
        databases = [_take_out(raw, f"/root/{mode}.db", folder) for mode in MODES]
        assert_sound(run_tool(sys.executable, "-c", EXAMINE, *databases), before)


def assert_sound(examined: str, acknowledged: list[int]) -> None:
    """Sound databases, whose transactions are whole, and none that was acknowledged is missing."""
    for line, least in zip(examined.splitlines(), acknowledged, strict=True):
        verdict, *numbers = line.split()
        count, highest, total = map(int, numbers)
        assert verdict == "ok"
        assert count == highest == total
        assert count >= least


def _take_out(raw: Path, path: str, folder: Path) -> Path:
    """Get a database out of a file system, with the journal that may lie beside it."""
    target = folder / Path(path).name
    for suffix in ("", "-wal", "-journal"):
        run_tool("debugfs", "-R", f"dump {path}{suffix} {target}{suffix}", raw)
    assert target.exists()
    assert "wal" not in path or Path(f"{target}-wal").exists()
    return target


def test_sealed_layers_never_change(
    shared_daemon: DaemonProcess,
    client: Client,
    stored: Stored,
    busy: Sandbox,
    taken: list[Taken],
    sh: Shell,
) -> None:
    """Not by anything that is done with the sandboxes and snapshots that stand on them."""
    before = stored.sealed()
    first, second, third, *_ = [each.snapshot.id for each in taken]
    own = {stored.of_snapshot(each.snapshot.id, index).name for each in taken for index in range(3)}
    assert own <= before.keys()

    restored = client.snapshots.restore(second)
    sh(restored, "dd if=/dev/urandom of=/noise bs=1M count=8 conv=fsync 2>/dev/null")
    copies = restored.clone(count=2, wait_for_ready=False)
    assert len(copies.sandboxes) == 2
    os.kill(shared_daemon.guests()[restored.id], signal.SIGKILL)
    until(client, restored.id, lambda box: box.state is SandboxState.FAILED)
    restored.start()
    sh(restored, "dd if=/dev/urandom of=/noise bs=1M count=8 conv=fsync,notrunc 2>/dev/null")
    restored.snapshot()
    client.snapshots.delete(first)
    client.snapshots.delete(third)
    for copy in copies.sandboxes:
        copy.delete()
    client.snapshots.delete(copies.snapshot.id)
    busy.revert(taken[4].snapshot.id, wait_for_ready=False)
    restored.delete()
    busy.stop()

    after = stored.sealed()
    # What the two deleted ones had sealed is below the later ones, until it is merged into them.
    assert own & after.keys()
    assert {name: digest for name, digest in after.items() if name in before} == {
        name: digest for name, digest in before.items() if name in after
    }
