"""Files in guests: whole or not at all, of any name and size, with errors that say why."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    FileChange,
    FileInfo,
    FileKind,
    GuestDirectoryNotEmptyError,
    GuestFileError,
    GuestFileExistsError,
    GuestFileNotFoundError,
    GuestIsADirectoryError,
    GuestNoSpaceError,
    GuestNotADirectoryError,
    GuestPermissionError,
    InvalidArgumentError,
    InvalidStateError,
    NotFoundError,
    Sandbox,
    UnavailableError,
    UserNotFoundError,
    WatchMethod,
)
from support.daemon import DaemonProcess
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]
MIB = 1 << 20
NOISE = random.Random(5).randbytes(300_000)
NAMES = [b"plain", b"a b", b"new\nline", b"line\n", b"\xff\xfe", b"'\"$(id)`id`\\", b"-rf", b"*"]


@pytest.fixture
def folder(module_box: Sandbox, sh: Shell) -> Iterator[str]:
    """A folder in the guest for one test."""
    sh(module_box, "mkdir /work")
    yield "/work"
    sh(module_box, "umount /work/small 2>/dev/null; rm -rf /work")


def names(box: Sandbox, path: str) -> list[bytes]:
    return [each.path for each in box.files.list(path)]


def test_any_name_and_any_content(module_box: Sandbox, folder: str, sh: Shell) -> None:
    files = module_box.files
    for number, name in enumerate(NAMES):
        path = folder.encode() + b"/" + name
        content = NOISE[: number * 40_000]
        info = files.write(path, content)
        assert info == files.stat(path)
        assert (info.path, info.kind, info.size) == (path, FileKind.REGULAR, len(content))
        assert (info.mode, info.uid, info.gid) == (0o644, 0, 0)
        assert files.read(path) == content
    assert names(module_box, folder) == sorted(NAMES)
    assert sh(module_box, f"find {folder} -type f -print0 | tr -dc '\\0' | wc -c") == "8"
    path = folder.encode() + b"/\xff\xfe"
    assert files.read(path, offset=100, length=50) == NOISE[100:150]
    assert files.read(path, offset=159_999) == NOISE[159_999:160_000]
    assert files.read(path, offset=999_999) == b""
    assert files.read(path, length=0) == b""
    assert files.read("/proc/version").startswith(b"Linux version")
    assert files.read("/dev/zero", length=70_000) == bytes(70_000)


def test_ways_to_write(module_box: Sandbox, folder: str) -> None:
    files, path = module_box.files, f"{folder}/f"
    then = datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)
    info = files.write(path, "ünï", mode=0o4751, modified_at=then)
    assert (info.mode, info.modified_at) == (0o4751, then)
    files.change(path, mode=0o640, owner="nobody", group=7)
    info = files.write(path, b"new")
    assert (info.mode, info.uid, info.gid) == (0o640, 65534, 7)
    files.write(path, iter([b" ", b"and more"]), write_mode="append")
    assert files.read(path) == b"new and more"
    files.write(path, b"over", write_mode="truncate")
    assert files.read(path) == b"over"
    with pytest.raises(GuestFileExistsError):
        files.write(path, b"", write_mode="create")
    assert files.write(f"{folder}/made", b"x", write_mode="create", mode=0o600).mode == 0o600
    files.symlink(f"{folder}/link", "f")
    files.write(f"{folder}/link", b"through")
    assert files.read(path) == b"through"
    assert files.stat(f"{folder}/link", follow=False).kind is FileKind.SYMLINK
    assert files.stat(f"{folder}/link").size == 7
    assert files.write(f"{folder}/a/b/c", b"", parents=True).size == 0
    assert files.write("/dev/null", b"gone").kind is FileKind.OTHER
    assert files.write("/proc/sys/vm/swappiness", b"33\n", write_mode="truncate").size == 0
    assert files.read("/proc/sys/vm/swappiness") == b"33\n"
    assert names(module_box, folder) == [b"a", b"f", b"link", b"made"]


def test_directories_links_and_moves(module_box: Sandbox, folder: str, sh: Shell) -> None:
    files = module_box.files
    assert files.make_directory(f"{folder}/d", mode=0o700).mode == 0o700
    assert files.make_directory(f"{folder}/d/e/f", parents=True).is_directory
    assert files.make_directory(f"{folder}/d/e/f", parents=True).is_directory
    files.write(f"{folder}/d/x", b"x")
    assert files.move(f"{folder}/d/x", f"{folder}/y").size == 1
    files.write(f"{folder}/z", b"zz")
    with pytest.raises(GuestFileExistsError, match="/work/z"):
        files.move(f"{folder}/y", f"{folder}/z", keep=True)
    with pytest.raises(GuestFileNotFoundError, match="/work/none"):
        files.move(f"{folder}/none", f"{folder}/z")
    assert files.move(f"{folder}/y", f"{folder}/z").size == 1
    sh(module_box, f"mkdir {folder}/small && mount -t tmpfs none {folder}/small")
    files.move(f"{folder}/d", f"{folder}/small/d")  # to another file system
    assert sh(module_box, f"find {folder}/small") == "\n".join(
        f"{folder}/small{rest}" for rest in ("", "/d", "/d/e", "/d/e/f")
    )
    with pytest.raises(GuestDirectoryNotEmptyError):
        files.remove(f"{folder}/small/d")
    files.symlink(f"{folder}/small/l", b"/nowhere/\xff")
    assert files.read_link(f"{folder}/small/l") == b"/nowhere/\xff"
    files.remove(f"{folder}/small/l")
    files.remove(f"{folder}/small/d", recursive=True)
    files.change(folder, mode=0o750, recursive=True)
    assert {one.mode for one in files.list(folder)} == {0o750}
    assert names(module_box, f"{folder}/small") == []


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda files: files.stat("/errors/none"), GuestFileNotFoundError),
        (lambda files: files.read("/errors/none"), GuestFileNotFoundError),
        (lambda files: files.read("/errors"), GuestIsADirectoryError),
        (lambda files: files.read("/errors/file/x"), GuestNotADirectoryError),
        (lambda files: files.read("/errors/fifo"), GuestFileError),
        (lambda files: files.list("/errors/none"), GuestFileNotFoundError),
        (lambda files: files.list("/errors/file"), GuestNotADirectoryError),
        (lambda files: files.write("/errors", b""), GuestIsADirectoryError),
        (lambda files: files.write("/errors/none/x", b""), GuestFileNotFoundError),
        (lambda files: files.write("/errors/file/x", b""), GuestNotADirectoryError),
        (lambda files: files.write("/dev/full", b"x"), GuestNoSpaceError),
        (lambda files: files.write("/errors/" + "n" * 256, b""), InvalidArgumentError),
        (lambda files: files.make_directory("/errors/file"), GuestFileExistsError),
        (lambda files: files.make_directory("/errors/a/b"), GuestFileNotFoundError),
        (lambda files: files.remove("/errors/none"), GuestFileNotFoundError),
        (lambda files: files.remove("/", recursive=True), InvalidArgumentError),
        (lambda files: files.move("/errors/file", "/errors/folder"), GuestIsADirectoryError),
        (lambda files: files.symlink("/errors/file", "x"), GuestFileExistsError),
        (lambda files: files.read_link("/errors/file"), GuestFileError),
        (lambda files: files.change("/errors/file", owner="nix"), UserNotFoundError),
        (lambda files: files.stat("/errors/file", user="nix"), UserNotFoundError),
        (lambda files: files.read("/errors/file", user="nix"), UserNotFoundError),
        (lambda files: files.read("/errors/secret", user="nobody"), GuestPermissionError),
        (lambda files: files.write("/errors/new", b"", user="nobody"), GuestPermissionError),
        (lambda files: files.list("/root", user="nobody"), GuestPermissionError),
        (lambda files: files.stat("relative"), InvalidArgumentError),
        (lambda files: files.stat("/nul\0"), InvalidArgumentError),
        (lambda files: next(files.watch("/errors/none")), GuestFileNotFoundError),
        (lambda files: next(files.read_archive("/errors/file")), GuestNotADirectoryError),
        (lambda files: files.write_archive("/errors/a/b", b""), GuestFileNotFoundError),
    ],
)
def test_what_fails_says_why(
    module_box: Sandbox, errors_folder: None, call: Callable[..., object], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        call(module_box.files)
    assert type(caught.value) is kind


@pytest.fixture(scope="module")
def errors_folder(module_box: Sandbox) -> Iterator[None]:
    """What the calls that fail find."""
    module_box.execute(
        "mkdir -p /errors/folder/x && cd /errors && touch file secret && chmod 600 secret"
        " && mkfifo fifo"
    ).check()
    yield
    module_box.execute("rm -rf /errors").check()


def test_as_another_user(module_box: Sandbox, folder: str) -> None:
    files = module_box.files
    files.change(folder, mode=0o777)
    info = files.write(f"{folder}/own", b"mine", user="nobody")
    assert (info.uid, info.gid) == (65534, 65534)
    assert files.read(f"{folder}/own", user="nobody") == b"mine"
    assert [one.uid for one in files.list(folder, user="nobody")] == [65534]
    assert files.make_directory(f"{folder}/d", user="nobody").uid == 65534
    assert files.write_archive(f"{folder}/d", bytes(1024), user="nobody") == ()


BYTES = int(os.environ.get("STRATABOX_SOAK_FILE_BYTES") or 100_000_000)
"""`make soak` takes 1 GB."""


def test_a_hundred_megabytes_and_flat_memory(
    client: Client, module_box: Sandbox, shared_daemon: DaemonProcess
) -> None:
    with contextlib.ExitStack() as stack:
        box = module_box
        if BYTES > 500_000_000:
            bigger = client.sandboxes.create(image="tiny", memory=256, storage=4)
            box = stack.enter_context(bigger)
        pieces = [NOISE[at : at + 200_000] for at in range(0, 100_000, 1000)]
        digest = hashlib.sha256()
        box.files.write("/big", b"")
        stack.callback(box.files.remove, "/big")

        def content() -> Iterator[bytes]:
            for number in range(BYTES // 200_000):
                digest.update(pieces[number % 100])
                yield pieces[number % 100]

        before = _memory(shared_daemon, "VmRSS")
        assert box.files.write("/big", content()).size == BYTES
        found = hashlib.sha256()
        for piece in box.files.stream("/big"):
            found.update(piece)
        assert found.digest() == digest.digest()
        assert _memory(shared_daemon, "VmHWM") - before < 50 * MIB


def _memory(daemon: DaemonProcess, which: str) -> int:
    """VmRSS: what the daemon has now, from when on VmHWM has its most. In bytes."""
    folder = Path("/proc") / str(daemon.pid)
    if which == "VmRSS":
        (folder / "clear_refs").write_text("5")
    lines = (folder / "status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith(which))
    return int(line.split()[1]) << 10


def _programs(box: Sandbox) -> list[str]:
    """The command lines of all that runs in the guest."""
    line = "for f in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$f 2>/dev/null; echo; done"
    return box.execute(line).stdout_text.split("\n")


def test_a_watch_tells_what_changes(module_box: Sandbox, folder: str, sh: Shell) -> None:
    sh(module_box, f"mkdir -p {folder}/d/e; touch {folder}/d/e/old")
    told = module_box.files.watch(folder, recursive=True)
    assert next(told) is WatchMethod.INOTIFY
    sh(
        module_box,
        f"cd {folder}; echo x >f; chmod 600 f; mv f d/e/g; mkdir -p n/m; echo y >n/m/y",
    )
    found = [_told(one) for one in _until(told, b"n/m/y")]
    # Now the new directory is watched: what goes there before that has only gone away.
    sh(
        module_box,
        f"cd {folder}; mv d/e n/e; echo z >n/e/z; rm n/e/old; printf x >\"$(printf '\\377 \\n')\"",
    )
    found += [_told(one) for one in _until(told, b"\xff ")]
    for expected in (
        ("created", b"f", b"", False),
        ("changed", b"f", b"", False),
        ("moved", b"d/e/g", b"f", False),
        ("created", b"n", b"", True),
        ("created", b"n/m", b"", True),
        ("created", b"n/m/y", b"", False),
        ("moved", b"n/e", b"d/e", True),
        ("created", b"n/e/z", b"", False),
        ("removed", b"n/e/old", b"", False),
    ):
        assert expected in found, found
    sh(module_box, f"rm -r {folder}/d {folder}/n {folder}/*; rmdir {folder}")
    assert _told(list(told)[-1]) == ("removed", b"", b"", True)
    sh(module_box, f"mkdir {folder}")


def test_a_watch_of_one_file(module_box: Sandbox, folder: str, sh: Shell) -> None:
    path = f"{folder}/f"
    module_box.files.write(path, b"")
    told = module_box.files.watch(path)
    assert next(told) is WatchMethod.INOTIFY
    module_box.files.write(path, b"replaced")
    sh(module_box, f"touch {folder}/other; rm {path}; touch {path}")
    found: list[str] = []
    while found[-2:] != ["removed", "created"]:
        one = next(told)
        assert isinstance(one, FileChange)
        assert one.path == path.encode()
        found.append(str(one.type))
    told.close()  # type: ignore[attr-defined]  # it is a generator
    eventually(lambda: not any("/.stratabox." in each for each in _programs(module_box)))


def test_without_inotify_it_looks_again_and_again(
    module_box: Sandbox, folder: str, sh: Shell
) -> None:
    sh(module_box, "cd /usr/bin && rm uname && echo 'echo riscv64' >uname && chmod 755 uname")
    try:
        told = module_box.files.watch(folder, recursive=True)
        assert next(told) is WatchMethod.POLLING
        odd = f"\"$(printf '{folder}/\\377 \\n')\""
        sh(module_box, f"mkdir {folder}/d; echo x >{folder}/d/f; : >{odd}")
        found = [_told(one) for one in _until(told, b"\xff ")]
        assert ("created", b"d/f", b"", False) in found
        sh(module_box, f"rm -r {folder}/*; rmdir {folder}")
        assert _told(list(told)[-1]) == ("removed", b"", b"", True)
    finally:
        sh(module_box, "ln -sf busybox /usr/bin/uname; mkdir -p /work")


def _until(told: Iterator[object], name: bytes) -> Iterator[object]:
    for one in told:
        yield one
        if isinstance(one, FileChange) and name in one.path:
            return


def _told(one: object) -> tuple[str, bytes, bytes, bool]:
    assert isinstance(one, FileChange)
    path, old = (
        each.removeprefix(b"/work").removeprefix(b"/") for each in (one.path, one.old_path)
    )
    return str(one.type), path, old, one.directory


def test_many_at_once(module_box: Sandbox, folder: str) -> None:
    found: dict[int, FileInfo] = {}

    def write(number: int) -> None:
        found[number] = module_box.files.write(f"{folder}/f{number}", b"%d" % number * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(module_box.files.list(folder)) == 6
    for number in range(6):
        assert module_box.files.read(f"{folder}/f{number}") == b"%d" % number * 1000


def test_a_guest_that_stands_still_has_no_files(module_box: Sandbox, client: Client) -> None:
    module_box.pause()
    try:
        with pytest.raises(InvalidStateError, match="use files of"):
            module_box.files.stat("/")
    finally:
        module_box.resume()
    assert module_box.files.stat("/").is_directory
    with pytest.raises(NotFoundError):
        client.files.stat("no-such-sandbox", "/")


async def test_the_asynchronous_face(
    module_box: Sandbox, shared_daemon: DaemonProcess, folder: str
) -> None:
    async with AsyncClient(shared_daemon.address) as client:
        files = (await client.sandboxes.get(module_box.id)).files
        assert (await files.write(f"{folder}/f", [b"a", b"b"])).size == 2
        assert await files.read(f"{folder}/f") == b"ab"
        assert b"".join([piece async for piece in files.stream(f"{folder}/f")]) == b"ab"
        assert [one.name for one in await files.list(folder)] == ["f"]
        told = files.watch(folder)
        assert await anext(told) is WatchMethod.INOTIFY
        await files.remove(f"{folder}/f")
        change = await anext(told)
        assert isinstance(change, FileChange)
        assert change.path == b"/work/f"
        await told.aclose()  # type: ignore[attr-defined]  # it is a generator
        with pytest.raises(GuestFileNotFoundError):
            await client.files.read(module_box.id, f"{folder}/f")


def test_an_image_without_tools_says_so(module_box: Sandbox, folder: str, sh: Shell) -> None:
    sh(module_box, "mv /usr/bin/tar /usr/bin/tar-away")
    try:
        with pytest.raises(Exception, match="has not the program") as caught:
            b"".join(module_box.files.read_archive(folder))
        assert getattr(caught.value, "reason", "") == "GUEST_TOOL_MISSING"
        assert not isinstance(caught.value, UnavailableError)
    finally:
        sh(module_box, "mv /usr/bin/tar-away /usr/bin/tar")
