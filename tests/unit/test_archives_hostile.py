"""Archives that anybody may have written: refused for the right reason, or sound."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stratabox.storage.files.transfer import archive, manifest, strict
from stratabox.storage.files.transfer.archive import Block
from stratabox.storage.files.transfer.manifest import (
    Manifest,
)
from stratabox.storage.files.transfer.parsing import (
    read_manifest,
    read_member,
)
from stratabox.storage.files.transfer.sources import Source
from stratabox.storage.files.transfer.targets import (
    FileTarget,
    Nowhere,
)
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.records import MIB
from stratabox.storage.qcow2.empty import CLUSTER
from support.archives import (
    GIB,
    KERNEL,
    Bytes,
    Change,
    ShortError,
    read,
    sha,
    some_sources,
    text_of,
    write,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Source]]:
    with some_sources(tmp_path_factory.mktemp("sources")) as opened:
        yield opened


def refused(content: bytes) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        read(content)
    assert caught.value.reason == "INVALID_ARCHIVE"
    return caught.value.message


def test_every_flipped_bit_and_every_end_is_found(sources: list[Source]) -> None:
    """At places all over: in each header, and in what lies between."""
    content = write(sources, text_of(sources))
    places = set(range(0, len(content), 1013)) | set(range(archive.PREAMBLE.size))
    at = content.find(b"SBX", 8)
    while at >= 0:
        places |= set(range(at, min(at + archive.HEADER.size, len(content))))
        at = content.find(b"SBX", at + 1)
    for place in sorted(places):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        with pytest.raises((InvalidArgumentError, ShortError)):
            read(bytes(damaged))
    for end in range(0, len(content), 997):
        with pytest.raises(ShortError):
            read(content[:end])


def remade(block: Block, content: bytes, **changes: Any) -> Block:
    """A block of other content, with the right sum."""
    made = archive.pack_block(block.member, changes.pop("number", block.number), content)
    return replace(made, **changes)


def of_member(at: int, change: Change) -> Change:
    return lambda block: change(block) if block.member == at else block


def opened(block: Block) -> bytes:
    return archive.open_block(block, block.stored, "it")


BOMB = zstandard.ZstdCompressor(level=1).compress(bytes(256 << 20))
WIDE = zstandard.ZstdCompressor(
    compression_params=zstandard.ZstdCompressionParameters(window_log=27)
)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_member(0, lambda b: replace(b, stored=BOMB)), "cannot be unpacked"),
        (of_member(0, lambda b: replace(b, stored=BOMB, raw=256 << 20)), "bytes of content"),
        (of_member(0, lambda b: replace(b, raw=1 << 31)), "bytes of content"),
        (of_member(0, lambda b: replace(b, raw=0)), "bytes of content"),
        (of_member(0, lambda b: replace(b, stored=b"")), "0 bytes for"),
        (of_member(0, lambda b: replace(b, stored=b.stored + b"x" * 200)), "cannot be unpacked"),
        (of_member(0, lambda b: remade(b, opened(b)[:-1])), "bytes of data for"),
        (of_member(0, lambda b: remade(b, bytes(64))), "states that cannot be"),
        (of_member(0, lambda b: remade(b, b"\3" * 64)), "states that cannot be"),
        (of_member(0, lambda b: remade(b, b"\2" * 64 + bytes(64 * CLUSTER))), "more data than"),
        (of_member(0, lambda b: remade(b, opened(b), number=1 << 40)), "beyond the end"),
        (of_member(0, lambda b: remade(b, opened(b), number=256)), "beyond the end"),
        (of_member(0, lambda b: remade(b, opened(b), number=3)), "out of order"),
        (of_member(0, lambda b: replace(b, member=1)), "no block of member 0"),
        (of_member(0, lambda b: replace(b, mark=b"SBXZ")), "no block of member 0"),
        (of_member(2, lambda b: remade(b, KERNEL[:-1])), "bytes of content"),
        (of_member(4, lambda b: remade(b, b"\1" + bytes(1023))), "RAM does not have"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be(sources: list[Source], change: Change, says: str) -> None:
    assert says in refused(write(sources, text_of(sources), change))


def test_a_frame_that_looks_far_back_is_refused(sources: list[Source]) -> None:
    content = os.urandom(CLUSTER) * 2
    block = archive.pack_block(0, 0, content)
    # Without its size in the frame, so that the window counts, as in a stream.
    wide = WIDE.compressobj()
    frame = wide.compress(content) + wide.flush()
    with pytest.raises(InvalidArgumentError, match="cannot be unpacked"):
        archive.open_block(replace(block, stored=frame), frame, "it")


def test_another_file_under_a_name_is_refused(sources: list[Source], tmp_path: Path) -> None:
    other = b"K" + KERNEL[1:]
    change = of_member(2, lambda b: remade(b, other))
    stream = Bytes(write(sources, text_of(sources), change))
    found, _ = stream.run(read_manifest())
    for at in (0, 1):
        stream.run(read_member(at, found.members[at], Nowhere()))
    target = FileTarget(tmp_path / "kernel", found.members[2])
    with target, pytest.raises(InvalidArgumentError, match="something else"):
        stream.run(read_member(2, found.members[2], target))
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_out_or_swapped_is_found(sources: list[Source]) -> None:
    text = text_of(sources)
    content = write(sources, text)
    other = write([sources[1], *sources[1:]], text)
    assert len(content) != len(other)
    end = struct.Struct("<4sI").pack(b"SBXE", 0)
    # The first member of one, the rest of the other: every block is right by itself.
    mixed = other[: other.index(end)] + content[content.index(end) :]
    assert "does not end as its blocks say" in refused(mixed)


Place = tuple[str | int, ...]


def at_place(value: Any, place: Place) -> Any:
    for each in place:
        value = value[each]
    return value


@pytest.mark.parametrize(
    ("place", "new"),
    [
        (("format",), "zip"),
        (("extra",), 1),
        (("layers", 0, "size"), 1 << 60),
        (("layers", 0, "size"), 0),
        (("layers", 0, "size"), -1),
        (("layers", 0, "size"), 1.5),
        (("layers", 0, "size"), True),
        (("layers", 0, "size"), "1073741824"),
        (("layers", 0, "size"), GIB + 1),
        (("layers", 0, "parent"), 0),
        (("layers", 0, "parent"), 1),
        (("layers", 1, "parent"), 1),
        (("layers", 1, "parent"), None),
        (("layers", 1, "base"), "0" * 64),
        (("layers", 0, "base"), "../../etc/shadow"),
        (("layers", 0), None),
        (("layers",), {}),
        (("layers",), []),
        (("members",), []),
        (("base_blobs",), ["0" * 64]),
        (("base_blobs",), ["../../etc/shadow"]),
        (("base_blobs",), [sha(KERNEL)]),
        (("members", 0, "kind"), "symlink"),
        (("members", 0, "data"), 1 << 62),
        (("members", 0, "data"), None),
        (("members", 0, "layer"), 1),
        (("members", 0, "size"), 2 * GIB),
        (("members", 2, "sha256"), "../../etc/shadow"),
        (("members", 2, "size"), 1 << 40),
        (("members", 3, "size"), 1 << 30),
        (("members", 4, "size"), 32 * MIB),
        (("snapshot",), None),
        (("image",), {"name": "x", "origin": "y", "kernel_boot": None}),
        (("snapshot", "name"), 5),
        (("snapshot", "name"), "x" * 300),
        (("snapshot", "consistency"), "perfect"),
        (("snapshot", "consistency"), "crash"),
        (("snapshot", "ram"), None),
        (("snapshot", "memory"), 32),
        (("snapshot", "env"), {"A": 1}),
        (("snapshot", "env"), {"A": "x" * (1 << 18)}),
        (("snapshot", "metadata"), ["a"]),
        (("snapshot", "disks"), []),
        (("snapshot", "disks", 0, "index"), 1),
        (("snapshot", "disks", 0, "layer"), 2),
        (("snapshot", "disks", 0, "layer"), 0),
        (("snapshot", "disks", 0, "size"), GIB * 2),
        (("snapshot", "disks", 0, "serial"), "disk0,readonly=on"),
        (("snapshot", "disks", 0, "serial"), "x" * 21),
        (("snapshot", "machine", "machine_type"), "pc-q35-7.2,vmport=on"),
        (("snapshot", "machine", "machine_type"), "none"),
        (("snapshot", "machine", "accelerator"), "xen"),
        (("snapshot", "machine", "cpu_model"), "max,migratable=off"),
        (("snapshot", "machine", "mac"), "52:54:00:00:00:00,x"),
        (("snapshot", "machine", "firmware"), {"../../x.bin": "0" * 64}),
        (("snapshot", "machine", "firmware"), {"/etc/x.bin": "0" * 64}),
        (("snapshot", "machine", "firmware"), {"bios-256k.bin": "/etc/shadow"}),
        (("snapshot", "machine", "kernel_boot", "kernel"), "../x"),
        (("snapshot", "machine", "kernel_boot", "command_line"), "a\nb"),
        (("snapshot", "ram", "tracking"), ""),
        (("snapshot", "ram", "cpu_features"), ["a,b"]),
        (("snapshot", "source_sandbox_name"), "\ud800"),
        (("snapshot", "machine", "volumes"), 1),
        (("snapshot", "volumes", 0, "slot"), -1),
        (("snapshot", "volumes"), [{"name": "a", "path": "/", "read_only": False, "slot": 1}] * 2),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be(sources: list[Source], place: Place, new: object) -> None:
    value = json.loads(text_of(sources))
    at_place(value, place[:-1])[place[-1]] = new
    with pytest.raises(InvalidArgumentError) as caught:
        strict.parse(json.dumps(value).encode())
    assert caught.value.reason == "INVALID_ARCHIVE"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b"NaN",
        b'{"format": NaN}',
        b'{"format": "stratabox archive", "format": "stratabox archive"}',
    ],
)
def test_text_that_is_no_manifest(content: bytes) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        strict.parse(content)
    assert caught.value.reason == "INVALID_ARCHIVE"


def test_a_preamble_bounds_the_manifest() -> None:
    head = archive.PREAMBLE.pack(archive.MAGIC, 1, (1 << 32) - 1, bytes(32))
    with pytest.raises(InvalidArgumentError, match="are allowed"):
        archive.parse_preamble(head)
    head = archive.PREAMBLE.pack(archive.MAGIC, 2, 10, bytes(32))
    with pytest.raises(InvalidArgumentError, match="of version 2"):
        archive.parse_preamble(head)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
    | st.sampled_from(["layer", "0" * 64, "pc-q35-7.2", "memory"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)  # fmt: skip


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    yield before
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*before, key))
    elif isinstance(value, list):
        for at, each in enumerate(value):
            yield from places(each, (*before, at))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data(), new=values)
def test_no_manifest_breaks_the_parser(
    sources: list[Source], data: st.DataObject, new: object
) -> None:
    """Anything in any place: it is refused as it should be, or it is sound."""
    value = json.loads(text_of(sources))
    place = data.draw(st.sampled_from([each for each in places(value) if each]))
    at_place(value, place[:-1])[place[-1]] = new
    found = parsed(json.dumps(value).encode("utf-8", "surrogatepass"))
    if not isinstance(found, InvalidArgumentError):
        assert strict.parse(manifest.dump(found)) == found
        return
    assert found.reason == "INVALID_ARCHIVE"


def parsed(content: bytes) -> Manifest | InvalidArgumentError:
    try:
        return strict.parse(content)
    except InvalidArgumentError as error:
        return error


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(content=st.binary(max_size=300), keep=st.integers(0, 3000))
def test_no_bytes_break_the_reader(sources: list[Source], content: bytes, keep: int) -> None:
    """Any bytes, also behind a beginning that is right."""
    whole = write(sources[2:3], text_of(sources))[:keep]
    with pytest.raises((InvalidArgumentError, ShortError)):
        read(whole + content)
