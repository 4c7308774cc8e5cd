"""Compares what is kept with what the catalog says: the work of ``stratabox check``.

`stock` lists what must be there, `examine` looks at one of these things, and `strays` at what lies
there beside them. Nothing is changed. Looking takes time, in which things go and come; so the
caller takes stock again afterwards, and whatever is not listed any more as it was is no finding.

Layers are compared by their headers. A *deep* look reads sealed ones whole, too: the SHA-256 of
those that have one in the catalog, and their inner structure (``qemu-img check``).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stratabox.storage.files.layout import Layout
from stratabox.storage.files.memory.format import corrupt, read_open
from stratabox.storage.files.memory.sealed import STATE_BYTES
from stratabox.storage.files.stock import Item, Kind, Stock
from stratabox.storage.model.errors import CorruptError, InvalidArgumentError
from stratabox.storage.model.ids import LayerId, Sha256
from stratabox.storage.qcow2 import header as qcow2
from stratabox.storage.qcow2 import qemu_img

_PORTION = 1 << 20
_MOST_NAMED = 4

GoOn = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it must be."""

    reason: str
    kind: str
    """"snapshot", "sandbox", "layer", "image" or "file"."""
    subject: str
    message: str
    cure: str
    repaired: str = ""
    """What was done about it; "": nothing."""


@dataclass
class Read:
    """How much was read."""

    files: int = 0
    bytes: int = 0
    deep: bool = False
    """Sealed layers are read whole."""


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """What is wrong with an item, whoever needs it."""

    reason: str
    what: str
    is_gone: bool = False
    """The file is not there."""


class _WrongError(Exception):
    def __init__(self, reason: str, what: str, *, is_gone: bool = False) -> None:
        super().__init__(what)
        self.wrong = Wrong(reason=reason, what=what, is_gone=is_gone)


def examine(item: Item, stock: Stock, layout: Layout, read: Read, go_on: GoOn) -> Wrong | None:
    """Look at one. Blocks for as long as reading it takes; reads in small portions.

    :param read: counts what was read.
    :param go_on: asked again and again; once it says no, it ends, having found nothing.
    """
    look = {Kind.LAYER: _layer, Kind.RAM: _ram, Kind.STATE: _state, Kind.BLOB: _blob}[item.kind]
    read.files += 1
    try:
        look(item, stock, layout, read, go_on)
    except _WrongError as error:
        return error.wrong
    except CorruptError as error:
        return Wrong(reason=error.reason, what=error.message)
    except OSError as error:
        return Wrong(
            reason="HOST_DISK_FAILED",
            what=f"the {item.kind} file of {item.id} cannot be read: {error.strerror or error}",
        )
    return None


def strays(stock: Stock, layout: Layout) -> set[str]:
    """Names of files that nobody has. One that is there for a moment may be just being made."""
    names = {path.name for folder in (layout.layers, layout.ram) for path in folder.iterdir()}
    # A merge under way is nobody's either, and goes by itself.
    return {name for name in names - stock.known if not name.endswith(".merging")}


def finding(item: Item, wrong: Wrong, stock: Stock) -> Finding:
    """What to tell of it."""
    users = stock.users.get(item, ())
    named = ", ".join(f"{kind} {id}" for kind, id in users[:_MOST_NAMED])
    more = f" and {len(users) - _MOST_NAMED} more" if len(users) > _MOST_NAMED else ""
    kind, subject = "file", item.id
    if item.kind is Kind.LAYER:
        kind = "layer"
    elif item.kind in (Kind.RAM, Kind.STATE):
        # Whose memory it is, if it is anybody's and not only stood on.
        kind, subject = stock.owners.get(item.id, (kind, f"{item.id}.{item.kind}"))
    elif users and users[0][0] == "image":
        kind, subject = users[0]
    return Finding(
        reason=wrong.reason,
        kind=kind,
        subject=subject,
        message=wrong.what + (f"; it is needed by {named}{more}" if users else ""),
        cure=_CURES.get(wrong.reason, _CURES[""]),
    )


def stray_finding(name: str) -> Finding:
    """What to tell of a file that nobody has."""
    return Finding(
        reason="STRAY_FILE",
        kind="file",
        subject=name,
        message=f"no record has the file {name}",
        cure="'stratabox check --repair' moves it to the quarantine, as the daemon does when it"
        " starts again",
    )


_CURES = {
    "RAM_CORRUPT": "their disks are untouched: restore them with --cold, then delete them; or put"
    " the file back from a backup of the state folder",
    "STATE_CORRUPT": "its disks are untouched: restore it with --cold, then delete it; or put the"
    " file back from a backup of the state folder",
    "BLOB_MISSING": "put the file back from a backup of the state folder, or build the image again"
    " and make new sandboxes of it",
    "": "put the file back from a backup of the state folder; what needs it is lost otherwise and"
    " can be deleted. If the host's disk is failing, its kernel log says so",
}
_CURES["NOT_SEALED"] = (
    "'stratabox check --repair' takes the right to write away (chmod a-w); find out who gave it: a"
    " guest's data may have been changed"
)
_CURES["BLOB_CORRUPT"] = _CURES["BLOB_MISSING"]


