"""Exports and imports as the SDK and the command line do them: files, parts of files, pipes."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    InvalidArchiveError,
    InvalidArgumentError,
    MissingBaseError,
    ResumeMismatchError,
    TrustRequiredError,
)
from stratabox.storage.files.transfer import archive
from stratabox.v1 import records_pb2, transfers_pb2

DIGEST = b"d" * 32
NOISE = random.Random(4).randbytes(9000)
PREAMBLE = archive.PREAMBLE.pack(archive.MAGIC, archive.VERSION, 10, DIGEST) + b"0123456789"
BLOCKS = [archive.pack_block(0, number, NOISE[: number * 1000]) for number in (1, 5, 9)]
ENDS = [archive.Digest(archive.Unit.FILE, 1).end(member) for member in (0, 1)]
TRAILER = archive.trailer(DIGEST, ENDS).pack()
PIECES = [
    PREAMBLE, *(block.pack() + block.stored for block in BLOCKS), *(end.pack() for end in ENDS),
    TRAILER,
]  # fmt: skip
WHOLE = b"".join(PIECES)


def responses(*pieces: bytes) -> list[transfers_pb2.ExportResponse]:
    return [
        transfers_pb2.ExportResponse(data=piece, done_bytes=number, total_bytes=len(pieces))
        for number, piece in enumerate(pieces, 1)
    ]


def test_an_export_becomes_a_file(daemon: Any, client: Client, tmp_path: Path) -> None:
    daemon.answers["ExportSnapshot"] = responses(*PIECES)
    seen: list[tuple[int, int]] = []
    path = tmp_path / "a.sbx"
    result = client.snapshots.export(
        "x", path, since="y", memory=True, env=True, progress=lambda *of: seen.append(of)
    )
    sent = daemon.last("ExportSnapshot")
    assert (sent.snapshot, sent.since, sent.memory, sent.env) == ("x", "y", True, True)
    assert not sent.HasField("resume")
    assert path.read_bytes() == WHOLE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert seen == [(number, len(PIECES)) for number in range(1, len(PIECES) + 1)]
    assert (result.path, result.archive_bytes) == (path, len(WHOLE))
    assert (result.content_bytes, result.resumed_bytes) == (len(PIECES), 0)
    assert [each.name for each in tmp_path.iterdir()] == ["a.sbx"]


@pytest.mark.parametrize(
    ("received", "kept", "member", "block"),
    [
        (len(PREAMBLE), 1, 0, 0),
        (len(b"".join(PIECES[:2])), 2, 0, 2),
        (len(b"".join(PIECES[:3])), 3, 0, 6),
        (len(b"".join(PIECES[:3])) + 40, 3, 0, 6),
        (len(b"".join(PIECES[:3])) + 100, 3, 0, 6),
        (len(b"".join(PIECES[:4])), 4, 0, 10),
        (len(b"".join(PIECES[:5])), 5, 1, 0),
        (len(b"".join(PIECES[:6])), 6, 2, 0),
        (len(WHOLE) - 1, 6, 2, 0),
        (len(WHOLE), 6, 2, 0),
    ],
)
def test_it_goes_on_behind_the_last_whole_block(
    daemon: Any, client: Client, tmp_path: Path, received: int, kept: int, member: int, block: int
) -> None:
    path = tmp_path / "a.sbx"
    path.with_name("a.sbx.part").write_bytes(WHOLE[:received])
    daemon.answers["ExportImage"] = responses(*PIECES[kept:])
    result = client.images.export("x", path)
    resume = daemon.last("ExportImage").resume
    assert (resume.manifest_sha256, resume.member, resume.block) == (DIGEST, member, block)
    assert path.read_bytes() == WHOLE
    assert result.resumed_bytes == len(b"".join(PIECES[:kept]))


@pytest.mark.parametrize("received", [0, 5, 47, len(PREAMBLE) - 1])
def test_less_than_the_manifest_is_begun_again(
    daemon: Any, client: Client, tmp_path: Path, received: int
) -> None:
    path = tmp_path / "a.sbx"
    path.with_name("a.sbx.part").write_bytes(WHOLE[:received])
    daemon.answers["ExportImage"] = responses(*PIECES)
    client.images.export("x", path)
    assert not daemon.last("ExportImage").HasField("resume")
    assert path.read_bytes() == WHOLE


def test_what_is_there_is_not_touched(
    daemon: Any, client: Client, make: Any, tmp_path: Path
) -> None:
    path, part = tmp_path / "a.sbx", tmp_path / "a.sbx.part"
    path.write_bytes(b"precious")
    with pytest.raises(InvalidArgumentError, match="there already"):
        client.snapshots.export("x", path)
    assert not part.exists()
    path.unlink()
    part.write_bytes(b"precious")
    with pytest.raises(InvalidArgumentError, match="remove it"):
        client.snapshots.export("x", path)
    assert part.read_bytes() == b"precious"
    part.write_bytes(WHOLE[:-5])
    daemon.answers["ExportSnapshot"] = [make.refusal(grpc.StatusCode.ABORTED, "RESUME_MISMATCH")]
    with pytest.raises(ResumeMismatchError):
        client.snapshots.export("x", path)
    assert part.read_bytes() == WHOLE[:-5]


def test_two_do_not_write_one_part(daemon: Any, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "a.sbx"

    def again(done: int, total: int) -> None:
        with pytest.raises(InvalidArgumentError, match="another export"):
            client.snapshots.export("x", path)

    daemon.answers["ExportSnapshot"] = responses(*PIECES)
    client.snapshots.export("x", path, progress=again)
    assert path.read_bytes() == WHOLE


def test_a_file_system_without_links(
    daemon: Any, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as exFAT does

    monkeypatch.setattr(os, "link", refuse)
    daemon.answers["ExportSnapshot"] = responses(*PIECES)
    client.snapshots.export("x", tmp_path / "a.sbx")
    assert [path.name for path in tmp_path.iterdir()] == ["a.sbx"]
    assert (tmp_path / "a.sbx").read_bytes() == WHOLE


def test_a_refusal_leaves_no_part(daemon: Any, client: Client, make: Any, tmp_path: Path) -> None:
    daemon.answers["ExportSnapshot"] = [
        make.refusal(grpc.StatusCode.NOT_FOUND, "SNAPSHOT_NOT_FOUND")
    ]
    with pytest.raises(Exception, match="no, because"):
        client.snapshots.export("x", tmp_path / "a.sbx")
    assert list(tmp_path.iterdir()) == []


def test_an_import_sends_the_file(daemon: Any, client: Client, make: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.sbx"
    path.write_bytes(WHOLE * 3000)
    daemon.answers["ImportSnapshot"] = transfers_pb2.ImportSnapshotResponse(
        snapshot=make.snapshot(),
        left_out=records_pb2.Failure(reason="TRUST_REQUIRED", message="it was left out"),
    )
    seen: list[tuple[int, int]] = []
    result = client.snapshots.import_file(
        path, name="n", trust=True, progress=lambda *of: seen.append(of)
    )
    header, *parts = daemon.last("ImportSnapshot")
    assert (header.header.name, header.header.trust) == ("n", True)
    assert b"".join(part.data for part in parts) == path.read_bytes()
    assert max(len(part.data) for part in parts) <= 2 << 20
    assert seen[-1] == (path.stat().st_size,) * 2
    assert result.snapshot.id == make.snapshot_id
    assert isinstance(result.left_out, TrustRequiredError)

    opened = io.BytesIO(b"skip" + WHOLE)
    opened.seek(4)
    daemon.answers["ImportImageArchive"] = make.image()
    assert client.images.import_archive(opened).id == make.image_id
    header, *parts = daemon.last("ImportImageArchive")
    assert header.header.name == ""
    assert b"".join(part.data for part in parts) == WHOLE
    for reason, kind in (
        ("INVALID_ARCHIVE", InvalidArchiveError),
        ("MISSING_BASE", MissingBaseError),
    ):
        daemon.answers["ImportSnapshot"] = make.refusal(grpc.StatusCode.UNKNOWN, reason)
        with pytest.raises(kind):
            client.snapshots.import_file(path)
    with pytest.raises(FileNotFoundError):
        client.snapshots.import_file(tmp_path / "none")


async def test_the_asynchronous_face(daemon: Any, make: Any, tmp_path: Path) -> None:
    daemon.answers |= {
        "ExportSnapshot": responses(*PIECES),
        "ImportSnapshot": transfers_pb2.ImportSnapshotResponse(snapshot=make.snapshot()),
    }
    async with AsyncClient(daemon.address, timeout=20) as client:
        result = await client.snapshots.export("x", tmp_path / "a.sbx")
        assert result.path is not None
        assert result.path.read_bytes() == WHOLE
        came = await client.snapshots.import_file(result.path)
        assert (came.snapshot.id, came.left_out) == (make.snapshot_id, None)
        daemon.answers["ExportSnapshot"] = [
            make.refusal(grpc.StatusCode.ABORTED, "RESUME_MISMATCH")
        ]
        with pytest.raises(ResumeMismatchError):
            await client.snapshots.export("x", tmp_path / "b.sbx")


def test_the_command_line(daemon: Any, run: Any, make: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.sbx"
    daemon.answers |= {
        "ExportSnapshot": responses(*PIECES),
        "ExportImage": responses(*PIECES),
        "ImportSnapshot": transfers_pb2.ImportSnapshotResponse(
            snapshot=make.snapshot(),
            left_out=records_pb2.Failure(reason="TRUST_REQUIRED", message="it was left out"),
        ),
        "ImportImageArchive": make.image(),
    }
    result = run("sandbox", "snapshot", "export", "x", str(path), "--since", "y", "--memory")
    assert f"wrote {path}: " in result.stdout
    assert run("snapshot", "export", "x", str(path)).exit_code == 2
    result = run("image", "export", "x", "-")
    assert result.stdout_bytes == WHOLE
    result = run("snapshot", "import", str(path), "--name", "n")
    assert "it was left out (--trust)" in result.stderr
    told = json.loads(run("snapshot", "import", str(path), "--json").stdout)
    assert told["left_out"]["reason"] == "TRUST_REQUIRED"
    assert told["snapshot"]["id"] == make.snapshot_id
    result = run("image", "import", str(path), "--format", "archive", "--json")
    assert json.loads(result.stdout)["id"] == make.image_id
    # No disk is taken for an archive, and no archive for a disk, because of what is in it.
    assert run("image", "import", str(path), "--name", "x").exit_code == 2
    assert run("image", "import", "-", "--name", "x", "--format", "raw").exit_code == 2
