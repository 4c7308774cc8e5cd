"""What a guest sends as a tar: whatever it holds, only the target is touched, and not for ever."""

from __future__ import annotations

import contextlib
import io
import os
import random
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratabox.client import InvalidArchiveError
from stratabox.client._extracting import Extractor, Notes
from stratabox.client._packing import pack
from stratabox.client._tar import Kind, Member, Reader, Repacker, leads_out, pack_header, split

MIB = 1 << 20


def member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", target: str = "", **more: object
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), target
    for key, value in more.items():
        setattr(info, key, value)
    head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return head + data + bytes(-len(data) % 512)


def taken(
    target: Path, content: bytes, *, limit: int = 64 * MIB, all_links: bool = False, step: int = 777
) -> Notes:
    """Unpack a tar that comes in pieces."""
    notes = Notes()
    extractor = Extractor(target, notes, fresh=True, limit=limit, all_links=all_links)
    try:
        reader = Reader(extractor)
        for at in range(0, len(content), step):
            reader.feed(content[at : at + step])
        reader.finish()
    finally:
        extractor.close()
    return notes


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All below a folder: mode, and content or where a link leads to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = b""
        if stat.S_ISLNK(mode):
            content = os.fsencode(path.readlink())
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = mode, content
    return found


def opened_below(folder: Path) -> list[str]:
    """What this process has open there; its other descriptors come and go with gRPC's threads."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return [path for path in found if Path(path).is_relative_to(folder)]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A folder, beside one that must stay as it is, and no descriptor of either is left open."""
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "precious").write_bytes(b"precious")
    before = everything(outside)
    made = tmp_path / "target"
    made.mkdir()
    yield made
    assert everything(outside) == before
    assert opened_below(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "target"]


END = bytes(1024)


def test_files_folders_and_links_come_as_they_are(target: Path) -> None:
    long = "/".join(["x" * 90] * 4)
    taken(
        target,
        member("./", tarfile.DIRTYPE, mode=0o750, mtime=1000)
        + member("./d", tarfile.DIRTYPE, mode=0o555, mtime=2000)
        + member("./d/a b\nc", data=b"\0\xff" * 3000, mode=0o4755, mtime=3000)
        + member("./d/\udcff\udcfe", data=b"raw")
        + member("./d/link", tarfile.SYMTYPE, target="../e")
        + member("./e", mode=0o600)
        + member("./hard", tarfile.LNKTYPE, target="./d/a b\nc")
        + member(f"./{long}", data=b"deep")
        + END,
    )
    found = everything(target)
    assert found["d/a b\nc"] == (stat.S_IFREG | 0o755, b"\0\xff" * 3000)
    assert found["d/\udcff\udcfe"][1] == b"raw"
    assert found["d/link"][1] == b"../e"
    assert found["e"] == (stat.S_IFREG | 0o600, b"")
    assert found[long][1] == b"deep"
    assert found["d"][0] == stat.S_IFDIR | 0o555
    assert (target / "hard").samefile(target / "d/a b\nc")
    assert target.stat().st_mode == stat.S_IFDIR | 0o750
    times = [int(path.stat().st_mtime) for path in (target, target / "d", target / "d/a b\nc")]
    assert times == [1000, 2000, 3000]


@pytest.mark.parametrize(
    "content",
    [
        member("../outside/precious", data=b"evil"),
        member("a/../../outside/precious", data=b"evil"),
        member("/etc/stratabox-evil", data=b"evil"),
        member("./", tarfile.DIRTYPE) + member("..", tarfile.DIRTYPE, mode=0),
        member("hard", tarfile.LNKTYPE, target="../outside/precious"),
        member("hard", tarfile.LNKTYPE, target="/etc/passwd"),
        member("hard", tarfile.LNKTYPE, target="hard"),
        member("hard", tarfile.LNKTYPE, target="."),
        member("empty", tarfile.SYMTYPE, target=""),
        member("/".join(["d"] * 300), data=b"deep"),
        member("n" * 256, data=b"long"),
        member("x", b"Z"),
        member("x", tarfile.GNUTYPE_SPARSE),
    ],
)
def test_what_leads_out_or_makes_no_sense_is_refused(target: Path, content: bytes) -> None:
    with pytest.raises(InvalidArchiveError, match="the guest"):
        taken(target, content + END)
    assert all(not path.is_file() for path in target.rglob("*"))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("l", "/etc"),
        ("l", ".."),
        ("l", "../outside"),
        ("d/l", "../../outside"),
        ("l", "d/.."),
        ("l", "d/../../outside"),
        ("l", "/"),
        ("l", "./../outside"),
    ],
)
@pytest.mark.parametrize("all_links", [False, True])
def test_nothing_goes_through_a_link(target: Path, name: str, link: str, all_links: bool) -> None:
    """Not even through one that was asked for."""
    outside = os.path.relpath(target.parent / "outside", target)
    through = f"{name}/precious", f"{name}/folder/new", f"{name}/{outside}/x"
    assert leads_out(Member(Kind.SYMLINK, split(name.encode()), 0, 0, 0, link.encode()))
    notes = taken(target, member(name, tarfile.SYMTYPE, target=link) + END, all_links=all_links)
    assert (target / name).is_symlink() == all_links
    assert notes.incomplete != all_links
    for path in through:
        content = member(name, tarfile.SYMTYPE, target=link) + member(path, data=b"evil") + END
        try:
            taken(target, content, all_links=all_links)
        except (OSError, InvalidArchiveError):
            continue
        assert not all_links  # a folder of that name is in the link's place then
        assert (target / path).read_bytes() == b"evil"
        (target / path).unlink()


