"""Files in guests as the SDK and the command line ask for them, and show them."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    FileChange,
    FileChangeType,
    FileKind,
    GuestFileNotFoundError,
    GuestNoSpaceError,
    InvalidArchiveError,
    InvalidArgumentError,
    WatchMethod,
)
from stratabox.client._copying import _download_folder
from stratabox.client._plans import Download
from stratabox.client._tar import Reader
from stratabox.client.cli.guest_paths import InGuest, guest_path
from stratabox.v1 import files_pb2 as pb

SIDE = "box:/srv/file"


def info(path: bytes = b"/srv/file", **fields: Any) -> pb.FileInfo:
    message = pb.FileInfo(path=path, kind=pb.FILE_KIND_REGULAR, size=3, mode=0o644, uid=1, gid=2)
    message.modified_at.seconds = 981_173_106
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def folder(path: bytes = b"/srv") -> pb.FileInfo:
    return info(path, kind=pb.FILE_KIND_DIRECTORY, mode=0o755)


def gone(make: Any) -> Any:
    return make.refusal(grpc.StatusCode.NOT_FOUND, "FILE_NOT_FOUND")


def parts(messages: list[Any]) -> list[str]:
    return [message.WhichOneof("part") for message in messages]


def test_a_write_ends_with_its_end(daemon: Any, client: Client) -> None:
    daemon.answers["WriteFile"] = lambda request: info()
    wrote = client.files.write(
        "box", b"/\xff", b"x" * 600_000, write_mode="create", mode=0o600, parents=True, user="bob"
    )
    first, *rest, last = daemon.last("WriteFile")
    header = first.header
    assert (header.sandbox, header.path, header.user) == ("box", b"/\xff", "bob")
    assert (header.write_mode, header.mode, header.parents) == (pb.WRITE_MODE_CREATE, 0o600, True)
    assert not header.HasField("modified_at")
    assert b"".join(message.data for message in rest) == b"x" * 600_000
    assert max(len(message.data) for message in rest) <= 2 << 20
    assert last.end
    assert (wrote.kind, wrote.mode, wrote.name) == (FileKind.REGULAR, 0o644, "file")
    assert wrote.modified_at == datetime(2001, 2, 3, 4, 5, 6, tzinfo=UTC)
    given: tuple[tuple[Any, bytes], ...] = (
        ("ü", "ü".encode()),
        (io.BytesIO(b"file"), b"file"),
        (iter([b"a", b"", b"b"]), b"ab"),
        (bytearray(b"array"), b"array"),
        (b"", b""),
    )
    for data, expected in given:
        client.files.write("box", "/x", data)
        sent = daemon.last("WriteFile")
        assert b"".join(message.data for message in sent) == expected
        assert parts(sent)[0] == "header"
        assert parts(sent)[-1] == "end"


def test_what_cannot_be_read_here_never_has_an_end(daemon: Any, client: Client) -> None:
    def broken() -> Any:
        yield b"some"
        raise OSError("the disk failed")

    daemon.answers["WriteFile"] = lambda request: info()
    with pytest.raises(OSError, match="the disk failed"):
        client.files.write("box", "/x", broken())


def test_reading_and_listing(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["ReadFile"] = [
        pb.ReadFileResponse(info=info()), pb.ReadFileResponse(data=b"ab"),
        pb.ReadFileResponse(data=b"c"),
    ]  # fmt: skip
    assert client.files.read("box", "/x", offset=1, length=0) == b"abc"
    sent = daemon.last("ReadFile")
    assert (sent.offset, sent.HasField("length"), sent.length) == (1, True, 0)
    assert list(client.files.stream("box", Path("/x"))) == [b"", b"ab", b"c"]
    assert not daemon.last("ReadFile").HasField("length")
    pages = [[info(b"b"), info(b"\xff")], [info(b"a")]]
    daemon.answers["ListFiles"] = [pb.ListFilesResponse(files=page) for page in pages]
    assert [one.path for one in client.files.list("box", "/")] == [b"a", b"b", b"\xff"]
    assert [one.path for one in client.files.list("box", "/", limit=1)] == [b"b"]
    assert [len(page) for page in client.files.iterate("box", "/")] == [2, 1]
    daemon.answers["StatFile"] = gone(make)
    with pytest.raises(GuestFileNotFoundError):
        client.files.stat("box", "/x", follow=False)
    assert not daemon.last("StatFile").follow
    daemon.answers["WriteFile"] = make.refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "GUEST_NO_SPACE")
    with pytest.raises(GuestNoSpaceError):
        client.files.write("box", "/x", b"")
    with pytest.raises(InvalidArgumentError):
        client.files.read("box", "/x", offset=-1)
    with pytest.raises(InvalidArgumentError):
        client.files.write("box", "/x", b"", write_mode="sideways")


def test_upload_as_cp_does(daemon: Any, client: Client, make: Any, tmp_path: Path) -> None:
    source = tmp_path / "name"
    source.write_bytes(b"abc")
    source.chmod(0o750)
    os.utime(source, (1000, 1000))
    daemon.answers["WriteFile"] = lambda request: info()
    for there, asked, expected in (
        (gone(make), "/new", b"/new"),
        (info(), "/file", b"/file"),
        (folder(), "/srv", b"/srv/name"),
        (folder(), "/", b"/name"),
        (gone(make), "/no/", b"/no/name"),
    ):
        daemon.answers["StatFile"] = there
        client.files.upload("box", source, asked)
        header = daemon.last("WriteFile")[0].header
        assert (header.path, header.mode) == (expected, 0o750)
        assert header.modified_at.seconds == 1000
    daemon.answers["WriteArchive"] = lambda request: pb.WriteArchiveResponse(warnings=["a remark"])
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "f").write_bytes(b"x")
    for there, local, asked, expected, itself in (
        (gone(make), tree, "/new", b"/new", True),
        (folder(), tree, "/srv", b"/srv/tree", True),
        (folder(), f"{tree}/", "/srv", b"/srv/tree", True),
        (folder(), f"{tree}/.", "/srv", b"/srv", False),
        (gone(make), f"{tree}/.", "/new", b"/new", True),
        (folder(), f"{tree}/../tree/..", "/srv", b"/srv", False),
    ):
        daemon.answers["StatFile"] = there
        if str(local).endswith(".."):
            (tmp_path / "name").unlink()
        result = client.files.upload("box", local, asked, recursive=True)
        header, *rest = daemon.last("WriteArchive")
        assert header.header.path == expected
        with tarfile.open(fileobj=io.BytesIO(b"".join(part.data for part in rest))) as tar:
            assert ("." in tar.getnames()) == itself
        assert result.warnings == ("a remark",)


def test_a_download_that_is_broken_off_leaves_nothing(
    daemon: Any, client: Client, make: Any, tmp_path: Path
) -> None:
    daemon.answers["StatFile"] = info()
    failure = make.refusal(grpc.StatusCode.UNAVAILABLE, "CHANNEL_UNAVAILABLE")
    daemon.answers["ReadFile"] = [
        pb.ReadFileResponse(info=info()), pb.ReadFileResponse(data=b"ab"), failure,
    ]  # fmt: skip
    (tmp_path / "old").write_bytes(b"as it was")
    for name in ("new", "old"):
        with pytest.raises(Exception, match="no, because"):
            client.files.download("box", "/srv/file", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"as it was"
    daemon.answers["ReadFile"].pop()
    seen: list[tuple[int, int]] = []
    client.files.download("box", "/srv/file", tmp_path, progress=lambda *of: seen.append(of))
    found = (tmp_path / "file").stat()
    assert (found.st_size, found.st_mode & 0o777, int(found.st_mtime)) == (2, 0o644, 981_173_106)
    assert seen == [(2, 3)]
    with pytest.raises(InvalidArchiveError, match="more than 1 bytes"):
        client.files.download("box", "/srv/file", tmp_path / "new", limit=1)
    daemon.answers["StatFile"] = folder()
    for answers, words in (
        ([pb.ReadArchiveResponse(data=b"\0" * 512)], "has no end"),
        ([pb.ReadArchiveResponse(result=pb.ReadArchiveResult())], "ends in the middle"),
    ):
        daemon.answers["ReadArchive"] = answers
        with pytest.raises(InvalidArchiveError, match=words):
            client.files.download("box", "/srv", tmp_path / words, recursive=True)


async def test_the_asynchronous_face(daemon: Any, make: Any, tmp_path: Path) -> None:
    daemon.answers |= {
        "StatFile": gone(make),
        "WriteFile": lambda request: info(),
        "WatchFiles": [
            pb.WatchFilesResponse(method=pb.WATCH_METHOD_POLLING),
            pb.WatchFilesResponse(
                change=pb.FileChange(
                    type=pb.FILE_CHANGE_TYPE_MOVED, path=b"/b", old_path=b"/a", directory=True
                )
            ),
        ],
    }
    (tmp_path / "f").write_bytes(b"content")
    async with AsyncClient(daemon.address, timeout=20) as client:
        # What a plan raises is told to the script that asked for it.
        result = await client.files.upload("box", tmp_path / "f", "/new")
        assert result.size_bytes == 7
        told = [one async for one in client.files.watch("box", "/")]
    assert told == [
        WatchMethod.POLLING,
        FileChange(type=FileChangeType.MOVED, path=b"/b", old_path=b"/a", directory=True),
    ]


def test_what_names_a_file_in_a_guest() -> None:
    assert guest_path("box:/a:b\n") == InGuest("box", "/a:b\n")
    for text in ("/a:/b", "./box:/a", "plain", "-", "a/b:/c"):
        assert guest_path(text) is None
    for text in ("box:", "box:a", "box:./a"):
        with pytest.raises(ValueError, match="is absolute"):
            guest_path(text)


def test_the_command_line(daemon: Any, run: Any, make: Any, tmp_path: Path) -> None:
    daemon.answers |= {
        "StatFile": lambda request: folder(request.path),
        "ListFiles": [
            pb.ListFilesResponse(
                files=[info(b"\xff\n\x1b"), folder(b"d"), info(b"l", kind=pb.FILE_KIND_SYMLINK)]
            )
        ],
    }
    shown = run("sandbox", "files", "ls", "box:/srv").stdout
    assert "drwxr-xr-x  1:2    3     2001-02-03T04:05:06Z  d" in shown
    assert "\\xff\\n\\x1b" in shown
    told = json.loads(run("sandbox", "files", "ls", "box:/srv", "--json").stdout)
    assert told["files"][2]["path_base64"] == "/wob"
    assert [one["kind"] for one in told["files"]] == ["directory", "symlink", "regular"]
    assert "mode         drwxr-xr-x" in run("sandbox", "files", "stat", "box:/srv").stdout
    daemon.answers["WatchFiles"] = [
        pb.WatchFilesResponse(method=pb.WATCH_METHOD_INOTIFY),
        pb.WatchFilesResponse(change=pb.FileChange(type=pb.FILE_CHANGE_TYPE_CREATED, path=b"/a\n")),
        pb.WatchFilesResponse(change=pb.FileChange(type=pb.FILE_CHANGE_TYPE_OVERFLOW)),
    ]
    result = run("sandbox", "files", "watch", "box:/", "-r")
    assert result.stdout.splitlines()[0] == "created   /a\\n"
    assert "watching by inotify" in result.stderr
    lines = run("sandbox", "files", "watch", "box:/", "--json").stdout.splitlines()
    assert json.loads(lines[0]) == {"method": "inotify"}
    assert json.loads(lines[1])["type"] == "created"
    daemon.answers["ChangeFile"] = info()
    assert run("sandbox", "files", "chmod", "-r", "0750", SIDE).exit_code == 0
    assert (daemon.last("ChangeFile").mode, daemon.last("ChangeFile").recursive) == (0o750, True)
    assert run("sandbox", "files", "chown", "bob:7", SIDE).exit_code == 0
    assert (daemon.last("ChangeFile").owner, daemon.last("ChangeFile").group) == ("bob", "7")
    assert run("sandbox", "files", "chmod", "999", SIDE).exit_code == 2
    daemon.answers["ReadFile"] = [pb.ReadFileResponse(data=b"\0\xff")]
    assert run("sandbox", "files", "cat", SIDE).stdout_bytes == b"\0\xff"
    assert run("sandbox", "cp", SIDE, "-").stdout_bytes == b"\0\xff"
    daemon.answers["WriteFile"] = lambda request: info()
    assert run("sandbox", "cp", "-", SIDE, input=b"in").exit_code == 0
    assert parts(daemon.last("WriteFile")) == ["header", "data", "end"]
    assert run("sandbox", "cp", "a", "b").exit_code == 2
    assert run("sandbox", "cp", "box:a", "b").exit_code == 2
    assert run("sandbox", "files", "rm", "plain").exit_code == 2
    assert run("sandbox", "cp", "box:/srv", str(tmp_path)).exit_code == 4
    daemon.answers["StatFile"] = gone(make)
    assert run("sandbox", "cp", SIDE, str(tmp_path)).exit_code == 3
    daemon.answers["RemoveFile"] = pb.RemoveFileResponse()
    gone_now = json.loads(run("sandbox", "files", "rm", "-r", SIDE, "--json").stdout)
    assert gone_now == {"path": "/srv/file", "removed": True}


def test_files_are_not_closed_while_they_are_written(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who awaits may give up while a thread still takes a piece."""
    plan = _download_folder("box", "/srv", tmp_path / "out", None, False, None, None)
    assert isinstance(plan, Download)
    in_step, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def feed(reader: Reader, data: bytes) -> None:
        in_step.set()
        assert go_on.wait(20)
        order.append("written")

    monkeypatch.setattr(Reader, "feed", feed)
    writing = threading.Thread(target=plan.step, args=(pb.ReadArchiveResponse(data=b"x"),))
    writing.start()
    assert in_step.wait(20)

    def close() -> None:
        plan.close()
        order.append("closed")

    closing = threading.Thread(target=close)
    closing.start()
    go_on.set()
    writing.join(20)
    closing.join(20)
    plan.step(pb.ReadArchiveResponse(data=b"late"))
    assert order == ["written", "closed"]
