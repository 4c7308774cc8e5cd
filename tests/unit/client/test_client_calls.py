"""Calls over the wire: what is sent, what comes back, in both faces."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox.client import (
    AsyncClient,
    BuildProgress,
    Client,
    CommandFailedError,
    DeadlineExceededError,
    DiskFormat,
    ImageNotFoundError,
    InternalError,
    InvalidArgumentError,
    InvalidImageError,
    InvalidStateError,
    SandboxNotFoundError,
    SandboxState,
    SnapshotFailedError,
    SnapshotLevel,
    SnapshotNotFoundError,
    SnapshotState,
)
from stratabox.v1 import host_pb2, images_pb2, records_pb2, sandboxes_pb2, snapshots_pb2


def test_create_sends_what_is_given_and_nothing_else(
    daemon: Any, client: Client, make: Any
) -> None:
    daemon.answers["CreateSandbox"] = make.sandbox()
    client.sandboxes.create(
        image="debian",
        name="debugbox",
        cpus=2,
        env={"A": "1"},
        data_disks=[1, 2],
        ready_timeout=timedelta(seconds=1.5),
    )
    sent = daemon.last("CreateSandbox")
    assert sent.WhichOneof("source") == "image"
    assert sent.resources.cpus == 2
    assert not sent.resources.HasField("memory")
    assert sent.wait_for_ready is True
    assert sent.ready_timeout.ToMilliseconds() == 1500
    assert list(sent.data_disks) == [1, 2]
    client.sandboxes.create()
    bare = daemon.last("CreateSandbox")
    assert bare.WhichOneof("source") is None
    assert not bare.HasField("resources")
    assert not bare.HasField("ready_timeout")


def test_a_sandbox_is_read_whole(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["GetSandbox"] = make.sandbox()
    box = client.sandboxes.get("debugbox")
    assert (box.id, box.name, box.state) == (make.sandbox_id, "debugbox", SandboxState.RUNNING)
    assert box.state == "running"
    assert box.created_at == datetime(2026, 3, 20, 12, 0, 0, 250000, UTC)
    assert box.created_at.tzinfo is UTC
    assert box.started_at is None
    assert box.state_reason is None
    assert box.source_snapshot_id is None
    assert box.disks[0].size_bytes == 10 << 30
    assert box.machine is not None
    assert box.machine.machine_type == "pc-q35-7.2"
    assert box == client.sandboxes.get("debugbox")
    assert hash(box) == hash(client.sandboxes.get("debugbox"))


def test_a_state_of_a_newer_daemon_is_unknown(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["GetSandbox"] = make.sandbox(state=77)
    assert client.sandboxes.get("x").state is SandboxState.UNKNOWN


def test_what_cannot_be_sent_is_told_before(client: Client) -> None:
    bad: list[dict[str, Any]] = [
        {"cpus": 1 << 40},
        {"name": "\udc80"},
        {"ready_timeout": -1},
        {"ready_timeout": float("nan")},
        {"image": "a", "snapshot": "b"},
    ]
    for arguments in bad:
        with pytest.raises(InvalidArgumentError):
            client.sandboxes.create(**arguments)
    with pytest.raises(InvalidArgumentError, match="time zone"):
        client.sandboxes.snapshot("x", expires_at=datetime(2030, 1, 1))
    with pytest.raises(InvalidArgumentError, match="crash, application, memory"):
        client.sandboxes.snapshot("x", level="quantum")
    with pytest.raises(InvalidArgumentError, match="quick"):
        client.sandboxes.snapshot("x", level="application", quick=True)
    with pytest.raises(InvalidArgumentError):
        client.sandboxes.clone("x", count=0)


def test_lists_go_over_all_pages(daemon: Any, client: Client, make: Any) -> None:
    pages = [
        sandboxes_pb2.ListSandboxesResponse(sandboxes=[make.sandbox()], next_page_token="2"),
        sandboxes_pb2.ListSandboxesResponse(sandboxes=[make.sandbox(name="b")]),
    ]
    daemon.answers["ListSandboxes"] = list(pages)
    found = client.sandboxes.list(states=["paused", SandboxState.STOPPED], metadata={"k": "v"})
    assert [one.name for one in found] == ["debugbox", "b"]
    sent = daemon.last("ListSandboxes")
    assert sent.page_token == "2"
    assert list(sent.states) == [3, 4]
    assert dict(sent.metadata) == {"k": "v"}
    daemon.answers["ListSandboxes"] = list(pages)
    page = client.sandboxes.list_page(page_size=1)
    assert (len(page.items), page.next_page_token) == (1, "2")


def test_update_masks_what_is_given(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers |= {"UpdateSandbox": make.sandbox(), "UpdateSnapshot": make.snapshot()}
    client.sandboxes.update("x", env={}, tags=["t"])
    assert list(daemon.last("UpdateSandbox").update_mask.paths) == ["env", "tags"]
    client.snapshots.update("y", name="n")
    assert list(daemon.last("UpdateSnapshot").update_mask.paths) == ["name"]
    client.snapshots.update("y", expires_at=None)
    assert list(daemon.last("UpdateSnapshot").update_mask.paths) == ["expires_at"]
    assert not daemon.last("UpdateSnapshot").snapshot.HasField("expires_at")


def test_execute(daemon: Any, client: Client) -> None:
    reply = sandboxes_pb2.ExecuteCommandResponse(exit_code=0, stdout=b"\xff" * (16 << 20))
    reply.duration.FromMilliseconds(1500)
    daemon.answers["ExecuteCommand"] = reply
    result = client.sandboxes.execute("x", ["a", "b c"], cwd="/tmp", timeout=2)
    sent = daemon.last("ExecuteCommand")
    assert (list(sent.argv), sent.shell, sent.cwd) == (["a", "b c"], "", "/tmp")
    assert sent.timeout.seconds == 2
    assert result.ok
    assert result.check() is result
    assert result.signal is None
    assert len(result.stdout) == 16 << 20
    assert result.duration == timedelta(seconds=1.5)
    client.sandboxes.execute("x", "ls | wc")
    assert daemon.last("ExecuteCommand").shell == "ls | wc"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"exit_code": 3, "stderr": b"x\nboom\n"}, "exit code 3: boom"),
        ({"signal": 9}, "signal 9"),
        ({"signal": 9, "timed_out": True}, "time was up"),
    ],
)
def test_check(daemon: Any, client: Client, fields: dict[str, Any], says: str) -> None:
    daemon.answers["ExecuteCommand"] = sandboxes_pb2.ExecuteCommandResponse(**fields)
    with pytest.raises(CommandFailedError, match=says) as caught:
        client.sandboxes.execute("x", "false").check()
    assert not caught.value.result.ok


def test_a_sandbox_acts_for_itself_and_is_deleted_at_the_end(
    daemon: Any, client: Client, make: Any
) -> None:
    daemon.answers |= {
        "CreateSandbox": make.sandbox(),
        "ExecuteCommand": sandboxes_pb2.ExecuteCommandResponse(exit_code=0),
        "CreateSnapshot": make.snapshot(),
        "DeleteSandbox": sandboxes_pb2.DeleteSandboxResponse(id=make.sandbox_id),
    }
    with client.sandboxes.create() as box:
        box.execute("true")
        assert daemon.last("ExecuteCommand").sandbox == make.sandbox_id
        assert box.snapshot(name="n", quick=True).consistency == "application"
        assert daemon.last("CreateSnapshot").level == records_pb2.SNAPSHOT_LEVEL_CRASH
    assert daemon.last("DeleteSandbox").sandbox == make.sandbox_id


def test_the_end_of_the_block_hides_no_error(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers |= {
        "CreateSandbox": make.sandbox(),
        "DeleteSandbox": make.refusal(grpc.StatusCode.NOT_FOUND, "SANDBOX_NOT_FOUND"),
    }
    with client.sandboxes.create():
        pass  # gone already: that is what was wanted
    daemon.answers["DeleteSandbox"] = make.refusal(grpc.StatusCode.INTERNAL, "INTERNAL")
    with pytest.raises(ZeroDivisionError) as caught, client.sandboxes.create():
        raise ZeroDivisionError
    assert "was not deleted" in caught.value.__notes__[0]
    with pytest.raises(InternalError), client.sandboxes.create():
        pass


def test_clone_gives_sandboxes_and_errors(daemon: Any, client: Client, make: Any) -> None:
    failure = records_pb2.Failure(reason="NO_SPACE", message="full", metadata={"free": "1"})
    daemon.answers["CloneSandbox"] = sandboxes_pb2.CloneSandboxResponse(
        snapshot=make.snapshot(),
        results=[
            sandboxes_pb2.CloneResult(failure=failure),
            sandboxes_pb2.CloneResult(sandbox=make.sandbox(name="c-2")),
        ],
    )
    result = client.sandboxes.clone("x", name="c", count=2, memory=256, level="crash")
    sent = daemon.last("CloneSandbox")
    assert (sent.count, sent.resources.memory, sent.level) == (2, 256, 1)
    assert result.sandbox.name == "c-2"
    assert result.sandboxes == (result.sandbox,)
    assert result.errors[0].reason == "NO_SPACE"
    assert result.errors[0].metadata == {"free": "1"}
    assert result.results[0] is result.errors[0]
    assert result.snapshot.id == make.snapshot_id


def test_revert(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["RevertSandbox"] = sandboxes_pb2.RevertSandboxResponse(
        sandbox=make.sandbox(), safety_snapshot=make.snapshot(name="safe")
    )
    result = client.sandboxes.revert("x", "y", wait_for_ready=False)
    assert daemon.last("RevertSandbox").wait_for_ready is False
    assert (result.sandbox.name, result.safety_snapshot.name) == ("debugbox", "safe")


def test_snapshots(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers |= {
        "CreateSnapshot": make.snapshot(),
        "RestoreSnapshot": make.sandbox(name="restored"),
        "DeleteSnapshot": snapshots_pb2.DeleteSnapshotResponse(
            id="i", freed_bytes=1, kept_bytes=2, kept_for=["a"]
        ),
    }
    zone = timezone(timedelta(hours=2))
    shot = client.snapshots.create("x", expires_at=datetime(2030, 1, 1, 2, tzinfo=zone))
    assert daemon.last("CreateSnapshot").expires_at.ToJsonString() == "2030-01-01T00:00:00Z"
    assert shot.state is SnapshotState.READY
    assert shot.consistency is SnapshotLevel.APPLICATION
    assert shot.requested_level is None
    assert shot.stall == timedelta(milliseconds=125)
    assert shot.expires_at is None
    assert client.snapshots.restore(shot.id, name="restored", cpus=4).name == "restored"
    assert daemon.last("RestoreSnapshot").resources.cpus == 4
    gone = client.snapshots.delete(shot.id)
    assert (gone.freed_bytes, gone.kept_bytes, gone.kept_for) == (1, 2, ("a",))


CREATING, READY, FAILED = (
    records_pb2.SNAPSHOT_STATE_CREATING,
    records_pb2.SNAPSHOT_STATE_READY,
    records_pb2.SNAPSHOT_STATE_FAILED,
)


def test_wait_ready_watches(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["GetSnapshot"] = make.snapshot(state=CREATING)
    daemon.answers["WatchSnapshots"] = [
        make.snapshot_event(1, id="another"),
        make.snapshot_event(1, state=CREATING),
        make.snapshot_event(3),
        ...,
    ]
    assert client.snapshots.wait_ready("baseline").state == "ready"
    daemon.answers["GetSnapshot"] = make.snapshot()
    assert client.snapshots.wait_ready("baseline").state == "ready"


def test_wait_ready_that_ends_badly(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["GetSnapshot"] = make.snapshot(state=FAILED, failure_reason="frozen already")
    with pytest.raises(SnapshotFailedError, match="frozen already") as caught:
        client.snapshots.wait_ready("x")
    assert caught.value.snapshot_id == make.snapshot_id
    daemon.answers["GetSnapshot"] = make.snapshot(state=CREATING)
    daemon.answers["WatchSnapshots"] = [make.snapshot_event(4)]
    with pytest.raises(SnapshotNotFoundError):
        client.snapshots.wait_ready("x")
    daemon.answers["WatchSnapshots"] = []
    with pytest.raises(InternalError):
        client.snapshots.wait_ready("x")
    daemon.answers["WatchSnapshots"] = [...]
    with pytest.raises(DeadlineExceededError):
        client.snapshots.wait_ready("x", timeout=0.2)


def test_waiting_for_a_sandbox(daemon: Any, client: Client, make: Any) -> None:
    def event(type: int, **fields: Any) -> sandboxes_pb2.SandboxEvent:
        return sandboxes_pb2.SandboxEvent(
            type=type,  # type: ignore[arg-type]
            sandbox=make.sandbox(**fields),
        )

    daemon.answers["WatchSandboxes"] = [event(1, ready=False), event(3)]
    assert client.sandboxes.wait_ready("debugbox").ready
    daemon.answers["WatchSandboxes"] = [event(3, ready=False, state=7, state_reason="QEMU died")]
    with pytest.raises(InvalidStateError, match="QEMU died"):
        client.sandboxes.wait_ready("debugbox")
    daemon.answers["WatchSandboxes"] = [event(4)]
    with pytest.raises(SandboxNotFoundError):
        client.sandboxes.wait_ready("debugbox")
    daemon.answers["WatchSandboxes"] = [event(1), event(2), ...]
    events = client.sandboxes.watch(sandboxes=["a"])
    assert [next(events).type, next(events).type] == ["present", "created"]
    events.close()  # type: ignore[attr-defined]


def test_images(daemon: Any, client: Client, make: Any, tmp_path: Path) -> None:
    daemon.answers |= {
        "BuildImage": [
            images_pb2.BuildImageResponse(
                progress=images_pb2.BuildProgress(step="bootstrap", fraction=0.5)
            ),
            images_pb2.BuildImageResponse(progress=images_pb2.BuildProgress(step="pack")),
            images_pb2.BuildImageResponse(image=make.image()),
        ],
        "ImportImage": make.image(name="cloud"),
        "ListImages": images_pb2.ListImagesResponse(images=[make.image()]),
        "DeleteImage": images_pb2.DeleteImageResponse(id=make.image_id, freed_bytes=5),
    }
    steps: list[BuildProgress] = []
    image = client.images.build_debian(include=["strace"], progress=steps.append)
    assert image.boot == "kernel"
    assert [(one.step, one.fraction) for one in steps] == [("bootstrap", 0.5), ("pack", None)]
    assert list(daemon.last("BuildImage").debian.include) == ["strace"]
    client.images.build_tiny(name="t")
    assert daemon.last("BuildImage").HasField("tiny")

    file = tmp_path / "disk.raw"
    file.write_bytes(b"x" * (2 << 20) + b"end")
    sent: list[tuple[int, int]] = []
    progress = lambda done, total: sent.append((done, total))  # noqa: E731
    assert client.images.import_file(file, name="cloud", progress=progress).name == "cloud"
    parts = daemon.last("ImportImage")
    assert parts[0].header.format == images_pb2.DISK_FORMAT_RAW
    assert b"".join(part.data for part in parts[1:]) == file.read_bytes()
    assert sent[-1] == ((2 << 20) + 3, (2 << 20) + 3)
    assert [one.id for one in client.images.list()] == [make.image_id]
    assert client.images.delete("x").freed_bytes == 5


def test_a_suffix_that_lies_is_not_believed(
    daemon: Any, client: Client, make: Any, tmp_path: Path
) -> None:
    file = tmp_path / "jammy.img"
    file.write_bytes(b"QFI\xfb...")
    with pytest.raises(InvalidArgumentError, match="like a qcow2"):
        client.images.import_file(file, name="x")
    with pytest.raises(InvalidArgumentError, match="format"):
        client.images.import_file(tmp_path / "disk.vmdk", name="x")
    with pytest.raises(FileNotFoundError):
        client.images.import_file(tmp_path / "none.raw", name="x")
    daemon.answers["ImportImage"] = make.refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_IMAGE")
    with pytest.raises(InvalidImageError):
        client.images.import_file(file, name="x", format=DiskFormat.RAW)
    assert daemon.last("ImportImage")[0].header.format == images_pb2.DISK_FORMAT_RAW


def test_host(daemon: Any, client: Client) -> None:
    daemon.answers["GetHost"] = host_pb2.Host(
        version="1", settings=[host_pb2.Setting(key="accel", value='"auto"', source="default")]
    )
    host = client.host()
    assert (host.version, host.settings[0].key) == ("1", "accel")


async def test_the_asynchronous_face(daemon: Any, make: Any, tmp_path: Path) -> None:
    daemon.answers |= {
        "CreateSandbox": make.sandbox(),
        "ListSandboxes": sandboxes_pb2.ListSandboxesResponse(sandboxes=[make.sandbox()]),
        "ExecuteCommand": sandboxes_pb2.ExecuteCommandResponse(exit_code=0, stdout=b"hi"),
        "DeleteSandbox": sandboxes_pb2.DeleteSandboxResponse(),
        "GetSnapshot": make.snapshot(state=CREATING),
        "WatchSnapshots": [make.snapshot_event(1, state=CREATING), make.snapshot_event(3), ...],
        "GetImage": make.refusal(grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND"),
        "ImportImage": make.image(),
        "GetHost": host_pb2.Host(version="1"),
    }
    async with AsyncClient(daemon.address, timeout=20) as client:
        async with await client.sandboxes.create(name="x") as box:
            assert (await box.execute("true")).stdout_text == "hi"
        assert daemon.last("DeleteSandbox").sandbox == make.sandbox_id
        assert [one.id for one in await client.sandboxes.list()] == [make.sandbox_id]
        assert (await client.snapshots.wait_ready("x")).state == "ready"
        events = client.snapshots.watch()
        assert (await anext(events)).type == "present"
        await events.aclose()  # type: ignore[attr-defined]
        with pytest.raises(ImageNotFoundError):
            await client.images.get("x")
        file = tmp_path / "disk.raw"
        file.write_bytes(b"0123")
        assert (await client.images.import_file(file, name="x")).id == make.image_id
        assert daemon.last("ImportImage")[1].data == b"0123"
        assert (await client.host()).version == "1"
        daemon.answers["WatchSnapshots"] = [...]
        with pytest.raises(DeadlineExceededError):
            await client.snapshots.wait_ready("x", timeout=0.2)
