"""Importing disks: good ones arrive whole, bad ones are refused and said why."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from stratabox.daemon.images.importer import import_disk
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.qcow2 import header, qemu_img

MIB = 1 << 20
GIB = 1 << 30


def qemu(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw disk with content here and there."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(40 * MIB)
        file.seek(5 * MIB)
        file.write(os.urandom(MIB))
        file.seek(40 * MIB - 512)
        file.write(b"the end".ljust(512))
    path.chmod(0o600)
    return path


def content(disk: Path, tmp_path: Path) -> bytes:
    flat = tmp_path / "flat.raw"
    qemu("convert", "-f", "qcow2", "-O", "raw", disk, flat)
    with flat.open("rb") as file:  # of a GiB, which a small host does not have to spare
        return file.read(41 * MIB)


@pytest.mark.parametrize(
    ("declared", "options"),
    [("raw", []), ("qcow2", []), ("qcow2", ["-c"]), ("qcow2", ["-o", "compat=0.10"]),
     ("qcow2", ["-c", "-o", "compression_type=zstd,cluster_size=256k"])],
)  # fmt: skip
async def test_a_good_disk_arrives_whole(
    raw: Path, work: Path, tmp_path: Path, declared: str, options: list[str]
) -> None:
    source = raw
    if declared == "qcow2":
        source = tmp_path / "disk.qcow2"
        qemu("convert", "-f", "raw", "-O", "qcow2", *options, raw, source)
        source.chmod(0o600)
    before = source.read_bytes()
    built = await import_disk(source, declared, work, max_bytes=GIB)
    assert (built.kernel, built.initrd) == (None, None)
    assert qemu_img.virtual_size(built.disk) == GIB
    with built.disk.open("rb") as file:
        found = header.parse(file.read(header.HEAD_BYTES))
    header.refuse_unsafe(found, file_size=built.disk.stat().st_size, max_virtual_size=GIB)
    assert qemu_img.check(built.disk).clean
    assert content(built.disk, tmp_path) == raw.read_bytes() + bytes(MIB)
    assert source.read_bytes() == before
    assert source.stat().st_mode & 0o777 == 0o600
    assert built.disk.stat().st_blocks * 512 < 8 * MIB


async def refused(source: Path, declared: str, work: Path, max_bytes: int = GIB) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        await import_disk(source, declared, work, max_bytes=max_bytes)
    return caught.value.message


async def test_a_backing_file_is_refused(raw: Path, work: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.qcow2"
    qemu("create", "-f", "qcow2", "-F", "raw", "-b", raw, bad)
    assert "backing file" in await refused(bad, "qcow2", work)


async def test_an_external_data_file_is_refused(work: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.qcow2"
    qemu("create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data,data_file_raw=on", bad, "1M")
    assert "external data file" in await refused(bad, "qcow2", work)


async def test_internal_snapshots_are_refused(work: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.qcow2"
    qemu("create", "-f", "qcow2", bad, "1M")
    qemu("snapshot", "-c", "one", bad)
    assert "internal snapshots" in await refused(bad, "qcow2", work)


@pytest.mark.parametrize("method", [1, 2])
async def test_encryption_is_refused(work: Path, tmp_path: Path, method: int) -> None:
    bad = tmp_path / "bad.qcow2"
    qemu("create", "-f", "qcow2", bad, "1M")
    with bad.open("r+b") as file:
        file.seek(32)
        file.write(method.to_bytes(4, "big"))
    assert "encrypted" in await refused(bad, "qcow2", work)


@pytest.mark.parametrize("size", [40, 100, 70_000, 1 << 20])
async def test_a_truncated_file_is_refused(
    raw: Path, work: Path, tmp_path: Path, size: int
) -> None:
    bad = tmp_path / "bad.qcow2"
    qemu("convert", "-f", "raw", "-O", "qcow2", raw, bad)
    os.truncate(bad, size)
    await refused(bad, "qcow2", work)


async def test_another_format_than_declared_is_refused(
    raw: Path, work: Path, tmp_path: Path
) -> None:
    assert "magic" in await refused(raw, "qcow2", work)
    qcow2, vmdk = tmp_path / "a.qcow2", tmp_path / "a.vmdk"
    qemu("convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    qemu("convert", "-f", "raw", "-O", "vmdk", raw, vmdk)
    assert "is qcow2" in await refused(qcow2, "raw", work)
    assert "is VMDK" in await refused(vmdk, "raw", work)
    assert "can be imported" in await refused(vmdk, "vmdk", work)


async def test_size_limits(raw: Path, work: Path, tmp_path: Path) -> None:
    assert "are allowed" in await refused(raw, "raw", work, max_bytes=39 * MIB)
    bomb, empty, odd = tmp_path / "bomb.qcow2", tmp_path / "empty", tmp_path / "odd"
    qemu("create", "-f", "qcow2", bomb, "2T")
    assert "are allowed" in await refused(bomb, "qcow2", work)
    empty.touch()
    odd.write_bytes(bytes(513))
    assert "0 bytes" in await refused(empty, "raw", work)
    assert "513 bytes" in await refused(odd, "raw", work)
