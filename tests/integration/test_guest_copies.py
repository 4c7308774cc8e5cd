"""`sandbox cp`: trees into guests, out of them and between them, whatever a guest sends."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from stratabox.client import (
    GuestFileError,
    GuestIsADirectoryError,
    GuestNoSpaceError,
    GuestNotADirectoryError,
    InvalidArchiveError,
    Sandbox,
)
from stratabox.client.cli import cli
from support.daemon import DaemonProcess

Shell = Callable[[Sandbox, str], str]
Run = Callable[..., Result]
NOISE = random.Random(6).randbytes(400_000)


@pytest.fixture
def cp(shared_daemon: DaemonProcess) -> Run:
    """Run `stratabox sandbox cp`."""

    def run(*words: object, **options: Any) -> Result:
        environment = {"STRATABOX_ADDRESS": shared_daemon.address}
        command = ["sandbox", "cp", *map(str, words)]
        return CliRunner().invoke(cli, command, env=environment, **options)

    return run


@pytest.fixture
def folder(module_box: Sandbox, sh: Shell) -> Iterator[str]:
    """A folder in the guest for one test."""
    sh(module_box, "mkdir /work")
    yield "/work"
    sh(module_box, "umount /work/small 2>/dev/null; rm -rf /work")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with most of what a folder can have."""
    top = tmp_path / "tree"
    (top / "sub" / "deep" / "er").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    (top / "big").write_bytes(NOISE)
    (top / "run").write_text("#!/bin/sh\n")
    (top / "run").chmod(0o755)
    (top / "sub" / "sp ace\nnew").write_bytes(b"\0")
    Path(os.fsdecode(os.fsencode(top / "sub") + b"/\xff\xfe")).write_bytes(b"raw")
    long = top / "sub" / ("n" * 200) / ("m" * 200)
    long.parent.mkdir()
    long.write_bytes(b"long")
    (top / "sub" / "link").symlink_to("deep/er")
    (top / "nowhere").symlink_to("none")
    for path in (top / "run", top / "empty", top / "sub" / "deep"):
        os.utime(path, (981_173_106, 981_173_106))
    return top


