"""Exports: what an archive is to hold, opened at one instant; its bytes, as they are asked for.

All files are opened in the very transaction that reads the records, so that nothing can remove them
in between. From then on the records may change or go: what is open is read to its end, and a
deletion waits for nobody (its bytes come free with the last descriptor).

The same record always makes the same bytes. So an export that was broken off goes on at any block:
what came before is read again for the sums, and not packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.daemon.lifecycle.creation import require_ready
from stratabox.daemon.lifecycle.transfers import portable
from stratabox.daemon.lifecycle.transfers.contents import name_of
from stratabox.daemon.lifecycle.transfers.packing import NO_BLOCK, blocks, threads
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import contents, images, layers, snapshots
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.machines import blobs_of
from stratabox.storage.files.memory.chain import OpenChain
from stratabox.storage.files.transfer import manifest
from stratabox.storage.files.transfer.archive import Block, Digest, pack_preamble, trailer
from stratabox.storage.files.transfer.manifest import Kind, Manifest, PackedLayer
from stratabox.storage.files.transfer.sources import (
    FileSource,
    LayerSource,
    RamSource,
    Source,
    data_in,
)
from stratabox.storage.model.errors import (
    ConflictError,
    CorruptError,
    DeniedError,
    InvalidArgumentError,
)
from stratabox.storage.model.ids import LayerId, Sha256
from stratabox.storage.model.records import MIB, Image, Layer, Snapshot
from stratabox.storage.model.states import ImageState
from stratabox.storage.qcow2.clusters import Clusters

PIECE = 1 << 20
"""Bytes that are given at a time."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where an export goes on that was broken off."""

    manifest: bytes
    """SHA-256 of the manifest that was received."""
    member: int
    block: int
    """The first that was not received."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some bytes of an archive."""

    data: bytes
    done: int
    """Bytes of content that are in the archive so far, as far as it has come."""
    total: int
    """Of all content, at most."""


@dataclass
class _Open:
    """Everything that an archive is made of. Filled within one transaction, read after it."""

    files: ExitStack = field(default_factory=ExitStack)
    layers: list[Layer] = field(default_factory=list)
    """By their places: parents first."""
    bases: set[LayerId] = field(default_factory=set)
    """Of the layers, those that are not in the archive."""
    clusters: dict[int, Clusters] = field(default_factory=dict)
    """Of the layers that are in the archive."""
    others: list[Callable[[], Source]] = field(default_factory=list)
    pack: Callable[[tuple[PackedLayer, ...], Sequence[Source]], Manifest] | None = None


