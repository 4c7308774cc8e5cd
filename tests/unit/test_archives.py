"""Archives: what goes in comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stratabox.storage.files.memory.chain import OpenChain
from stratabox.storage.files.memory.writer import RamWriter
from stratabox.storage.files.transfer import archive
from stratabox.storage.files.transfer.archive import Digest, Unit
from stratabox.storage.files.transfer.manifest import (
    Kind,
    PackedLayer,
)
from stratabox.storage.files.transfer.parsing import (
    read_manifest,
    read_member,
    read_trailer,
)
from stratabox.storage.files.transfer.sources import FileSource, LayerSource, RamSource, Source
from stratabox.storage.files.transfer.targets import (
    DiskTarget,
    FileTarget,
    RamTarget,
    Target,
)
from stratabox.storage.model.errors import CorruptError
from stratabox.storage.model.ids import mint
from stratabox.storage.model.records import MIB
from stratabox.storage.qcow2 import qemu_img
from stratabox.storage.qcow2.clusters import Clusters
from stratabox.storage.qcow2.empty import CLUSTER
from support.archives import (
    GIB,
    KERNEL,
    PAGE,
    Bytes,
    disk,
    packed,
    sha,
    some_sources,
    text_of,
    write,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Source]]:
    with some_sources(tmp_path_factory.mktemp("sources")) as opened:
        yield opened


def test_what_goes_in_comes_out(sources: list[Source], tmp_path: Path) -> None:
    content = write(sources, text_of(sources))
    stream = Bytes(content)
    found, digest = stream.run(read_manifest())
    assert found == packed(
        [source.member for source in sources],
        [PackedLayer(size=GIB, parent=None), PackedLayer(size=GIB, parent=0)],
    )
    targets: list[Target] = [
        DiskTarget(tmp_path / "base.qcow2", GIB, None),
        DiskTarget(tmp_path / "top.qcow2", GIB, "base.qcow2"),
        FileTarget(tmp_path / "kernel", found.members[2]),
        FileTarget(tmp_path / "state", found.members[3]),
        RamTarget(tmp_path / "x.ram", id=(ram := mint()), ram_bytes=16 * MIB),
    ]
    ends = []
    for at, (member, target) in enumerate(zip(found.members, targets, strict=True)):
        with target:
            ends.append(stream.run(read_member(at, member, target)))
    stream.run(read_trailer(digest, ends))
    assert stream.at == len(content)
    assert (tmp_path / "kernel").read_bytes() == KERNEL
    for name in ("base.qcow2", "top.qcow2"):
        assert qemu_img.check(tmp_path / name) == qemu_img.CheckResult(
            corruptions=0, leaked_clusters=0
        )
    # What was written is read as what was read.
    again: list[Source] = [
        LayerSource(Clusters(tmp_path / "base.qcow2"), 0, stands=False),
        LayerSource(Clusters(tmp_path / "top.qcow2"), 1, stands=True),
        RamSource(OpenChain(ram, lambda _: tmp_path / "x.ram", 16 * MIB).__enter__()),
    ]
    for mine, theirs in zip(again, [sources[0], sources[1], sources[4]], strict=True):
        contents = [
            {number: source.content(number) for number in source.numbers}
            for source in (mine, theirs)
        ]
        kept = [{k: v for k, v in each.items() if v is not None} for each in contents]
        assert kept[0] == kept[1] != {}
        mine.close()


def test_a_digest_tells_content_and_not_files(sources: list[Source], tmp_path: Path) -> None:
    """Zeros below which nothing lies, and how a file stores its clusters, make no difference."""

    def digest(path: Path) -> str:
        source = LayerSource(Clusters(path), 0, stands=False)
        found = Digest(Unit.DISK, source.member.size)
        for number in source.numbers:
            if (content := source.content(number)) is not None:
                found.add(archive.sum_of(number, content))
        source.close()
        return found.text

    data = {0: b"a" * CLUSTER, 9: b"b" * CLUSTER}
    one = digest(disk(tmp_path / "1.qcow2", {**data}))
    assert digest(disk(tmp_path / "2.qcow2", {**data, 7: None, 8: bytes(CLUSTER)})) == one
    assert digest(disk(tmp_path / "3.qcow2", {**data, 7: b"\1" * CLUSTER})) != one
    qemu_img.convert(tmp_path / "2.qcow2", tmp_path / "4.qcow2", source_format="qcow2")
    assert digest(tmp_path / "4.qcow2") == one


def test_an_export_does_not_send_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="is missing"):
        FileSource(tmp_path / "none", Kind.BLOB, sha(b""))
    with pytest.raises(CorruptError, match="is missing"):
        LayerSource(Clusters(tmp_path / "none.qcow2"), 0, stands=False)
    id = mint()
    path = tmp_path / "x.ram"
    with RamWriter(path, id=id, parent=None, ram_bytes=16 * MIB) as writer:
        writer.add(0, memoryview(os.urandom(CLUSTER)))
        writer.finish()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(PAGE + 100)
        file.write(b"changed")
    source = RamSource(OpenChain(id, lambda _: path, 16 * MIB).__enter__())
    with pytest.raises(CorruptError, match="SHA-256 differs"):
        source.content(0)
    source.close()