def test_links_that_were_there_are_not_followed(target: Path) -> None:
    outside = target.parent / "outside"
    (target / "folder").symlink_to(outside / "folder")
    (target / "file").symlink_to(outside / "precious")
    os.link(outside / "precious", target / "hard")
    with pytest.raises(OSError, match="folder"):
        taken(target, member("folder/new", data=b"evil") + END)
    with pytest.raises(OSError, match="folder"):
        taken(target, member("folder", tarfile.DIRTYPE, mode=0) + END)
    taken(target, member("file", data=b"mine") + member("hard", data=b"mine", mode=0) + END)
    assert (target / "file").read_bytes() == (target / "hard").read_bytes() == b"mine"
    assert not (target / "file").is_symlink()


def test_devices_are_left_out_and_told(target: Path) -> None:
    notes = taken(
        target,
        member("null", tarfile.CHRTYPE, devmajor=1, devminor=3)
        + member("disk", tarfile.BLKTYPE, devmajor=8)
        + member("fifo", tarfile.FIFOTYPE)
        + member("after", data=b"x")
        + END,
    )
    assert [path.name for path in target.iterdir()] == ["after"]
    result = notes.result()
    assert result.incomplete
    assert [text.partition(":")[0] for text in result.warnings] == ["null", "disk", "fifo"]


def test_more_than_there_is_room_for_is_refused_before_it_comes(target: Path) -> None:
    info = tarfile.TarInfo("huge")
    info.size = 1 << 40
    head = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(InvalidArchiveError, match="1099511627776 bytes or more"):
        taken(target, head)
    assert list(target.iterdir()) == []
    many = b"".join(member(f"f{number}", data=b"x" * 1000) for number in range(20))
    with pytest.raises(InvalidArchiveError, match="11000 bytes or more"):
        taken(target, many + END, limit=10_000)


def test_holes_take_no_room(target: Path) -> None:
    taken(target, member("sparse", data=bytes(8 * MIB) + b"end") + END, step=MIB)
    found = (target / "sparse").stat()
    assert found.st_size == 8 * MIB + 3
    assert found.st_blocks * 512 < MIB
    assert (target / "sparse").read_bytes()[-4:] == b"\0end"


def test_warnings_are_bounded_and_so_is_what_is_held(target: Path) -> None:
    notes = taken(target, member("d", tarfile.FIFOTYPE) * 5000 + END)
    assert notes.entries == 5000
    assert len(notes.result().warnings) == 100


def test_headers_are_bounded(target: Path) -> None:
    def extension(flag: bytes, size: int) -> bytes:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = flag, size
        return info.tobuf(tarfile.GNU_FORMAT)

    for content in (
        extension(b"L", 1 << 30),
        extension(b"x", 1 << 30),
        extension(b"g", 1 << 30),
        (extension(b"x", 9) + b"9 size=1\n".ljust(512, b"\0")) * 9,
    ):
        with pytest.raises(InvalidArchiveError, match=r"too long|without end"):
            taken(target, content + END)