class Exports:
    """Makes archives of snapshots and images."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def snapshot(
        self, reference: str, *, since: str, memory: bool, env: bool, resume: Resume | None
    ) -> AsyncGenerator[Piece, None]:
        """An archive of a snapshot.

        :param since: another one, whose layers and blobs are left out; "": none are.
        :param memory: with its saved memory.
        :param env: with the environment of its commands, which may hold secrets.
        :raise NotFoundError: SNAPSHOT_NOT_FOUND.
        :raise DeniedError: SNAPSHOT_NOT_READY.
        :raise InvalidArgumentError: INVALID_ARGUMENT, for memory that it does not have.
        :raise ConflictError: RESUME_MISMATCH.
        :raise CorruptError: what is kept of it is missing or damaged.
        """
        if since:
            await self._know_bases(reference, since)

        def look(tx: Transaction, opened: _Open) -> None:
            record = snapshots.get(tx, snapshots.resolve(tx, reference))
            require_ready(record)
            if memory and record.ram is None:
                raise InvalidArgumentError(
                    f"snapshot {record.name!r} has no memory: it is of level"
                    f" {record.consistency}; export it without memory",
                    field="memory",
                )
            left_out = _layers_of(tx, since) if since else {}
            places = self._open_layers(tx, opened, [disk.layer for disk in record.disks], left_out)
            blobs = blobs_of(portable.machine_to_pack(record, memory=memory))
            base_blobs = blobs & _blobs_of(tx, since) if since else set()
            for blob in sorted(blobs - base_blobs):
                self._open_blob(opened, blob)
            if memory and record.ram:
                self._open_memory(opened, record, record.ram.state_sha256)
            packed = portable.pack_snapshot(record, places, env=env, memory=memory)
            opened.pack = lambda layers, sources: Manifest(
                layers=layers,
                members=tuple(each.member for each in sources),
                snapshot=packed,
                base_blobs=tuple(sorted(base_blobs)),
            )

        async with aclosing(self._archive(look, resume)) as pieces:
            async for piece in pieces:
                yield piece

    async def image(self, reference: str, *, resume: Resume | None) -> AsyncGenerator[Piece, None]:
        """An archive of an image.

        :raise NotFoundError: IMAGE_NOT_FOUND.
        :raise DeniedError: IMAGE_NOT_READY.
        :raise ConflictError: RESUME_MISMATCH.
        :raise CorruptError: what is kept of it is missing or damaged.
        """

        def look(tx: Transaction, opened: _Open) -> None:
            record = images.get(tx, images.resolve(tx, reference))
            self._open_layers(tx, opened, [_layer_of(record)], {})
            boot = record.kernel_boot
            for blob in sorted({boot.kernel, boot.initrd} if boot else ()):
                self._open_blob(opened, blob)
            packed = portable.pack_image(record)
            opened.pack = lambda layers, sources: Manifest(
                layers=layers, members=tuple(each.member for each in sources), image=packed
            )

        async with aclosing(self._archive(look, resume)) as pieces:
            async for piece in pieces:
                yield piece

    async def _know_bases(self, reference: str, since: str) -> None:
        """Find out what those layers read as that a snapshot has in common with another."""

        def look(tx: Transaction) -> list[LayerId]:
            record = snapshots.get(tx, snapshots.resolve(tx, reference))
            left_out = _layers_of(tx, since)
            return [
                layer.id
                for layer in _from_below(tx, [disk.layer for disk in record.disks], left_out)
                if layer.id in left_out and layer.reads_as is None
            ]

        for layer in await self._world.read(look):
            await name_of(self._world, layer)

    def _open_layers(
        self,
        tx: Transaction,
        opened: _Open,
        tops: Sequence[LayerId],
        left_out: dict[LayerId, Layer],
    ) -> dict[LayerId, int]:
        """Open the layers of some chains; returns their places, parents first."""
        opened.layers = _from_below(tx, tops, left_out)
        opened.bases = set(left_out)
        for place, layer in enumerate(opened.layers):
            if layer.id not in left_out:
                clusters = Clusters(self._world.store.layout.layer(layer.id))
                opened.clusters[place] = opened.files.enter_context(clusters)
            elif layer.reads_as is None:
                # A job has put a new one there since they were looked at.
                raise ConflictError(
                    "the layers below were just rewritten: export again", reason="INTERRUPTED"
                )
        return {layer.id: place for place, layer in enumerate(opened.layers)}

    def _open_blob(self, opened: _Open, blob: Sha256) -> None:
        source = FileSource(self._world.store.blob_path(blob), Kind.BLOB, blob)
        opened.files.callback(source.close)
        opened.others.append(lambda: source)

    def _open_memory(self, opened: _Open, record: Snapshot, state_sha256: Sha256) -> None:
        layout = self._world.store.layout
        state = FileSource(layout.state_file(record.id), Kind.STATE, state_sha256)
        opened.files.callback(state.close)
        chain = OpenChain(record.id, layout.ram_file, record.memory * MIB)
        opened.files.enter_context(chain)
        opened.others += [lambda: state, lambda: RamSource(chain)]

    @asynccontextmanager
    async def _opened(
        self, look: Callable[[Transaction, _Open], None]
    ) -> AsyncIterator[tuple[_Open, list[Source], bytes]]:
        opened = _Open()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(in_thread, opened.files.close)
            await self._world.read(lambda tx: look(tx, opened))

            def prepare() -> list[Source]:
                found: list[Source] = [
                    LayerSource(clusters, place, stands=opened.layers[place].parent is not None)
                    for place, clusters in opened.clusters.items()
                ]
                return found + [make() for make in opened.others]

            sources = await in_thread(prepare)
            assert opened.pack is not None
            content = manifest.dump(opened.pack(_packed(opened), sources))
            yield opened, sources, content

    async def _archive(
        self, look: Callable[[Transaction, _Open], None], resume: Resume | None
    ) -> AsyncGenerator[Piece, None]:
        async with self._opened(look) as (opened, sources, content), threads() as pool:
            digest = hashlib.sha256(content).digest()
            if resume and resume.manifest != digest:
                raise ConflictError(
                    "what was exported has changed since the export was broken off: remove what"
                    " was received (FILE.part) and begin again",
                    reason="RESUME_MISMATCH",
                )
            total = sum(source.member.data for source in sources)
            done = 0
            if resume is None:
                yield Piece(data=pack_preamble(content), done=0, total=total)
            ends: list[Block] = []
            names = {layer.id: layer.reads_as for layer in opened.layers}
            for at, source in enumerate(sources):
                sums = Digest(source.member.kind.unit, source.member.size)
                async with aclosing(blocks(pool, source, at, _first_wanted(resume, at))) as found:
                    async for block in found:
                        sums.add(block.sum)
                        done += data_in(source.member, block)
                        if block.stored:
                            for data in _pieces(block):
                                yield Piece(data=data, done=done, total=total)
                end = sums.end(at)
                ends.append(end)
                if source.member.layer is not None:
                    layer = opened.layers[source.member.layer]
                    below = names[layer.parent] if layer.parent else None
                    names[layer.id] = await self._keep(layer, Sha256(end.sum.hex()), below)
                if not resume or at >= resume.member:
                    yield Piece(data=end.pack(), done=done, total=total)
            yield Piece(data=trailer(digest, ends).pack(), done=total, total=total)

    async def _keep(self, layer: Layer, content: Sha256, below: Sha256 | None) -> Sha256:
        """Note what a layer holds, which must be what it held before; returns what it reads as.

        :param below: what its parent reads as.
        :raise CorruptError: LAYER_CORRUPT.
        """
        if layer.content is None:
            await self._world.write(lambda tx: contents.note(tx, layer.id, content, below))
        elif layer.content != content:
            raise CorruptError(
                f"layer {layer.id} does not hold any more what it held: its SHA-256 differs",
                reason="LAYER_CORRUPT",
                layer=layer.id,
            )
        return layer.reads_as or contents.name_of(content, below)


def _first_wanted(resume: Resume | None, member: int) -> int:
    """The first block of a member that is still to be sent."""
    if resume is None or member > resume.member:
        return 0
    return resume.block if member == resume.member else NO_BLOCK


def _layers_of(tx: Transaction, reference: str) -> dict[LayerId, Layer]:
    """The layers of a snapshot's chains. :raise NotFoundError: SNAPSHOT_NOT_FOUND."""
    record = snapshots.get(tx, snapshots.resolve(tx, reference))
    require_ready(record)
    return {layer.id: layer for disk in record.disks for layer in layers.chain(tx, disk.layer)}


