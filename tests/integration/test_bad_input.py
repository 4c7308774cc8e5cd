"""Requests that cannot be right: each gets its code and its reason, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from stratabox.client import (
    AgentUnavailableError,
    AmbiguousNameError,
    Client,
    Image,
    ImageNotFoundError,
    InvalidArgumentError,
    InvalidResourcesError,
    NotFoundError,
    Sandbox,
    SandboxNotFoundError,
    SnapshotNotFoundError,
    StrataboxError,
)
from stratabox.client.addresses import grpc_target
from stratabox.v1 import images_pb2, images_pb2_grpc, sandboxes_pb2_grpc, snapshots_pb2_grpc
from stratabox.v1 import records_pb2 as records
from stratabox.v1 import sandboxes_pb2 as pb
from stratabox.v1 import snapshots_pb2 as spb
from support.boot_disks import boot_disk, say
from support.daemon import DaemonProcess
from support.rig import eventually, wait_idle

NOBODY = "00000000-0000-4000-8000-000000000000"
INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
DENIED = grpc.StatusCode.FAILED_PRECONDITION


class Wire:
    """The API as any gRPC client sees it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self._stubs = [
            stub(channel)
            for stub in (
                sandboxes_pb2_grpc.SandboxesServiceStub,
                snapshots_pb2_grpc.SnapshotsServiceStub,
                images_pb2_grpc.ImagesServiceStub,
            )
        ]

    def call(self, rpc: str, request: Any) -> Any:
        [method] = [getattr(stub, rpc) for stub in self._stubs if hasattr(stub, rpc)]
        answer = method(request, timeout=60)
        return answer if isinstance(answer, Message) else list(answer)

    def refusal(self, rpc: str, request: Any) -> tuple[grpc.StatusCode, ErrorInfo]:
        """Its code and its ErrorInfo; there is no other detail."""
        with pytest.raises(grpc.RpcError) as caught:
            self.call(rpc, request)
        call: Any = caught.value  # every RpcError that a call raises is a call, too
        status = rpc_status.from_call(call)
        assert status is not None
        assert status.message == call.details() != ""
        [detail] = status.details
        info = ErrorInfo()
        assert detail.Unpack(info)
        assert info.domain == "stratabox"
        return call.code(), info


@pytest.fixture(scope="module")
def wire(shared_daemon: DaemonProcess) -> Iterator[Wire]:
    with grpc.insecure_channel(grpc_target(shared_daemon.address)) as channel:
        yield Wire(channel)


@pytest.fixture(scope="module")
def idle(client: Client, tiny: Image, shared_daemon: DaemonProcess) -> Iterator[Sandbox]:
    """A sandbox whose guest never gets to run."""
    wait_idle(shared_daemon)  # for what earlier tests have left to jobs
    with client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False) as sandbox:
        yield sandbox.stop(force=True)


@pytest.fixture
def spare(client: Client, tiny: Image, nothing_left: None) -> Iterator[Sandbox]:
    """Such a one for one test, which may take snapshots of it."""
    with client.sandboxes.create(image=tiny.id, memory=128, wait_for_ready=False) as sandbox:
        yield sandbox.stop(force=True)


@pytest.fixture(autouse=True)
def nothing_left(shared_daemon: DaemonProcess, idle: Sandbox) -> Iterator[None]:
    def everything() -> tuple[int, list[tuple[object, ...]], list[tuple[object, ...]]]:
        ids = [
            shared_daemon.rows(f"SELECT id FROM {table}") for table in ("sandboxes", "snapshots")
        ]
        return len(shared_daemon.layers()), ids[0], ids[1]

    before = everything()
    yield
    # A job may have begun to merge layers of a sandbox before that was deleted: it gives up.
    eventually(lambda: everything() == before)
    shared_daemon.check_consistent()


# -- unknown and ambiguous ------------------------------------------------------------------------