def everything(top: Path) -> dict[str, tuple[object, ...]]:
    """All below a folder: kind and mode, time, and content or where a link leads to."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        about = path.lstat()
        time = int(about.st_mtime)
        if stat.S_ISLNK(about.st_mode):
            found[str(path.relative_to(top))] = ("link", os.fsencode(path.readlink()))
        elif stat.S_ISREG(about.st_mode):
            found[str(path.relative_to(top))] = (about.st_mode, time, path.read_bytes())
        else:
            found[str(path.relative_to(top))] = (about.st_mode, time)
    return found


def test_a_tree_there_and_back_and_between(
    module_box: Sandbox, folder: str, tree: Path, tmp_path: Path, cp: Run, sh: Shell
) -> None:
    side = f"{module_box.id}:{folder}"
    done = cp("-r", tree, f"{side}/new")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "copied 12 files, " in done.stdout
    done = cp("-r", tree, side)  # into what is there
    assert done.exit_code == 0
    done = cp("-r", f"{side}/tree", f"{side}/between")
    assert (done.exit_code, done.stderr) == (0, "")
    done = cp("-r", f"{tree}/.", f"{side}/between")  # over it, without its own name
    assert done.exit_code == 0
    assert sh(module_box, f"ls {folder}") == "between\nnew\ntree"
    for name in ("new", "between"):
        done = cp("-r", f"{side}/{name}", tmp_path / name, "--json")
        assert (done.exit_code, done.stderr) == (0, "")
        assert not json.loads(done.stdout)["incomplete"]
        assert everything(tmp_path / name) == everything(tree)
    (tmp_path / "into").mkdir()
    assert cp("-r", f"{side}/tree", tmp_path / "into").exit_code == 0
    assert everything(tmp_path / "into" / "tree") == everything(tree)
    assert cp("-r", f"{side}/tree/sub/.", tmp_path / "into").exit_code == 0
    assert (tmp_path / "into" / "sp ace\nnew").exists()


def test_single_files(
    module_box: Sandbox, folder: str, tree: Path, tmp_path: Path, cp: Run
) -> None:
    side = f"{module_box.id}:{folder}"
    assert "copied 1 file, 390.6 KiB" in cp(tree / "big", f"{side}/b").stdout
    assert cp(tree / "run", side).exit_code == 0
    info = module_box.files.stat(f"{folder}/run")
    assert (info.mode, int(info.modified_at.timestamp())) == (0o755, 981_173_106)
    assert cp(f"{side}/b", f"{side}/c").exit_code == 0
    assert cp(f"{side}/c", tmp_path / "c").exit_code == 0
    assert (tmp_path / "c").read_bytes() == NOISE
    assert cp(f"{side}/run", tmp_path).exit_code == 0
    about = (tmp_path / "run").stat()
    assert (about.st_mode & 0o777, int(about.st_mtime)) == (0o755, 981_173_106)
    assert cp("-", f"{side}/in", input="from a pipe").exit_code == 0
    assert cp(f"{side}/in", "-").stdout == "from a pipe"
    for words, code, said in (
        ((tree, side), 1, "copy it with recursive"),
        ((side, tmp_path), 4, "copy it with recursive"),
        ((f"{side}/none", tmp_path), 3, "no such file"),
        ((tree / "run", f"{side}/none/x"), 3, "no such file"),
        (("-r", tree, f"{side}/in"), 4, "not a directory"),
        ((tree, tmp_path), 2, "neither side is in a guest"),
        ((f"{module_box.id}:relative", tmp_path), 2, "is absolute"),
        ((f"{side}/in", tmp_path / "none" / "x"), 1, "No such file"),
    ):
        done = cp(*words)
        assert (done.exit_code, said in done.stderr) == (code, True), (words, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "run", "tree"]


def test_special_files_are_left_out_and_told(
    module_box: Sandbox, folder: str, tmp_path: Path, cp: Run, sh: Shell
) -> None:
    sh(
        module_box,
        f"cd {folder} && mkdir d && cd d && mkfifo fifo && mknod dev c 1 3 && touch file"
        " && ln -s /etc/passwd out && ln -s file in && ln file hard && ln -s ../.. up",
    )
    side = f"{module_box.id}:{folder}/d"
    done = cp("-r", side, tmp_path / "d")
    assert done.exit_code == 1
    for name in ("fifo", "dev", "out", "up"):
        assert f"warning: {name}: left out" in done.stderr
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["file", "hard", "in"]
    assert (tmp_path / "d/hard").samefile(tmp_path / "d/file")
    done = cp("-r", "--all-links", side, tmp_path / "all")
    assert (tmp_path / "all/out").readlink() == Path("/etc/passwd")
    os.mkfifo(tmp_path / "d/fifo")
    done = cp("-r", tmp_path / "d", f"{module_box.id}:{folder}/up")
    assert (done.exit_code, "warning: fifo: left out" in done.stderr) == (1, True)


def _hostile(name: str, kind: bytes = tarfile.REGTYPE, size: int = 4, **more: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size if kind == tarfile.REGTYPE else 0
    for key, value in more.items():
        setattr(info, key, value)
    content = b"evil".ljust(512, b"\0") if info.size == 4 else b""
    return info.tobuf(tarfile.GNU_FORMAT) + content


@pytest.mark.parametrize(
    "content",
    [
        _hostile("../precious"),
        _hostile("/tmp/stratabox-evil"),
        _hostile("./l", tarfile.SYMTYPE, linkname="..") + _hostile("./l/precious"),
        _hostile("./l", tarfile.LNKTYPE, linkname="../precious"),
        _hostile("./sparse", size=1 << 40),
        _hostile("./dev", tarfile.CHRTYPE) * 3000 + _hostile("../precious"),
        b"no tar at all" * 1000,
        b"",
    ],
    ids=["parent", "absolute", "link", "hard-link", "terabyte", "devices", "noise", "nothing"],
)
def test_a_guest_that_lies_touches_nothing(
    module_box: Sandbox, folder: str, tmp_path: Path, sh: Shell, content: bytes
) -> None:
    """Its tar is a program of its own, which gives what the guest likes."""
    (tmp_path / "precious").write_bytes(b"precious")
    module_box.files.write("/hostile", content)
    sh(module_box, "mv /usr/bin/tar /usr/bin/tar-away")
    try:
        module_box.files.write("/usr/bin/tar", "#!/bin/sh\nexec cat /hostile\n", mode=0o755)
        with pytest.raises((InvalidArchiveError, OSError, GuestFileError)):
            module_box.files.download(folder, tmp_path / "out", recursive=True)
    finally:
        sh(module_box, "mv /usr/bin/tar-away /usr/bin/tar")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} <= {"precious", "out"}
    assert not Path("/tmp/stratabox-evil").exists()
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(path.read_bytes() == b"evil" for path in left)


def test_a_lying_guest_does_not_reach_another_directory(
    module_box: Sandbox, folder: str, cp: Run, sh: Shell
) -> None:
    """What goes from guest to guest is read as strictly."""
    module_box.files.write("/hostile", _hostile("../../precious") + bytes(1024))
    sh(module_box, "mv /usr/bin/tar /usr/bin/tar-away")
    module_box.files.write(
        "/usr/bin/tar",
        '#!/bin/sh\ncase "$1" in -cf) exec cat /hostile ;; esac\nexec /usr/bin/busybox tar "$@"\n',
        mode=0o755,
    )
    try:
        done = cp("-r", f"{module_box.id}:{folder}", f"{module_box.id}:/tmp/copy")
    finally:
        sh(module_box, "mv /usr/bin/tar-away /usr/bin/tar")
    assert done.exit_code == 2
    assert "leads out of it" in done.stderr
    assert sh(module_box, "ls /precious /tmp/precious 2>/dev/null; true") == ""


def test_a_file_system_that_fills_up_on_the_way(
    module_box: Sandbox, folder: str, tree: Path, sh: Shell
) -> None:
    sh(module_box, f"mkdir {folder}/small && mount -t tmpfs -o size=100k none {folder}/small")
    with pytest.raises(GuestNoSpaceError, match="/work/small/tree"):
        module_box.files.upload(tree, f"{folder}/small", recursive=True)
    with pytest.raises(GuestNoSpaceError, match="/work/small/big"):
        module_box.files.upload(tree / "big", f"{folder}/small")


def test_the_sdk_copies_too(
    module_box: Sandbox, folder: str, tree: Path, tmp_path: Path, sh: Shell
) -> None:
    seen: list[tuple[int, int]] = []
    result = module_box.files.upload(
        tree, f"{folder}/t", recursive=True, user="root", progress=lambda *of: seen.append(of)
    )
    assert (result.incomplete, result.warnings) == (False, ())
    assert seen[-1][0] == result.size_bytes
    with pytest.raises(IsADirectoryError):
        module_box.files.upload(tree, folder)
    with pytest.raises(GuestIsADirectoryError):
        module_box.files.download(folder, tmp_path / "x")
    with pytest.raises(GuestNotADirectoryError):
        module_box.files.upload(tree, f"{folder}/t/run", recursive=True)
    with pytest.raises(InvalidArchiveError, match="1000 may come"):
        module_box.files.download(f"{folder}/t", tmp_path / "x", recursive=True, limit=1000)
    with pytest.raises(NotADirectoryError):
        module_box.files.download(f"{folder}/t", tree / "run", recursive=True)
    # As a tar, for whoever has use for one.
    content = b"".join(module_box.files.read_archive(f"{folder}/t"))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert "./run" in tar.getnames()
    assert module_box.files.write_archive(f"{folder}/again", content) == ()
    assert sh(module_box, f"cd {folder}; diff -r t again && echo same") == "same"
    sh(module_box, f"chmod 777 {folder}")
    module_box.files.upload(tree, f"{folder}/theirs", recursive=True, user="nobody")
    assert {one.uid for one in module_box.files.list(f"{folder}/theirs")} == {65534}