@contextmanager
def _opened(path: Path, item: Item, missing: str) -> Iterator[int]:
    """A context that ends with a look at its mode: other damage is what must be told first.

    :raise _WrongError: when it is missing, or somebody may write it though it is sealed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        what = f"the {item.kind} file {path.name} is missing"
        raise _WrongError(missing, what, is_gone=True) from None
    try:
        yield descriptor
        mode = os.fstat(descriptor).st_mode
        if item.sealed and mode & 0o222:
            raise _WrongError(
                "NOT_SEALED", f"{path.name} has mode {stat.S_IMODE(mode):04o} and must be read-only"
            )
    finally:
        os.close(descriptor)


def _layer(item: Item, stock: Stock, layout: Layout, read: Read, go_on: GoOn) -> None:
    path = layout.layer(LayerId(item.id))
    with _opened(path, item, "LAYER_MISSING") as descriptor:
        head = os.pread(descriptor, qcow2.HEAD_BYTES, 0)
        size = os.fstat(descriptor).st_size
    read.bytes += len(head)
    try:
        found = qcow2.parse(head)
    except InvalidArgumentError as error:
        raise _WrongError("LAYER_CORRUPT", f"layer {item.id}: {error.message}") from error
    backing = layout.layer_name(LayerId(item.backing)).encode() if item.backing else None
    for wrong, what in (
        (found.incompatible & qcow2.INCOMPATIBLE_CORRUPT, "is marked as corrupt"),
        (found.virtual_size != item.size, f"has {found.virtual_size} bytes, not {item.size}"),
        (found.backing_file != backing, f"stands on {found.backing_file!r}, not on {backing!r}"),
        (found.data_file, "keeps its data in another file"),
        (found.l1_offset + found.l1_entries * 8 > size, "is cut off"),
    ):
        if wrong:
            raise _WrongError("LAYER_CORRUPT", f"layer {item.id} {what}")
    if read.deep and item.sealed:
        _layer_whole(item, path, read, go_on)


def _layer_whole(item: Item, path: Path, read: Read, go_on: GoOn) -> None:
    if item.digest:
        with _opened(path, item, "LAYER_MISSING") as descriptor:
            _compare(descriptor, path, item, "LAYER_CORRUPT", None, read, go_on)
    if go_on():
        result = qemu_img.check(path)
        if not result.clean:
            raise _WrongError(
                "LAYER_CORRUPT",
                f"layer {item.id}: qemu-img check finds {result.corruptions} corruptions",
            )


def _ram(item: Item, stock: Stock, layout: Layout, read: Read, go_on: GoOn) -> None:
    path = layout.ram_file(item.id)
    with _opened(path, item, "RAM_CORRUPT") as descriptor:
        file = read_open(path, descriptor)
        if file.id != item.id:
            raise corrupt(path, f"says that it is {file.id}")
        if item.size not in (0, file.ram_bytes):
            raise corrupt(path, f"is of a RAM of {file.ram_bytes} bytes, not {item.size}")
        if not _stands_on(file.parent, item, stock):
            raise corrupt(path, f"stands on {file.parent}, not on {item.parent}")
        for number, size in enumerate(file.stored):
            if not go_on():
                return
            file.read_chunk(descriptor, number, verify=True)
            read.bytes += size


def _stands_on(parent: str | None, item: Item, stock: Stock) -> bool:
    """Its own word, or that of a merge which is not yet written down: then on one further down."""
    below = item.parent
    while below is not None and below != parent:
        below = stock.parents.get(below)
    return below == parent


def _state(item: Item, stock: Stock, layout: Layout, read: Read, go_on: GoOn) -> None:
    path = layout.state_file(item.id)
    with _opened(path, item, "STATE_CORRUPT") as descriptor:
        _compare(descriptor, path, item, "STATE_CORRUPT", STATE_BYTES, read, go_on)


def _blob(item: Item, stock: Stock, layout: Layout, read: Read, go_on: GoOn) -> None:
    path = layout.blob(Sha256(item.id))
    with _opened(path, item, "BLOB_MISSING") as descriptor:
        _compare(descriptor, path, item, "BLOB_CORRUPT", None, read, go_on)


def _compare(
    descriptor: int, path: Path, item: Item, reason: str, most: int | None, read: Read, go_on: GoOn
) -> None:
    """Compare a whole file with the SHA-256 that the catalog has of it."""
    size = os.fstat(descriptor).st_size
    if most is not None and size > most:
        raise _WrongError(reason, f"{path.name} has {size} bytes")
    digest, at = hashlib.sha256(), 0
    while portion := os.pread(descriptor, _PORTION, at):
        if not go_on():
            return
        digest.update(portion)
        at += len(portion)
    read.bytes += at
    if digest.hexdigest() != item.digest:
        raise _WrongError(
            reason, f"{path.name} ({at} bytes) is not what was saved: its SHA-256 differs"
        )