UNKNOWN: list[tuple[str, Any, str]] = [
    (rpc, request(sandbox=NOBODY), "SANDBOX_NOT_FOUND")
    for rpc, request in (
        ("GetSandbox", pb.GetSandboxRequest),
        ("PauseSandbox", pb.PauseSandboxRequest),
        ("ResumeSandbox", pb.ResumeSandboxRequest),
        ("StopSandbox", pb.StopSandboxRequest),
        ("StartSandbox", pb.StartSandboxRequest),
        ("TerminateSandbox", pb.TerminateSandboxRequest),
        ("DeleteSandbox", pb.DeleteSandboxRequest),
        ("CloneSandbox", pb.CloneSandboxRequest),
        ("RevertSandbox", pb.RevertSandboxRequest),
        ("CreateSnapshot", spb.CreateSnapshotRequest),
        ("ListSnapshots", spb.ListSnapshotsRequest),
        ("WatchSnapshots", spb.WatchSnapshotsRequest),
    )
]
UNKNOWN += [
    ("ExecuteCommand", pb.ExecuteCommandRequest(sandbox="no such", shell="x"), "SANDBOX_NOT_FOUND"),
    (
        "UpdateSandbox",
        pb.UpdateSandboxRequest(
            sandbox=records.Sandbox(id="nobody"),
            update_mask=field_mask_pb2.FieldMask(paths=["name"]),
        ),
        "INVALID_ARGUMENT",  # its name is empty, whoever it may be
    ),
    ("WatchSandboxes", pb.WatchSandboxesRequest(sandboxes=[NOBODY]), "SANDBOX_NOT_FOUND"),
    ("GetSandbox", pb.GetSandboxRequest(), "SANDBOX_NOT_FOUND"),
    ("GetSandbox", pb.GetSandboxRequest(sandbox="x' OR '1'='1"), "SANDBOX_NOT_FOUND"),
    ("GetSnapshot", spb.GetSnapshotRequest(snapshot=NOBODY), "SNAPSHOT_NOT_FOUND"),
    ("DeleteSnapshot", spb.DeleteSnapshotRequest(snapshot="nope"), "SNAPSHOT_NOT_FOUND"),
    ("RestoreSnapshot", spb.RestoreSnapshotRequest(snapshot=NOBODY), "SNAPSHOT_NOT_FOUND"),
    ("WatchSnapshots", spb.WatchSnapshotsRequest(snapshots=[NOBODY]), "SNAPSHOT_NOT_FOUND"),
    ("CreateSandbox", pb.CreateSandboxRequest(snapshot=NOBODY), "SNAPSHOT_NOT_FOUND"),
    ("CreateSandbox", pb.CreateSandboxRequest(image="nope"), "IMAGE_NOT_FOUND"),
    ("ListSandboxes", pb.ListSandboxesRequest(image="nope"), "IMAGE_NOT_FOUND"),
    ("GetImage", images_pb2.GetImageRequest(image=NOBODY), "IMAGE_NOT_FOUND"),
    ("DeleteImage", images_pb2.DeleteImageRequest(image="nope"), "IMAGE_NOT_FOUND"),
]


@pytest.mark.parametrize(("rpc", "request_", "reason"), UNKNOWN)
def test_what_is_not_there(wire: Wire, rpc: str, request_: Any, reason: str) -> None:
    code, info = wire.refusal(rpc, request_)
    assert info.reason == reason
    assert code is (INVALID if reason == "INVALID_ARGUMENT" else MISSING)


def test_the_sdk_has_an_exception_for_each(client: Client, idle: Sandbox) -> None:
    for kind, call in (
        (SandboxNotFoundError, lambda: client.sandboxes.get(NOBODY)),
        (SnapshotNotFoundError, lambda: client.snapshots.restore(NOBODY)),
        (SnapshotNotFoundError, lambda: client.sandboxes.revert(idle.id, NOBODY)),
        (ImageNotFoundError, lambda: client.sandboxes.create(image=NOBODY)),
        (InvalidResourcesError, lambda: client.sandboxes.create(image="tiny", cpus=0)),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert isinstance(caught.value, NotFoundError | InvalidArgumentError)
        assert caught.value.reason == kind.default_reason


def test_a_name_that_two_have(wire: Wire, client: Client, spare: Sandbox) -> None:
    for _ in range(2):
        spare.snapshot(name="twins")
    ids = {snapshot.id for snapshot in client.snapshots.list(name="twins")}
    for rpc, request in (
        ("GetSnapshot", spb.GetSnapshotRequest(snapshot="twins")),
        ("DeleteSnapshot", spb.DeleteSnapshotRequest(snapshot="twins")),
        ("RestoreSnapshot", spb.RestoreSnapshotRequest(snapshot="twins")),
        ("RevertSandbox", pb.RevertSandboxRequest(sandbox=spare.id, snapshot="twins")),
    ):
        code, info = wire.refusal(rpc, request)
        assert (code, info.reason) == (DENIED, "AMBIGUOUS_NAME")
        assert set(info.metadata["ids"].split(",")) == ids
    with pytest.raises(AmbiguousNameError):
        client.snapshots.get("twins")
    for snapshot in ids:
        client.snapshots.delete(snapshot)


# -- values ---------------------------------------------------------------------------------------


def create(**fields: Any) -> tuple[str, Any]:
    return "CreateSandbox", pb.CreateSandboxRequest(image="tiny", **fields)


def sized(**fields: int) -> tuple[str, Any]:
    return create(resources=records.Resources(**fields))


def lasting(seconds: int) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=seconds)


