"""Tenki's words for what is in guests: paths, git's command lines, how commands ended."""

from __future__ import annotations

import signal

import pytest

from stratabox.daemon.hypervisor.guest.exec_wire import Ended, Flag, Listener, Room, new_token
from stratabox.daemon.tenki import git
from stratabox.daemon.tenki.data_plane_run import exited, signal_name
from stratabox.daemon.tenki.guest_paths import absolute, path_from
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.tenki.v1 import data_plane_pb2 as pb

ROOM = Room(total=1000, available=700, least=300, free=800)


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("", "/home/tenki"),
        (".", "/home/tenki"),
        ("app/main.py", "/home/tenki/app/main.py"),
        ("/etc/hosts", "/etc/hosts"),
        ("~/x", "/home/tenki/~/x"),
    ],
)
def test_paths_begin_at_home(given: str, path: str) -> None:
    assert absolute(given) == path


def test_a_file_has_a_name() -> None:
    assert path_from("ü") == "/home/tenki/ü".encode()
    with pytest.raises(InvalidArgumentError):
        path_from("")


@pytest.mark.parametrize(
    ("ended", "wanted"),
    [
        (Ended(0, 0, Flag(0), 1.5), (0, "", False, "exit")),
        (Ended(0, signal.SIGTERM, Flag.TIMED_OUT, 1.0), (143, "terminated", True, "timeout")),
        (Ended(7, 0, Flag.TIMED_OUT, 1.0), (7, "", True, "timeout")),
        (Ended(0, signal.SIGKILL, Flag.KILLED, 1.0), (137, "killed", False, "signaled")),
        (Ended(0, 9, Flag.OUT_OF_MEMORY, 1.0), (137, "killed", False, "out_of_memory")),
        (Ended(0, 64, Flag(0), 1.0), (192, "signal 64", False, "signaled")),
    ],
)
def test_an_end_is_told(ended: Ended, wanted: tuple[object, ...]) -> None:
    told = exited(ended, ROOM)
    assert (told.exit_code, told.signal, told.timed_out, told.reason) == wanted
    assert told.duration_ms == int(ended.duration * 1000)
    sizes = (told.disk_total_bytes, told.disk_available_bytes, told.disk_min_available_bytes)
    assert (*sizes, told.disk_free_bytes) == (1000, 700, 300, 800)


def test_a_disk_that_was_full_had_no_room() -> None:
    assert exited(Ended(1, 0, Flag.DISK_FULL, 1.0), ROOM).disk_min_available_bytes == 0
    assert exited(Ended(0, 0, Flag(0), 1.0), None) == pb.RunExit(duration_ms=1000, reason="exit")
    assert signal_name(0) == ""


def test_the_keeper_tells_how_much_room_there_was() -> None:
    token = new_token()
    words = token + b"D" + b"".join(b"%016x" % number for number in (1, 2, 3, (1 << 64) - 1))
    assert Listener(token).feed(b"out" + words) == [b"out", Room(1, 2, 3, (1 << 63) - 1)]


@pytest.mark.parametrize(
    ("operation", "args", "words"),
    [
        ("clone", {"repo": "https://x.test/a/b.git"},
         ["/home/tenki/b", "clone", "--", "https://x.test/a/b.git", "/home/tenki/b"]),
        ("clone", {"repo": "r", "branch": "main", "depth": "1", "directory": "/srv/r"},
         ["/srv/r", "clone", "--branch", "main", "--depth", "1", "--", "r", "/srv/r"]),
        ("clone", {"repo": "--upload-pack=x/y"},
         ["/home/tenki/y", "clone", "--", "--upload-pack=x/y", "/home/tenki/y"]),
        ("checkout", {"ref": "v1"}, ["", "checkout", "v1", "--"]),
        ("checkout", {"ref": "new", "create": "true", "directory": "app"},
         ["/home/tenki/app", "checkout", "-b", "new", "--"]),
        ("diff", {"base": "a", "head": "b", "path": "-p"},
         ["", "diff", "--no-color", "a", "b", "--", "-p"]),
        ("diff", {}, ["", "diff", "--no-color", "--"]),
        ("log", {"max_count": "3", "range": "a..b"},
         ["", "log", "--no-color", "--max-count=3", "a..b", "--"]),
    ],
)  # fmt: skip
def test_git_is_asked_for_it(operation: str, args: dict[str, str], words: list[str]) -> None:
    assert git.command(operation, args)[4:] == words


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        ("push", {}),
        ("clone", {}),
        ("clone", {"repo": "/"}),
        ("clone", {"repo": "a/.."}),
        ("clone", {"repo": "a", "depth": "-1"}),
        ("clone", {"repo": "a", "depth": "0"}),
        ("clone", {"repo": "a", "branch": "--output=/etc/passwd"}),
        ("checkout", {"ref": "-f"}),
        ("diff", {"range": "--output=/etc/passwd"}),
        ("diff", {"head": "--output=/etc/passwd"}),
        ("log", {"range": "--all"}),
        ("log", {"max_count": "²"}),
        ("log", {"unknown": "x"}),
    ],
)
def test_git_is_not_asked_for_what_cannot_be(operation: str, args: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError):
        git.command(operation, args)


def test_gits_failure_is_said_so_that_clients_see_it() -> None:
    words = "fatal: x\nerror: the connection was terminated\nfatal: y"
    assert git.failure("clone", pb.RunExit(exit_code=128), words).message == (
        "git clone failed (exit_code=128); check the repository, ref and access token:"
        " fatal: x\nfatal: y"
    )