def test_pax_is_read(target: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("./" + "ü" * 120)
        info.size, info.mtime = 3, 1234.75
        tar.addfile(info, io.BytesIO(b"pax"))
    taken(target, content.getvalue())
    assert (target / ("ü" * 120)).read_bytes() == b"pax"
    assert int((target / ("ü" * 120)).stat().st_mtime) == 1234
    for record in (b"13 size=-100\n", b"12 size=1e3\n", b"20 GNU.sparse.major=1\n", b"99 x\n"):
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(record)
        head = info.tobuf(tarfile.GNU_FORMAT) + record.ljust(512, b"\0")
        with pytest.raises(InvalidArchiveError):
            taken(target, head + member("f") + END)


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 513, 1024, 1511])
def test_a_tar_that_is_broken_off_is_no_tar(target: Path, cut: int) -> None:
    content = member("file", data=b"x" * 1000)
    with pytest.raises(InvalidArchiveError, match="ends in the middle"):
        taken(target, content[:cut])
    assert not (target / "file").exists()


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30), flips=st.integers(1, 12))
def test_damage_never_does_more_than_fail(
    tmp_path_factory: pytest.TempPathFactory, seed: int, flips: int
) -> None:
    chance = random.Random(seed)
    content = bytearray(
        member("d", tarfile.DIRTYPE)
        + member("d/f", data=b"content" * 99)
        + member("d/l", tarfile.SYMTYPE, target="f")
        + member("x" * 180, data=b"long")
        + END
    )
    for _ in range(flips):
        at = chance.randrange(len(content))
        content[at] = chance.randrange(256)
        block = at // 512 * 512
        if chance.random() < 0.8:  # a checksum that fits, so that the damage is looked at
            head = content[block : block + 148] + b" " * 8 + content[block + 156 : block + 512]
            content[block + 148 : block + 156] = b"%06o\0 " % sum(head)
    folder = tmp_path_factory.mktemp("damage")
    target = folder / "target"
    target.mkdir()
    with contextlib.suppress(InvalidArchiveError, OSError):
        taken(target, bytes(content))
    assert [path.name for path in folder.iterdir()] == ["target"]


def test_a_folder_of_ours_comes_through_whole(tmp_path: Path, target: Path) -> None:
    source = tmp_path / "outside" / "folder"
    copy = target / "copy"
    notes = Notes()
    content = b"".join(pack(target.parent / "outside", notes, itself=True))
    taken(target, content)
    assert (target / "precious").read_bytes() == b"precious"
    assert (target / "folder").is_dir()
    assert not copy.exists()
    assert source.is_dir()
    assert notes.entries == 2
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert sorted(set(tar.getnames())) == [".", "./folder", "./precious"]


def test_folders_come_again_behind_what_is_in_them() -> None:
    out = bytearray()
    reader = Reader(Repacker(out.extend, lambda member, why: None))
    reader.feed(
        member("./", tarfile.DIRTYPE, mode=0o500)
        + member("./a", tarfile.DIRTYPE, mode=0o555)
        + member("./a/b", tarfile.DIRTYPE, mode=0o755)
        + member("./a/b/f")
        + member("./c")
        + END
    )
    reader.finish()
    with tarfile.open(fileobj=io.BytesIO(bytes(out))) as tar:
        found = [(info.name, info.mode) for info in tar]
    assert found == [
        (".", 0o700), ("./a", 0o755), ("./a/b", 0o755), ("./a/b/f", 0o644),
        ("./a/b", 0o755), ("./a", 0o555), ("./c", 0o644), (".", 0o500),
    ]  # fmt: skip
    with pytest.raises(InvalidArchiveError, match="again and again"):
        Reader(Repacker(out.extend, lambda member, why: None)).feed(
            member("./", tarfile.DIRTYPE) * 500
        )


def test_repacked_it_holds_nothing_else(target: Path) -> None:
    out = bytearray()
    left: list[bytes] = []
    reader = Reader(Repacker(out.extend, lambda member, why: left.append(member.path)))
    reader.feed(
        member("./", tarfile.DIRTYPE)
        + member("./null", tarfile.CHRTYPE)
        + member("./f", data=b"x" * 700, uid=7, uname="evil")
        + member("./l", tarfile.SYMTYPE, target="/etc")
        + member("./h", tarfile.LNKTYPE, target="f")
        + END
    )
    reader.finish()
    assert left == [b"null"]
    with tarfile.open(fileobj=io.BytesIO(bytes(out))) as tar:
        found = {info.name: (info.type, info.uid, info.linkname) for info in tar}
    assert found == {
        ".": (tarfile.DIRTYPE, 0, ""),
        "./f": (tarfile.REGTYPE, 0, ""),
        "./l": (tarfile.SYMTYPE, 0, "/etc"),
        "./h": (tarfile.LNKTYPE, 0, "./f"),
    }
    for name in (b"../x", b"/x", b"a/../b", b"a\0b"):
        with pytest.raises(InvalidArchiveError):
            split(name)
    assert len(pack_header(Member(Kind.FILE, (b"a",), 1 << 40, 0, 0))) == 512
