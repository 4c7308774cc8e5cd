"""Reads tars that anybody may have sent, and writes plain ones. No file is touched here.

A guest says what its tar holds, so nothing of it is presumed: names stay below the folder that they
are for, or the tar is refused; headers are bounded before they are kept; whatever is no file,
directory or link is told as such. Content goes through in pieces. Sparse members, which say of few
bytes that they are many, are refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from stratabox.client.errors import InvalidArchiveError

BLOCK = 512
END = bytes(2 * BLOCK)
_PIECE = 64 << 10
_LONG_NAME = 64 << 10
_PAX = 256 << 10
_EXTENSIONS = 8  # headers about one member
_DEEPEST = 256
_NAME = 255
_LARGEST = 1 << 62
_EARLIEST, _LATEST = 0, 253_402_300_799


class Kind(Enum):
    """What a member is."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symbolic link"
    HARD_LINK = "hard link"
    OTHER = "device or FIFO"


_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"5": Kind.DIRECTORY,
    b"3": Kind.OTHER,
    b"4": Kind.OTHER,
    b"6": Kind.OTHER,
}


@dataclass(frozen=True)
class Member:
    """One member of a tar."""

    kind: Kind
    parts: tuple[bytes, ...]
    """Of its path, below the folder that is packed; none: that folder."""
    size: int
    mode: int
    """The twelve permission bits."""
    modified: int
    """Seconds since 1970."""
    target: bytes = b""
    """Of a symbolic link: as it is. Of a hard link: another member's name."""

    @property
    def path(self) -> bytes:
        """Its path, below the folder that is packed."""
        return b"/".join(self.parts)


class Sink(Protocol):
    """Where members go: `member`, then all of its content by `data`."""

    def member(self, member: Member) -> None:
        """The next one."""

    def data(self, piece: bytes) -> None:
        """The next bytes of a file."""

    def end(self) -> None:
        """There are no more members."""


class Reader:
    """Takes a tar in pieces of any size and gives its members to a sink.

    :raise InvalidArchiveError: by `feed` and `finish`, for what is no tar that can be taken.
    """

    def __init__(self, sink: Sink) -> None:
        self._held = bytearray()
        self._parser = _parse(sink)
        self._wanted = next(self._parser)
        self._over = False

    def feed(self, data: bytes) -> None:
        """The next bytes. What follows the end is dropped."""
        if self._over:
            return
        self._held += data
        at = 0
        view = memoryview(self._held)
        try:
            while len(view) - at >= self._wanted:
                piece = bytes(view[at : at + self._wanted])
                at += self._wanted
                self._wanted = self._parser.send(piece)
        except StopIteration:
            self._over = True
        finally:
            view.release()
        del self._held[:at]

    def finish(self) -> None:
        """All bytes have come."""
        if not self._over:
            raise _invalid("it ends in the middle")


def _parse(sink: Sink) -> Generator[int, bytes, None]:
    about: dict[str, bytes] = {}
    extensions = 0
    while True:
        block = yield BLOCK
        if not any(block):
            sink.end()
            return
        _check_sum(block)
        flag, size = block[156:157], _number(block[124:136], "size")
        if flag in (b"L", b"K"):
            if size > _LONG_NAME:
                raise _invalid("a name is too long")
            about["path" if flag == b"L" else "linkpath"] = (yield from _whole(size)).rstrip(b"\0")
        elif flag in (b"x", b"g"):
            if size > _PAX:
                raise _invalid("a header is too long")
            found = _pax((yield from _whole(size)))
            if flag == b"x":
                about |= found
        else:
            member = _member(block, flag, size, about)
            about, extensions = {}, 0
            sink.member(member)
            yield from _content(member, sink)
            continue
        extensions += 1
        if extensions > _EXTENSIONS:
            raise _invalid("it has headers without end")


