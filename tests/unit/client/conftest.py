"""A daemon that gives canned answers over a real socket: what the SDK meets on the wire."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from stratabox.client import Client
from stratabox.client.cli import cli
from stratabox.v1 import (
    files_pb2,
    files_pb2_grpc,
    host_pb2,
    host_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    jobs_pb2,
    jobs_pb2_grpc,
    records_pb2,
    sandboxes_pb2,
    sandboxes_pb2_grpc,
    snapshots_pb2,
    snapshots_pb2_grpc,
    transfers_pb2,
    transfers_pb2_grpc,
)

SANDBOX_ID = "11111111-2222-4333-8444-555555555555"
SNAPSHOT_ID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
IMAGE_ID = "99999999-8888-4777-8666-555555555555"

_SERVICES: tuple[tuple[Any, type, Callable[..., None]], ...] = (
    (
        sandboxes_pb2,
        sandboxes_pb2_grpc.SandboxesServiceServicer,
        sandboxes_pb2_grpc.add_SandboxesServiceServicer_to_server,
    ),
    (
        snapshots_pb2,
        snapshots_pb2_grpc.SnapshotsServiceServicer,
        snapshots_pb2_grpc.add_SnapshotsServiceServicer_to_server,
    ),
    (
        images_pb2,
        images_pb2_grpc.ImagesServiceServicer,
        images_pb2_grpc.add_ImagesServiceServicer_to_server,
    ),
    (
        jobs_pb2,
        jobs_pb2_grpc.JobsServiceServicer,
        jobs_pb2_grpc.add_JobsServiceServicer_to_server,
    ),
    (
        host_pb2,
        host_pb2_grpc.HostServiceServicer,
        host_pb2_grpc.add_HostServiceServicer_to_server,
    ),
    (
        files_pb2,
        files_pb2_grpc.FilesServiceServicer,
        files_pb2_grpc.add_FilesServiceServicer_to_server,
    ),
    (
        transfers_pb2,
        transfers_pb2_grpc.TransfersServiceServicer,
        transfers_pb2_grpc.add_TransfersServiceServicer_to_server,
    ),
)


@dataclass
class Refusal:
    """An answer that is an error, with ErrorInfo where there is a reason."""

    code: grpc.StatusCode
    reason: str | None = None
    message: str = "no, because"
    metadata: dict[str, str] = field(default_factory=dict)

    def abort(self, context: Any) -> None:
        details = []
        if self.reason:
            info = error_details_pb2.ErrorInfo(
                reason=self.reason, domain="stratabox", metadata=self.metadata
            )
            packed = any_pb2.Any()
            packed.Pack(info)
            details.append(packed)
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=details)
        context.abort_with_status(rpc_status.to_status(status))


class FakeDaemon:
    """Answers every RPC with what a test put under its name, and keeps the requests.

    An answer is a message, a Refusal, a list of them (a stream, or one for each call), or a
    function of the request. A stream that ends with `...` stays open until the client goes.
    """

    def __init__(self, folder: Path) -> None:
        self.address = f"unix://{folder}/api.sock"
        self.answers: dict[str, Any] = {}
        self.requests: list[tuple[str, Any]] = []
        self.pool = ThreadPoolExecutor(8)
        options = [("grpc.max_send_message_length", 64 << 20)]
        self.server = grpc.server(self.pool, options=options)
        for module, servicer, add in _SERVICES:
            name = servicer.__name__.removesuffix("Servicer")
            methods = module.DESCRIPTOR.services_by_name[name].methods
            handlers = {one.name: self._handler(one) for one in methods}
            add(type("Canned", (servicer,), handlers)(), self.server)
        self.server.add_insecure_port(self.address)
        self.server.start()

    def stop(self) -> None:
        self.server.stop(None).wait()
        self.pool.shutdown()

    def last(self, name: str) -> Any:
        """The last request of this RPC."""
        return next(request for rpc, request in reversed(self.requests) if rpc == name)

    def _handler(self, method: Any) -> Callable[..., Any]:
        def one(servicer: Any, request: Any, context: Any) -> Any:
            kept = list(request) if method.client_streaming else request
            self.requests.append((method.name, kept))
            answer = self.answers[method.name]
            if callable(answer):
                answer = answer(kept)
            if isinstance(answer, list):
                answer = answer.pop(0)
            if isinstance(answer, Refusal):
                answer.abort(context)
            return answer

        def many(servicer: Any, request: Any, context: Any) -> Iterator[Message]:
            self.requests.append((method.name, request))
            for answer in self.answers[method.name]:
                if isinstance(answer, Refusal):
                    answer.abort(context)
                elif answer is ...:
                    import threading

                    gone = threading.Event()
                    if context.add_callback(gone.set):
                        gone.wait(30)
                else:
                    yield answer

        return many if method.server_streaming else one


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with tempfile.TemporaryDirectory(prefix="sbx") as folder:
        fake = FakeDaemon(Path(folder))
        yield fake
        fake.stop()


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.address) as client:
        yield client


@pytest.fixture
def run(daemon: FakeDaemon) -> Callable[..., Result]:
    """Run the command line against the fake daemon."""

    def run(*words: str, **options: Any) -> Result:
        # What makes colours although this is no terminal, as some CI sets it, is taken away.
        environment = {"STRATABOX_ADDRESS": daemon.address, "FORCE_COLOR": None}
        return CliRunner().invoke(cli, list(words), env=environment, **options)

    return run


def a_sandbox(**fields: Any) -> records_pb2.Sandbox:
    message = records_pb2.Sandbox(
        id=SANDBOX_ID,
        name="debugbox",
        state=records_pb2.SANDBOX_STATE_RUNNING,
        ready=True,
        image_id=IMAGE_ID,
        image_name="debian",
        cpus=2,
        memory=512,
        storage=10,
        env={"A": "1"},
        metadata={"team": "x"},
        tags=["t1", "t2"],
        disks=[records_pb2.Disk(index=0, size_bytes=10 << 30, serial="root", chain_depth=3)],
        machine=records_pb2.Machine(machine_type="pc-q35-7.2", accelerator="tcg"),
        generation=7,
    )
    message.created_at.FromJsonString("2026-03-20T12:00:00.250Z")
    message.updated_at.FromJsonString("2026-03-20T12:00:01Z")
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def a_snapshot(**fields: Any) -> records_pb2.Snapshot:
    message = records_pb2.Snapshot(
        id=SNAPSHOT_ID,
        name="baseline",
        state=records_pb2.SNAPSHOT_STATE_READY,
        consistency=records_pb2.SNAPSHOT_LEVEL_APPLICATION,
        source_sandbox_id=SANDBOX_ID,
        source_sandbox_name="debugbox",
        image_id=IMAGE_ID,
        size_bytes=10 << 30,
        layer_bytes=4096,
        cpus=2,
        memory=512,
        storage=10,
        frozen_filesystems=1,
        generation=2,
    )
    message.created_at.FromJsonString("2026-03-20T12:00:00Z")
    message.stall.FromMilliseconds(125)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def an_image(**fields: Any) -> records_pb2.Image:
    message = records_pb2.Image(
        id=IMAGE_ID,
        name="debian",
        state=records_pb2.IMAGE_STATE_READY,
        boot=records_pb2.BOOT_METHOD_KERNEL,
        origin="debian bookworm",
        size_bytes=2 << 30,
        layer_bytes=1 << 29,
        kernel_sha256="k" * 64,
    )
    message.created_at.FromJsonString("2026-03-20T12:00:00Z")
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@dataclass
class Make:
    """The messages that answers are made of."""

    sandbox: Callable[..., records_pb2.Sandbox] = a_sandbox
    snapshot: Callable[..., records_pb2.Snapshot] = a_snapshot
    image: Callable[..., records_pb2.Image] = an_image
    refusal: Callable[..., Refusal] = Refusal
    sandbox_id: str = SANDBOX_ID
    snapshot_id: str = SNAPSHOT_ID
    image_id: str = IMAGE_ID

    def snapshot_event(self, type: int, **fields: Any) -> snapshots_pb2.SnapshotEvent:
        return snapshots_pb2.SnapshotEvent(
            type=type,  # type: ignore[arg-type]  # an enum's number
            snapshot=a_snapshot(**fields),
        )


@pytest.fixture
def make() -> Make:
    return Make()