def _blobs_of(tx: Transaction, reference: str) -> set[Sha256]:
    """Kernel, initrd and firmware of a snapshot."""
    return blobs_of(snapshots.get(tx, snapshots.resolve(tx, reference)).machine)


def _from_below(
    tx: Transaction, tops: Sequence[LayerId], left_out: Mapping[LayerId, Layer]
) -> list[Layer]:
    """The layers of some chains, parents first; of what is left out only the uppermost."""
    found: dict[LayerId, Layer] = {}
    for top in tops:
        chain = layers.chain(tx, top)
        end = next((at for at, layer in enumerate(chain, 1) if layer.id in left_out), len(chain))
        for layer in reversed(chain[:end]):
            found.setdefault(layer.id, layer)
    return list(found.values())


def _layer_of(record: Image) -> LayerId:
    if record.state is not ImageState.READY or record.layer is None:
        raise DeniedError(
            f"image {record.name!r} is {record.state}", reason="IMAGE_NOT_READY", image=record.id
        )
    return record.layer


def _packed(opened: _Open) -> tuple[PackedLayer, ...]:
    places = {layer.id: place for place, layer in enumerate(opened.layers)}
    return tuple(
        PackedLayer(
            size=layer.size,
            parent=None if layer.parent is None or base else places[layer.parent],
            base=base,
        )
        for layer in opened.layers
        for base in [layer.reads_as if layer.id in opened.bases else None]
    )


def _pieces(block: Block) -> list[bytes]:
    """A block's header and what is stored, in pieces."""
    head = block.pack()
    cut = PIECE - len(head)
    stored = block.stored
    return [head + stored[:cut]] + [
        stored[at : at + PIECE] for at in range(cut, len(stored), PIECE)
    ]
