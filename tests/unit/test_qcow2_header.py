"""The qcow2 header parser: right about good files, and never anything but its one error."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.qcow2 import header, qemu_img
from stratabox.storage.qcow2.header import Header, parse, refuse_unsafe

GIB = 1 << 30


def made(
    *,
    version: int = 3,
    backing: tuple[int, int] = (0, 0),
    cluster_bits: int = 16,
    size: int = GIB,
    encryption: int = 0,
    l1: tuple[int, int] = (2, 3 << 16),
    refcount: tuple[int, int] = (1 << 16, 1),
    snapshots: int = 0,
    incompatible: int = 0,
    refcount_order: int = 4,
    length: int = 104,
    extensions: bytes = b"\0" * 8,
) -> bytes:
    fixed = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, *backing, cluster_bits, size, encryption,
        *l1, *refcount, snapshots, 0,
    )  # fmt: skip
    if version == 3:
        fixed += struct.pack(">QQQII", incompatible, 0, 0, refcount_order, length)
    return fixed + extensions


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def judge(head: bytes, file_size: int = 10 << 20) -> Header:
    found = parse(head)
    refuse_unsafe(found, file_size=file_size, max_virtual_size=64 * GIB)
    return found


@given(st.binary(max_size=300))
@example(b"")
@example(b"QFI\xfb")
def test_garbage_meets_only_the_typed_error(garbage: bytes) -> None:
    for head in (garbage, b"QFI\xfb" + garbage, b"QFI\xfb\0\0\0\x02" + garbage,
                 b"QFI\xfb\0\0\0\x03" + garbage):  # fmt: skip
        with contextlib.suppress(InvalidArgumentError):
            judge(head, len(head))


@given(st.data())
def test_flipped_bytes_meet_only_the_typed_error(data: st.DataObject) -> None:
    head = bytearray(made(extensions=extension(0xE2792ACA, b"qcow2") + b"\0" * 8))
    for _ in range(data.draw(st.integers(1, 6))):
        head[data.draw(st.integers(4, len(head) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidArgumentError):
        judge(bytes(head))


@pytest.mark.parametrize("version", [2, 3])
def test_a_plain_header_passes(version: int) -> None:
    found = judge(made(version=version))
    assert (found.version, found.virtual_size, found.cluster_size) == (version, GIB, 1 << 16)
    assert found.backing_file is None
    assert not found.data_file


def test_what_qemu_img_writes_is_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    qemu_img.create_disk(disk, 3 * GIB)
    assert judge(disk.read_bytes()).virtual_size == qemu_img.virtual_size(disk) == 3 * GIB
    assert qemu_img.check(disk).clean


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (made(version=4), "version 4"),
        (made(cluster_bits=8), "cluster bits are 8"),
        (made(cluster_bits=60), "cluster bits are 60"),
        (made(backing=(112, 4), extensions=b"\0" * 8 + b"/etc"), "backing file"),
        (made(backing=(1 << 40, 4)), "outside the header"),
        (made(incompatible=4), "external data file"),
        (made(extensions=extension(0x44415441, b"/etc/shadow") + b"\0" * 8), "data file"),
        (made(encryption=1), "encrypted"),
        (made(encryption=2), "encrypted"),
        (made(snapshots=1), "internal snapshots"),
        (made(incompatible=1 << 20), "not known"),
        (made(incompatible=2), "corrupt"),
        (made(incompatible=1), "not closed cleanly"),
        (made(size=0), "empty"),
        (made(size=65 << 40), "are allowed"),
        (made(size=1 << 63), "are allowed"),
        (made(size=65 * GIB, l1=(130, 3 << 16)), "are allowed"),
        (made(l1=(1, 3 << 16)), "L1 table is too small"),
        (made(l1=(1 << 30, 3 << 16)), "L1 table has"),
        (made(l1=(2, 0)), "L1 table lies at offset 0"),
        (made(l1=(2, 12345)), "L1 table lies at offset 12345"),
        (made(l1=(2, 1 << 40)), "truncated"),
        (made(refcount=(1 << 16, 0)), "no refcount table"),
        (made(refcount=(1 << 16, 1 << 20)), "refcount table has"),
        (made(refcount=(1 << 40, 1)), "truncated"),
        (made(refcount_order=7), "refcount order"),
        (made(length=99), "header length"),
        (made(length=1 << 30), "header length"),
        (made(extensions=struct.pack(">II", 0xE2792ACA, 1 << 30)), "longer than the header"),
        (made()[:100], "ends within"),
        (made()[:30], "ends within"),
        (b"\x7fELF" + bytes(200), "magic"),
    ],
)
def test_what_is_wrong_is_named(head: bytes, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        judge(head)
    assert words in caught.value.message
    assert caught.value.reason == "INVALID_IMAGE"


def test_zstd_and_extended_l2_are_welcome() -> None:
    features = header.INCOMPATIBLE_COMPRESSION | header.INCOMPATIBLE_EXTENDED_L2
    extended = made(
        incompatible=features, l1=(4, 3 << 16), length=112, extensions=b"\1" + bytes(15)
    )
    assert judge(extended).compression == 1
