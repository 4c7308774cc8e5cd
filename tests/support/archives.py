"""Archives made of some layers, files and RAM, and read without a daemon."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from stratabox.storage.files.memory.chain import OpenChain
from stratabox.storage.files.memory.writer import RamWriter
from stratabox.storage.files.transfer import archive, manifest
from stratabox.storage.files.transfer.archive import Block, Digest
from stratabox.storage.files.transfer.manifest import (
    Kind,
    Manifest,
    Member,
    PackedDisk,
    PackedLayer,
    PackedMount,
    PackedRam,
    PackedSnapshot,
)
from stratabox.storage.files.transfer.parsing import (
    Parser,
    read_manifest,
    read_member,
    read_trailer,
)
from stratabox.storage.files.transfer.sources import FileSource, LayerSource, RamSource, Source
from stratabox.storage.files.transfer.targets import (
    Nowhere,
)
from stratabox.storage.model.ids import Sha256, mint
from stratabox.storage.model.records import MIB, KernelBoot, Machine
from stratabox.storage.model.states import Level
from stratabox.storage.qcow2.clusters import DATA, ZERO, Clusters
from stratabox.storage.qcow2.empty import CLUSTER
from stratabox.storage.qcow2.fresh import FreshDisk

T = TypeVar("T")
GIB = 1 << 30
PAGE = 4096
KERNEL, STATE = b"kernel" * 1000, b"state" * 100


def sha(content: bytes) -> Sha256:
    return Sha256(hashlib.sha256(content).hexdigest())


class ShortError(Exception):
    """The bytes have ended."""


class Bytes:
    """Drives parsers over bytes that are all there."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def run(self, parser: Parser[T]) -> T:
        try:
            wanted = next(parser)
            while True:
                piece = self.content[self.at : self.at + wanted]
                if len(piece) < wanted:
                    raise ShortError
                self.at += wanted
                wanted = parser.send(piece)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            parser.close()


def disk(path: Path, clusters: dict[int, bytes | None], backing: str | None = None) -> Path:
    """A layer of 1 GiB: number → data, None for zeros."""
    with FreshDisk(path, GIB, backing) as fresh:
        for number, data in sorted(clusters.items()):
            fresh.add(number, bytes([ZERO if data is None else DATA]), data or b"")
        fresh.finish()
    return path


def packed(members: Sequence[Member], layers: Sequence[PackedLayer]) -> Manifest:
    boot = KernelBoot(kernel=sha(KERNEL), initrd=sha(KERNEL), command_line="quiet")
    machine = Machine(
        machine_type="pc-q35-7.2",
        accelerator="tcg",
        cpu_model="max",
        qemu_version="7.2.22",
        firmware={"bios-256k.bin": sha(KERNEL)},
        mac="52:54:00:01:02:03",
        kernel_boot=boot,
    )
    ram = PackedRam(
        state_sha256=sha(STATE), tracking="written", pause_us=5, cpu_features=("sse", "avx-512")
    )
    snapshot = PackedSnapshot(
        name="a name, with ü", consistency=Level.MEMORY, source_sandbox_name="box",
        image_name="tiny", cpus=1, memory=16, storage=1, frozen=0, machine=machine,
        disks=(PackedDisk(index=0, serial="disk0", size=GIB, layer=len(layers) - 1),),
        env={"A": "b"}, metadata={"k": "v"}, ram=ram,
        volumes=(PackedMount(name="data", path="/data", read_only=True, slot=2),),
    )  # fmt: skip
    return Manifest(layers=tuple(layers), members=tuple(members), snapshot=snapshot)


Change = Callable[[Block], Block]


def write(
    sources: Sequence[Source], text: bytes, change: Callable[[Block], Block | None] = lambda b: b
) -> bytes:
    """An archive; `change` may put other blocks in, or leave some out."""
    out = [archive.pack_preamble(text)]
    ends = []
    for at, source in enumerate(sources):
        digest = Digest(source.member.kind.unit, source.member.size)
        blocks = [
            archive.pack_block(at, number, content)
            for number in source.numbers
            if (content := source.content(number)) is not None
        ]
        for block in blocks:
            if (changed := change(block)) is not None:
                digest.add(changed.sum)
                out += [changed.pack(), changed.stored]
        ends.append(digest.end(at))
        out.append(ends[-1].pack())
    out.append(archive.trailer(hashlib.sha256(text).digest(), ends).pack())
    return b"".join(out)


def text_of(sources: Sequence[Source]) -> bytes:
    layers = [PackedLayer(size=GIB, parent=None), PackedLayer(size=GIB, parent=0)]
    return manifest.dump(packed([source.member for source in sources], layers))


def read(content: bytes) -> Manifest:
    """Read a whole archive and keep nothing."""
    stream = Bytes(content)
    found, digest = stream.run(read_manifest())
    ends = [
        stream.run(read_member(at, member, Nowhere())) for at, member in enumerate(found.members)
    ]
    stream.run(read_trailer(digest, ends))
    assert stream.at == len(content)
    return found


@contextmanager
def some_sources(folder: Path) -> Iterator[list[Source]]:
    """An image's layer, one on top, a kernel, the devices' state, RAM of two files."""
    text = (b"some text " * 7000)[:CLUSTER]
    # Always the same: where each byte of the archive lies, and what it says, hangs on it.
    noise = random.Random(1).randbytes(CLUSTER)
    base = disk(folder / "base.qcow2", {0: text, 1: noise, 70: None, 8192: text})
    top = disk(folder / "top.qcow2", {1: text, 2: None, 16383: noise}, "base.qcow2")
    for name, content in (("kernel", KERNEL), ("state", STATE)):
        (folder / name).write_bytes(content)
    ids = [mint(), mint()]
    path_of = {id: folder / f"{id}.ram" for id in ids}
    with RamWriter(path_of[ids[0]], id=ids[0], parent=None, ram_bytes=16 * MIB) as writer:
        writer.add(3, memoryview(noise))
        writer.add(1020, memoryview(text))  # across the end of a block
        writer.finish()
    with RamWriter(path_of[ids[1]], id=ids[1], parent=ids[0], ram_bytes=16 * MIB) as writer:
        writer.add(4, memoryview(text[:PAGE]))
        writer.add_zeros(5, 1)
        writer.finish()
    opened: list[Source] = [
        LayerSource(Clusters(base), 0, stands=False),
        LayerSource(Clusters(top), 1, stands=True),
        FileSource(folder / "kernel", Kind.BLOB, sha(KERNEL)),
        FileSource(folder / "state", Kind.STATE, sha(STATE)),
        RamSource(OpenChain(ids[1], path_of.__getitem__, 16 * MIB).__enter__()),
    ]
    yield opened
    for source in opened:
        source.close()