HUGE = 2**62
RESOURCES = [
    sized(cpus=0), sized(cpus=33), sized(cpus=-1), sized(cpus=2**31 - 1),
    sized(memory=127), sized(memory=32769), sized(memory=0), sized(memory=-HUGE),
    sized(storage=0), sized(storage=-1), sized(storage=65537), sized(storage=HUGE),
    create(data_disks=[0]), create(data_disks=[-1]), create(data_disks=[HUGE]),
    create(data_disks=[1] * 9),
    ("CloneSandbox", pb.CloneSandboxRequest(sandbox="x", resources=records.Resources(cpus=33))),
    ("CloneSandbox", pb.CloneSandboxRequest(sandbox="x", resources=records.Resources(storage=9))),
    (
        "RestoreSnapshot",
        spb.RestoreSnapshotRequest(snapshot="x", resources=records.Resources(memory=127)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rpc", "request_"), RESOURCES)
def test_sizes_that_cannot_be(wire: Wire, rpc: str, request_: Any) -> None:
    code, info = wire.refusal(rpc, request_)
    assert (code, info.reason) == (INVALID, "INVALID_RESOURCES")
    assert info.metadata["field"] in ("cpus", "memory", "storage", "data_disks")


BAD_NAMES = [
    "a/b", "..\\up", "bell\a", "new\nline", "nul\0", "esc\x1b[31m", "\x7f", "c1\x85", "\u2028",
    "   ", "x" * 256, "é" * 128, "/",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be(wire: Wire, idle: Sandbox, name: str) -> None:
    mask = field_mask_pb2.FieldMask(paths=["name"])
    for rpc, request in (
        create(name=name),
        create(tags=[name]),
        (
            "UpdateSandbox",
            pb.UpdateSandboxRequest(
                sandbox=records.Sandbox(id=idle.id, name=name), update_mask=mask
            ),
        ),
        ("CreateSnapshot", spb.CreateSnapshotRequest(sandbox=idle.id, name=name)),
        ("CloneSandbox", pb.CloneSandboxRequest(sandbox=idle.id, name=name)),
        ("CloneSandbox", pb.CloneSandboxRequest(sandbox=idle.id, snapshot_name=name)),
        ("RestoreSnapshot", spb.RestoreSnapshotRequest(snapshot=NOBODY, name=name)),
    ):
        code, info = wire.refusal(rpc, request)
        assert (code, info.reason) == (INVALID, "INVALID_ARGUMENT"), rpc


def test_a_name_of_ten_megabytes(wire: Wire, client: Client, idle: Sandbox) -> None:
    name = "x" * 10_000_000
    for (rpc, request), reason in (
        (create(name=name), "INVALID_ARGUMENT"),
        (
            ("CreateSnapshot", spb.CreateSnapshotRequest(sandbox=idle.id, name=name)),
            "INVALID_ARGUMENT",
        ),
        (("GetSandbox", pb.GetSandboxRequest(sandbox=name)), "SANDBOX_NOT_FOUND"),
        (("DeleteImage", images_pb2.DeleteImageRequest(image=name)), "IMAGE_NOT_FOUND"),
    ):
        _, info = wire.refusal(rpc, request)
        assert info.reason == reason
    with pytest.raises(InvalidArgumentError, match="10000000 bytes"):
        client.sandboxes.create(image="tiny", name=name)
    with pytest.raises(SandboxNotFoundError):
        client.sandboxes.get(name)
    # What gRPC itself refuses, before any of us sees it.
    with pytest.raises(StrataboxError, match="larger than max") as caught:
        client.sandboxes.get(name * 7)
    assert caught.value.reason == "RESOURCE_EXHAUSTED"


ODD = [
    create(env={"A=B": "x"}),
    create(env={"": "x"}),
    create(env={"1A": "x"}),
    create(env={"A": "a\0b"}),
    create(env={f"A{n}": "" for n in range(257)}),
    create(env={"A": "x" * (129 << 10)}),
    create(metadata={"": "x"}),
    create(metadata={str(n): "" for n in range(65)}),
    create(metadata={"k": "x" * (17 << 10)}),
    create(tags=[str(n) for n in range(65)]),
    create(tags=["x" * 129]),
    create(idempotency_key="k" * 257),
    create(ready_timeout=lasting(-1)),
    create(ready_timeout=lasting(10**9)),
    ("CreateSandbox", pb.CreateSandboxRequest()),
    ("CreateSandbox", pb.CreateSandboxRequest(snapshot="")),
    ("RestoreSnapshot", spb.RestoreSnapshotRequest()),
    ("CloneSandbox", pb.CloneSandboxRequest(sandbox="x", count=65)),
    ("CloneSandbox", pb.CloneSandboxRequest(sandbox="x", count=-1)),
    ("CloneSandbox", pb.CloneSandboxRequest(sandbox="x", level=9)),  # type: ignore[arg-type]
    ("ListSandboxes", pb.ListSandboxesRequest(page_token="bogus")),
    ("ListSandboxes", pb.ListSandboxesRequest(page_size=-1)),
    ("ListSandboxes", pb.ListSandboxesRequest(page_size=1001)),
    ("ListSandboxes", pb.ListSandboxesRequest(states=[0])),  # type: ignore[list-item]
    ("ListSandboxes", pb.ListSandboxesRequest(states=[99])),  # type: ignore[list-item]
    ("ListSnapshots", spb.ListSnapshotsRequest(states=[99])),  # type: ignore[list-item]
    ("ListSnapshots", spb.ListSnapshotsRequest(page_token="AAAA")),
    ("ListImages", images_pb2.ListImagesRequest(page_token="AAAA")),
    ("UpdateSandbox", pb.UpdateSandboxRequest(sandbox=records.Sandbox(id="x"))),
    (
        "UpdateSandbox",
        pb.UpdateSandboxRequest(
            sandbox=records.Sandbox(id="x", cpus=4),
            update_mask=field_mask_pb2.FieldMask(paths=["cpus"]),
        ),
    ),
    ("BuildImage", images_pb2.BuildImageRequest()),
    ("ImportImage", iter(())),
]


@pytest.mark.parametrize(("rpc", "request_"), ODD)
def test_values_that_cannot_be(wire: Wire, rpc: str, request_: Any) -> None:
    code, info = wire.refusal(rpc, request_)
    assert (code, info.reason) == (INVALID, "INVALID_ARGUMENT")


def test_uploads_that_cannot_be(wire: Wire) -> None:
    part, header = images_pb2.ImportImageRequest, images_pb2.ImportHeader
    qcow2 = images_pb2.DISK_FORMAT_QCOW2
    for parts in (
        [part(data=b"QFI\xfb")],
        [part(header=header(name="evil"))],
        [part(header=header(name="evil", format=9))],  # type: ignore[arg-type]
        [part(header=header(name="../evil", format=qcow2)), part(data=b"x")],
        [part(header=header(name="evil", format=qcow2)), part()],
        [part(header=header(name="evil", format=qcow2))] * 2,
    ):
        code, info = wire.refusal("ImportImage", iter(parts))
        assert (code, info.reason) == (INVALID, "INVALID_ARGUMENT")


def test_commands_that_cannot_be(wire: Wire, idle: Sandbox) -> None:
    request = pb.ExecuteCommandRequest
    for wrong in (
        request(sandbox=idle.id),
        request(sandbox=idle.id, argv=["true"], shell="true"),
        request(sandbox=idle.id, shell="true", timeout=lasting(-1)),
    ):
        code, info = wire.refusal("ExecuteCommand", wrong)
        assert (code, info.reason) == (INVALID, "INVALID_ARGUMENT")
    code, info = wire.refusal("ExecuteCommand", request(sandbox=idle.id, shell="true"))
    assert (code, info.reason) == (DENIED, "INVALID_STATE")


def test_expiries_that_cannot_be(wire: Wire, client: Client, spare: Sandbox) -> None:
    snapshot = spare.snapshot(name="expiring")
    mask = field_mask_pb2.FieldMask(paths=["expires_at"])
    past = timestamp_pb2.Timestamp()
    past.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    for stamp in (past, timestamp_pb2.Timestamp(), timestamp_pb2.Timestamp(seconds=2**60)):
        for rpc, request in (
            ("CreateSnapshot", spb.CreateSnapshotRequest(sandbox=spare.id, expires_at=stamp)),
            (
                "UpdateSnapshot",
                spb.UpdateSnapshotRequest(
                    snapshot=records.Snapshot(id=snapshot.id, expires_at=stamp), update_mask=mask
                ),
            ),
        ):
            code, info = wire.refusal(rpc, request)
            assert (code, info.reason) == (INVALID, "INVALID_ARGUMENT")
            assert info.metadata["field"] == "expires_at"
    with pytest.raises(InvalidArgumentError, match="in the past"):
        client.snapshots.update(snapshot.id, expires_at=datetime(2001, 1, 1, tzinfo=UTC))
    with pytest.raises(InvalidArgumentError, match="no time zone"):
        spare.snapshot(expires_at=datetime(2101, 1, 1))
    assert client.snapshots.list(sandbox=spare.id) == [snapshot]
    client.snapshots.delete(snapshot.id)


def test_a_snapshot_of_another_sandbox_is_none_to_revert_to(
    wire: Wire, client: Client, spare: Sandbox
) -> None:
    snapshot = spare.snapshot()
    with client.snapshots.restore(snapshot.id, wait_for_ready=False) as other:
        request = pb.RevertSandboxRequest(sandbox=other.id, snapshot=snapshot.id)
        code, info = wire.refusal("RevertSandbox", request)
        assert (code, info.reason) == (DENIED, "NOT_ITS_SNAPSHOT")
    client.snapshots.delete(snapshot.id)


# -- agents that never answer ---------------------------------------------------------------------


def test_an_agent_that_never_answers(
    client: Client, shared_daemon: DaemonProcess, tmp_path: Path
) -> None:
    boot_disk(tmp_path / "mute.raw", say("no agent in here"))
    image = client.images.import_file(tmp_path / "mute.raw", name="mute")
    with pytest.raises(AgentUnavailableError, match=r"within 0.5 s"):
        client.sandboxes.create(image="mute", memory=128, ready_timeout=0.5)
    shared_daemon.check_consistent()
    with client.sandboxes.create(image="mute", memory=128, wait_for_ready=False) as sandbox:
        snapshot = sandbox.snapshot()
        assert snapshot.consistency == "crash"  # the strongest that goes without an agent
        with pytest.raises(AgentUnavailableError):
            sandbox.execute("true")
        for restoring in (
            lambda: client.snapshots.restore(snapshot.id, ready_timeout=0.5),
            lambda: sandbox.clone(ready_timeout=0.5),
        ):
            before = {one.id for one in client.snapshots.list()}
            with pytest.raises(AgentUnavailableError):
                restoring()
            assert {one.id for one in client.snapshots.list()} == before
            shared_daemon.check_consistent()
        assert sandbox.stop(timeout=0.1).state == "stopped"
        with pytest.raises(AgentUnavailableError):
            sandbox.start(ready_timeout=0.1)
        assert sandbox.refresh().state == "running"
        # What it has said by then is told.
        eventually(lambda: b"no agent in here" in sandbox.console_log(), 120)
        sandbox.pause()
        with pytest.raises(AgentUnavailableError, match=r"(?s)within 0.1 s.*no agent in here"):
            sandbox.resume(identity="renew", ready_timeout=0.1)
    client.snapshots.delete(snapshot.id)
    client.images.delete(image.id)