def _whole(size: int) -> Generator[int, bytes, bytes]:
    padded = -(-size // BLOCK) * BLOCK
    return (yield padded)[:size] if padded else b""


def _content(member: Member, sink: Sink) -> Generator[int, bytes, None]:
    left = member.size
    while left:
        piece = yield min(left, _PIECE)
        left -= len(piece)
        sink.data(piece)
    if rest := -member.size % BLOCK:
        yield rest


def _member(block: bytes, flag: bytes, size: int, about: dict[str, bytes]) -> Member:
    name = about.get("path")
    if name is None:
        name = _text(block[0:100])
        if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
            name = prefix + b"/" + name
    if any(key.startswith("GNU.sparse") for key in about) or flag == b"S":
        raise _invalid("it has a sparse member, and those are not taken")
    kind = _KINDS.get(flag)
    if kind is None:
        raise _invalid(f"a member is of the kind {flag!r}, which is not known")
    if kind is Kind.FILE and name.endswith(b"/"):
        kind = Kind.DIRECTORY  # as the oldest tars had them
    if "size" in about:
        size = _decimal(about["size"], "size")
    modified = _number(block[136:148], "time", signed=True)
    if "mtime" in about:
        modified = _decimal(about["mtime"].partition(b".")[0], "time")
    target = about.get("linkpath", _text(block[157:257]))
    if kind in (Kind.SYMLINK, Kind.HARD_LINK) and (not target or b"\0" in target):
        raise _invalid("a link leads nowhere")
    if len(target) > 4095:
        raise _invalid("a link is too long")
    return Member(
        kind=kind,
        parts=split(name),
        size=size if kind is Kind.FILE else 0,
        mode=_number(block[100:108], "mode") & 0o7777,
        modified=min(max(modified, _EARLIEST), _LATEST),
        target=target,
    )


def split(name: bytes) -> tuple[bytes, ...]:
    """The parts of a name that stays below its folder.

    :raise InvalidArchiveError: when it does not.
    """
    if name.startswith(b"/"):
        raise _invalid(f"it has the absolute name {_shown(name)}")
    if b"\0" in name:
        raise _invalid("a name has a NUL byte")
    parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise _invalid(f"the name {_shown(name)} leads out of it")
    if len(parts) > _DEEPEST:
        raise _invalid(f"it has folders in folders, more than {_DEEPEST}")
    if any(len(part) > _NAME for part in parts):
        raise _invalid("a name is too long")
    return parts


def leads_out(member: Member) -> bool:
    """Whether a symbolic link could lead out of the folder that is packed.

    Only what begins with some ".." and then goes down is sure: one behind a name, which may be a
    link itself, could lead anywhere.
    """
    parts = [part for part in member.target.split(b"/") if part not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return member.target.startswith(b"/") or up > len(member.parts) - 1 or b".." in parts[up:]


def pack_header(member: Member) -> bytes:
    """A member as a tar has it; its content, padded to whole blocks, follows."""
    info = tarfile.TarInfo("./" + _decoded(member.path))
    kinds = {Kind.DIRECTORY: tarfile.DIRTYPE, Kind.SYMLINK: tarfile.SYMTYPE}
    info.type = kinds.get(member.kind, tarfile.REGTYPE)
    if member.kind is Kind.HARD_LINK:
        info.type = tarfile.LNKTYPE
        info.linkname = "./" + _decoded(b"/".join(split(member.target)))
    elif member.kind is Kind.SYMLINK:
        info.linkname = _decoded(member.target)
    info.size = member.size
    info.mode = member.mode
    info.mtime = member.modified
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def opened(folder: Member) -> Member:
    """A folder as it is while it is filled: whoever unpacks it can write there."""
    return replace(folder, mode=folder.mode | 0o700)


class Repacker:
    """A sink that makes a tar again, of nothing but files, directories and links.

    A directory comes twice, before what is in it and behind: busybox's tar sets its time at once.

    :param put: takes its bytes.
    :param leave_out: is told what is left out, and why.
    """

    def __init__(
        self, put: Callable[[bytes], None], leave_out: Callable[[Member, str], None]
    ) -> None:
        self._put, self._leave_out = put, leave_out
        self._padding = self._left = 0
        self._way: list[Member] = []

    def member(self, member: Member) -> None:
        """As `Sink` says."""
        if member.kind is Kind.OTHER:
            self._leave_out(member, "left out: it is a device or a FIFO")
            return
        while self._way and member.parts[: len(self._way[-1].parts)] != self._way[-1].parts:
            self._put(pack_header(self._way.pop()))
        if member.kind is Kind.DIRECTORY:
            self._way.append(member)
            if len(self._way) > _DEEPEST + 1:
                raise _invalid("a folder comes again and again")
            member = opened(member)
        self._put(pack_header(member))
        self._left, self._padding = member.size, -member.size % BLOCK

    def data(self, piece: bytes) -> None:
        """As `Sink` says."""
        self._put(piece)
        self._left -= len(piece)
        if not self._left:
            self._put(bytes(self._padding))

    def end(self) -> None:
        """As `Sink` says."""
        while self._way:
            self._put(pack_header(self._way.pop()))
        self._put(END)


def _check_sum(block: bytes) -> None:
    told = _number(block[148:156], "checksum")
    plain = block[:148] + b" " * 8 + block[156:]
    if told not in (sum(plain), sum(each - 256 if each > 127 else each for each in plain)):
        raise _invalid("a header is damaged")


def _number(field: bytes, what: str, *, signed: bool = False) -> int:
    if field[:1] in (b"\x80", b"\xff"):
        number = int.from_bytes(field[1:], "big", signed=False)
        if field[:1] == b"\xff":
            number -= 1 << 8 * (len(field) - 1)
    else:
        text = field.partition(b"\0")[0].strip()
        if not all(0x30 <= each <= 0x37 for each in text):
            raise _invalid(f"its {what} is no number")
        number = int(text or b"0", 8)
    if number > _LARGEST or (number < 0 and not signed):
        raise _invalid(f"its {what} cannot be")
    return number


def _decimal(text: bytes, what: str) -> int:
    digits = text.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 19:
        raise _invalid(f"its {what} is no number")
    number = int(text)
    if number > _LARGEST or (number < 0 and what == "size"):
        raise _invalid(f"its {what} cannot be")
    return number


def _pax(data: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    while data:
        count, blank, _ = data.partition(b" ")
        if not blank or not count.isdigit() or len(count) > 7:
            raise _invalid("a header is damaged")
        size = int(count)
        record, data = data[len(count) + 1 : size], data[size:]
        key, equals, value = record.partition(b"=")
        if size <= len(count) + 1 or not equals or not value.endswith(b"\n"):
            raise _invalid("a header is damaged")
        name = key.decode("utf-8", "replace")
        if name in ("path", "linkpath", "size", "mtime") or name.startswith("GNU.sparse"):
            found[name] = value[:-1]
    return found


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _shown(name: bytes) -> str:
    return repr(name[:200].decode("utf-8", "backslashreplace"))


def _invalid(why: str) -> InvalidArchiveError:
    return InvalidArchiveError(f"what the guest sent is no tar that can be taken: {why}")
