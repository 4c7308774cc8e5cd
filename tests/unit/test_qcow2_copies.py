"""Clusters read from one qcow2 and written to another: the same disk, whatever wrote the first."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from stratabox.storage.model.errors import CorruptError
from stratabox.storage.qcow2 import empty, qemu_img
from stratabox.storage.qcow2.clusters import DATA, ZERO, Clusters
from stratabox.storage.qcow2.empty import CLUSTER
from stratabox.storage.qcow2.fresh import FreshDisk

COUNT = 64
GIB = 1 << 30


def io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, path], capture_output=True, text=True, check=True
    )
    assert "failed" not in done.stdout, done.stdout


def copy(source: Path, target: Path, backing: str | None) -> dict[int, int]:
    """Copy cluster by cluster; returns the states of those that are not absent."""
    found: dict[int, int] = {}
    with Clusters(source) as clusters, FreshDisk(target, clusters.size, backing) as fresh:
        for number, _ in clusters.runs(COUNT):
            states, data = clusters.read(number * COUNT, COUNT)
            found |= {number * COUNT + at: state for at, state in enumerate(states) if state}
            fresh.add(number * COUNT, states, b"".join(data))
        fresh.finish()
    return found


def same(one: Path, other: Path) -> None:
    subprocess.run(["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", one, other], check=True)


def test_an_overlay_keeps_what_is_its_own(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    empty.create(base, 2 * GIB, None)
    io(base, "write -P 7 0 4M", f"write -P 8 {GIB} 1M")
    empty.create(overlay, 2 * GIB, "base.qcow2")
    io(
        overlay,
        "write -P 1 64k 64k", "write -P 2 128k 64k",  # neighbours, also in the file
        "write -z 1M 64k",                            # zeros over data below
        "write -P 0 2M 64k",                          # data that is zeros
        f"write -P 3 {2 * GIB - CLUSTER} 64k", "write -P 4 512M 512",
    )  # fmt: skip
    target = tmp_path / "copy.qcow2"
    states = copy(overlay, target, "base.qcow2")
    assert states == {
        1: DATA, 2: DATA, 16: ZERO, 32: ZERO, 512 * 16: DATA, 2 * GIB // CLUSTER - 1: DATA,
    }  # fmt: skip
    same(overlay, target)
    found = qemu_img.check(target)
    assert (found.clean, found.leaked_clusters) == (True, 0)
    assert target.stat().st_mode & 0o777 == 0o400
    assert copy(target, tmp_path / "again.qcow2", "base.qcow2") == states
    assert (tmp_path / "again.qcow2").read_bytes() == target.read_bytes()


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_packed_clusters(tmp_path: Path, compression: str) -> None:
    plain, packed = tmp_path / "plain.qcow2", tmp_path / "packed.qcow2"
    empty.create(plain, GIB, None)
    io(plain, *(f"write -P {number + 1} {number * 100}k 90k" for number in range(40)))
    options = ["-c", "-o", f"compression_type={compression}"]
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", *options, plain, packed], check=True
    )
    assert copy(packed, tmp_path / "copy.qcow2", None) == copy(plain, tmp_path / "2.qcow2", None)
    same(plain, tmp_path / "copy.qcow2")


def test_many_clusters_have_their_refcounts(tmp_path: Path) -> None:
    """More than one refcount block counts: 32,768 clusters each."""
    target = tmp_path / "large.qcow2"
    with FreshDisk(target, 8 * GIB, None) as fresh:
        for table in range(5):
            for first in range(table * 8192, table * 8192 + 8192, COUNT):
                fresh.add(first, bytes([DATA]) * COUNT, b"")  # holes: nothing needs writing
        fresh.finish()
    found = qemu_img.check(target)
    assert (found.clean, found.leaked_clusters) == (True, 0)


def test_an_unfinished_one_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "fresh.qcow2"
    with FreshDisk(target, GIB, None) as fresh:
        fresh.add(0, bytes([DATA]), bytes(CLUSTER))
    assert not target.exists()


def test_what_is_not_ours_is_told(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="missing"):
        Clusters(tmp_path / "none.qcow2")
    large = tmp_path / "large.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=128k", large, "1G"], check=True
    )
    with pytest.raises(CorruptError, match="not as our layers"):
        Clusters(large)
    short = tmp_path / "short.qcow2"
    empty.create(short, GIB, None)
    io(short, "write -P 1 0 1M")
    with short.open("r+b") as file:
        file.truncate(short.stat().st_size - 3 * CLUSTER)
    with Clusters(short) as clusters, pytest.raises(CorruptError, match="ends before"):
        clusters.read(0, COUNT)
