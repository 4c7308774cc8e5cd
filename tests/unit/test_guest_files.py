"""What is said of files in guests, and to them: the parts that need none."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor.guest.pipe import Ended, line
from stratabox.daemon.lifecycle.inside import file_scripts as scripts
from stratabox.daemon.lifecycle.inside.file_errors import failure
from stratabox.daemon.lifecycle.inside.file_records import (
    check_mode,
    check_owner,
    check_path,
    check_removable,
    parse_stat,
)
from stratabox.daemon.lifecycle.inside.file_watch import Change, ChangeType, differences
from stratabox.storage.model.errors import (
    AlreadyExistsError,
    DeniedError,
    FailedError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
)

SHELLS = [["dash"], ["bash"], ["busybox", "sh"]]


@pytest.mark.parametrize(
    ("words", "kind", "reason"),
    [
        ("cat: /x: No such file or directory", NotFoundError, "FILE_NOT_FOUND"),
        ("sh: 1: cannot open /x: No such file", NotFoundError, "FILE_NOT_FOUND"),
        ("sh: can't create /a/b: nonexistent directory", NotFoundError, "FILE_NOT_FOUND"),
        ("sh: 1: cannot create /a/b: Directory nonexistent", NotFoundError, "FILE_NOT_FOUND"),
        ("mkdir: cannot create directory '/x': File exists", AlreadyExistsError, "FILE_EXISTS"),
        ("ls: cannot access '/x/y': Not a directory", DeniedError, "NOT_A_DIRECTORY"),
        ("mv: cannot overwrite non-directory '/a' with directory '/b'", DeniedError,
         "NOT_A_DIRECTORY"),
        ("mv: cannot overwrite directory '/a' with non-directory '/b'", DeniedError,
         "IS_A_DIRECTORY"),
        ("cat: read error: Is a directory", DeniedError, "IS_A_DIRECTORY"),
        ("rmdir: 'x': Directory not empty", DeniedError, "DIRECTORY_NOT_EMPTY"),
        ("rm: can't remove '/x': Permission denied", DeniedError, "PERMISSION_DENIED"),
        ("chmod: /x: Operation not permitted", DeniedError, "PERMISSION_DENIED"),
        ("mktemp: failed: Read-only file system", DeniedError, "READ_ONLY_FILE_SYSTEM"),
        ("cat: write error: No space left on device", NoSpaceError, "GUEST_NO_SPACE"),
        ("tar: write: Disk quota exceeded", NoSpaceError, "GUEST_NO_SPACE"),
        ("touch: x: File name too long", InvalidArgumentError, "INVALID_ARGUMENT"),
        ("chown: invalid user: 'nix'", NotFoundError, "USER_NOT_FOUND"),
        ("chown: unknown user nix", NotFoundError, "USER_NOT_FOUND"),
        ("su: user nix does not exist", NotFoundError, "USER_NOT_FOUND"),
        ("sh: 5: tar: not found", DeniedError, "GUEST_TOOL_MISSING"),
        ("cat: x: Input/output error", FailedError, "FILE_FAILED"),
        ("", FailedError, "FILE_FAILED"),
        # A name may hold anything, the words of others too.
        ("cat: '/invalid user: x': Input/output error", FailedError, "FILE_FAILED"),
        ("a warning\ncat: /x: No such file or directory\nmore", NotFoundError, "FILE_NOT_FOUND"),
    ],
)  # fmt: skip
def test_the_guests_words_become_errors(words: str, kind: type[Exception], reason: str) -> None:
    error = failure(Ended(1, words.encode()), b"/a\xff b")
    assert type(error) is kind
    assert error.reason == reason
    assert error.message.startswith("/a\\xff b: ")
    assert error.metadata["path"] == "/a\\xff b"


def test_a_program_that_is_not_there() -> None:
    assert failure(Ended(127, b""), b"/x").reason == "GUEST_TOOL_MISSING"


def test_the_guests_words_are_cut() -> None:
    error = failure(Ended(1, b"\xff" * 100_000), b"/x")
    assert len(error.message) < 500


def test_what_a_path_may_be() -> None:
    for path in (b"/", b"/a\nb", b"/\xff", b"/" + b"x" * 4094):
        assert check_path(path) == path
    for path in (b"", b"a", b"./a", b"~/a", b"/a\0b", b"/" + b"x" * 4095):
        with pytest.raises(InvalidArgumentError):
            check_path(path)
    for path in (b"/", b"//", b"/.", b"/a/..", b"/../.", b"///"):
        with pytest.raises(InvalidArgumentError):
            check_removable(path)
    assert check_removable(b"/a/../b") == b"/a/../b"


def test_modes_and_owners() -> None:
    assert (check_mode(None), check_mode(0), check_mode(0o4755)) == (b"", b"0000", b"4755")
    for mode in (-1, 0o10000):
        with pytest.raises(InvalidArgumentError):
            check_mode(mode)
    found = [check_owner(*each) for each in (("", ""), ("a", ""), ("", "b"), ("1", "b-c"))]
    assert found == [b"", b"a", b":b", b"1:b-c"]
    for owner in ("a b", "-R", "a:b", "$(x)", "ä"):
        with pytest.raises(InvalidArgumentError):
            check_owner(owner, "")
        with pytest.raises(InvalidArgumentError):
            check_owner("", owner)


def test_a_line_of_stat_is_read_strictly() -> None:
    info = parse_stat(b"81a4 49 0 65534 1700000000", b"/x")
    assert info is not None
    assert (info.mode, info.size, info.gid, info.modified) == (0o100644, 49, 65534, 1700000000)
    for text in (b"", b"x", b"81a4 49 0 0", b"81a4 -1 0 0 0", b"81a4 1 0 0 0 0", b"81a4 1 0 0 x"):
        assert parse_stat(text, b"/x") is None
    late = parse_stat(b"0 1 0 0 9999999999999999999", b"/x")
    assert late is not None
    assert late.modified == 253402300799


@pytest.mark.parametrize("user", ["a b", "-x", "a;b", "$(id)", "a\n", "ü"])
def test_a_users_name_is_no_command(user: str) -> None:
    with pytest.raises(InvalidArgumentError):
        line("true", user=user)


def test_differences_between_two_looks() -> None:
    folder, file = (stat.S_IFDIR | 0o755, 0, 0, 0, 0), (stat.S_IFREG | 0o644, 0, 0, 5, 100)
    newer = (*file[:4], 101)
    before = {b"": folder, b"a": folder, b"a/f": file, b"same": file, b"kind": file, b"w": file}
    now = {b"": folder, b"n": folder, b"n/f": file, b"same": file, b"kind": folder, b"w": newer}
    told = [(change.type, change.path, change.directory) for change in differences(before, now)]
    assert told == [
        (ChangeType.REMOVED, b"a/f", False),
        (ChangeType.REMOVED, b"a", True),
        (ChangeType.REMOVED, b"kind", False),
        (ChangeType.CREATED, b"kind", True),
        (ChangeType.CREATED, b"n", True),
        (ChangeType.CREATED, b"n/f", False),
        (ChangeType.CHANGED, b"w", False),
    ]
    assert differences(now, now) == []
    assert Change(type=ChangeType.OVERFLOW).path == b""


# The scripts, in shells that are here: dash is the tiny guest's, bash and busybox are others'.


def have(shell: list[str]) -> list[str]:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"there is no {shell[0]} here")
    return shell


def ran(
    shell: list[str], script: str, *words: bytes, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command: list[str | bytes] = [*shell, "-c", script, "sh", *words]
    return subprocess.run(command, input=data, capture_output=True, check=False, timeout=30)


NAMES = [b"plain", b"a b", b"new\nline", b"line\n", b"\xff\xfe", b"'\"$(id)`id`\\", b"-rf", b"*"]


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: str(shell[0]))
@pytest.mark.parametrize("name", NAMES)
def test_scripts_take_any_name(shell: list[str], name: bytes, tmp_path: Path) -> None:
    have(shell)
    path = os.fsencode(tmp_path) + b"/" + name
    mark = b"m" * scripts.MARK_BYTES
    words = (path, b"replace", b"", b"1000", b"", mark)
    done = ran(shell, scripts.WRITE, *words, data=b"\0content\n\xff" + mark)
    info = parse_stat(done.stdout.rstrip(b"\n"), path)
    assert info is not None, done
    assert (info.mode & 0o777, info.size, info.modified) == (0o644, 10, 1000)
    done = ran(shell, scripts.READ, path, b"1", b"7")
    head, _, rest = done.stdout.partition(b"\n")
    assert parse_stat(head, path) == info
    assert rest == b"content"
    moved = path + b"2"
    assert ran(shell, scripts.MOVE, path, moved, b"").returncode == 0
    assert ran(shell, scripts.SYMLINK, path, b"x" + name).returncode == 0
    assert os.readlink(path) == b"x" + name  # noqa: PTH115 (bytes)
    assert ran(shell, scripts.CHANGE, moved, b"0700", b"", b"1").returncode == 0
    assert os.stat(moved).st_mode & 0o777 == 0o700  # noqa: PTH116 (bytes)
    assert ran(shell, scripts.REMOVE, path, b"").returncode == 0
    assert ran(shell, scripts.REMOVE, moved, b"1").returncode == 0
    assert ran(shell, scripts.MAKE_DIRECTORY, path + b"/d", b"0700", b"1").returncode == 0
    assert failure(_ended(ran(shell, scripts.REMOVE, path, b"")), path).reason == (
        "DIRECTORY_NOT_EMPTY"
    )
    kind = ran(shell, scripts.KIND, path).stdout
    assert kind == b"d" + path
    assert ran(shell, scripts.REMOVE, path, b"1").returncode == 0
    assert list(tmp_path.iterdir()) == []


def _ended(done: subprocess.CompletedProcess[bytes]) -> Ended:
    return Ended(done.returncode, done.stderr)


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: str(shell[0]))
def test_without_its_mark_nothing_comes_of_a_write(shell: list[str], tmp_path: Path) -> None:
    have(shell)
    path = os.fsencode(tmp_path / "f")
    mark = b"m" * scripts.MARK_BYTES
    for how in (b"replace", b"create"):
        for data in (b"", b"half of it", b"x" * 100, mark[1:], mark + b"x"):
            done = ran(shell, scripts.WRITE, path, how, b"", b"", b"", mark, data=data)
            assert done.returncode == scripts.BROKEN_OFF
            assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").write_bytes(b"before")
    (tmp_path / "f").chmod(0o751)
    done = ran(shell, scripts.WRITE, path, b"replace", b"", b"", b"", mark, data=b"half")
    assert done.returncode == scripts.BROKEN_OFF
    assert (tmp_path / "f").read_bytes() == b"before"
    done = ran(shell, scripts.WRITE, path, b"replace", b"", b"", b"", mark, data=b"after" + mark)
    assert done.returncode == 0
    assert (tmp_path / "f").read_bytes() == b"after"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o751
    done = ran(shell, scripts.WRITE, path, b"create", b"", b"", b"", mark, data=mark)
    assert failure(_ended(done), path).reason == "FILE_EXISTS"
    assert [each.name for each in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: str(shell[0]))
def test_scripts_say_why(shell: list[str], tmp_path: Path) -> None:
    have(shell)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "fifo")
    mark = b"m" * scripts.MARK_BYTES

    def reason(script: str, name: str, *words: bytes, data: bytes = b"") -> str:
        path = os.fsencode(tmp_path) + b"/" + name.encode()
        return failure(_ended(ran(shell, script, path, *words, data=data)), path).reason

    for name, expected in (
        ("none", "FILE_NOT_FOUND"),
        ("nowhere", "FILE_NOT_FOUND"),
        ("folder", "IS_A_DIRECTORY"),
        ("file/x", "NOT_A_DIRECTORY"),
        ("fifo", "FILE_FAILED"),
    ):
        assert reason(scripts.READ, name, b"0", b"") == expected, name
    for name, expected in (
        ("none/x", "FILE_NOT_FOUND"),
        ("folder", "IS_A_DIRECTORY"),
        ("file/x", "NOT_A_DIRECTORY"),
        ("x" * 256, "INVALID_ARGUMENT"),
    ):
        for how in (b"replace", b"create", b"truncate", b"append"):
            words = (how, b"", b"", b"", mark)
            assert reason(scripts.WRITE, name, *words, data=mark) == expected, (name, how)
    for name, expected in (
        ("none", "FILE_NOT_FOUND"),
        ("nowhere", "FILE_NOT_FOUND"),
        ("file", "NOT_A_DIRECTORY"),
    ):
        assert reason(scripts.PACK, name) == expected, name
    assert reason(scripts.UNPACK, "file") in ("NOT_A_DIRECTORY", "FILE_EXISTS")
    assert reason(scripts.MAKE_DIRECTORY, "file", b"", b"") == "FILE_EXISTS"
    assert reason(scripts.SYMLINK, "folder", b"x") == "FILE_EXISTS"
    assert reason(scripts.REMOVE, "none", b"1") == "FILE_NOT_FOUND"
    assert reason(scripts.CHANGE, "none", b"0600", b"", b"") == "FILE_NOT_FOUND"
    assert reason(scripts.CHANGE, "file", b"", b"no-such-user", b"") == "USER_NOT_FOUND"
    assert reason(scripts.KIND, "nowhere") == "FILE_NOT_FOUND"


async def test_a_killed_write_leaves_nothing(tmp_path: Path) -> None:
    """As when the guest's sshd ends the session's process group."""
    path = os.fsencode(tmp_path / "f")
    words = (path, b"replace", b"", b"", b"", b"m" * scripts.MARK_BYTES)
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", scripts.WRITE, "sh", *words,
        stdin=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(b"x" * 100_000)
    await process.stdin.drain()
    async with asyncio.timeout(30):
        while not any(each.stat().st_size == 100_000 for each in tmp_path.iterdir()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    os.killpg(process.pid, 15)
    assert await process.wait() == scripts.BROKEN_OFF
    assert list(tmp_path.iterdir()) == []
