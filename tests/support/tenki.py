"""A daemon as Tenki's clients meet it: over TCP, with a key; and its calls without their SDKs.

Never in one process with Tenki's SDKs, which bring messages of the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox.client import Client
from stratabox.tenki.v1 import data_plane_pb2_grpc, records_pb2, sandbox_pb2, sandbox_pb2_grpc
from support.daemon import DaemonProcess, daemon
from support.doors import free_port, key

VERIFIED = records_pb2.DATA_PLANE_ROUTE_STATUS_VERIFIED


@dataclass(frozen=True)
class Refused:
    """How a call was refused."""

    code: grpc.StatusCode
    text: str


def refused(caught: pytest.ExceptionInfo[grpc.RpcError]) -> Refused:
    error: Any = caught.value
    return Refused(error.code(), error.details())


class Tenki:
    """One daemon, and what Tenki's clients do there."""

    def __init__(self, process: DaemonProcess, url: str, api_key: str) -> None:
        self.process = process
        self.url = url
        self.api_key = api_key
        self.metadata = [("authorization", f"Bearer {api_key}")]
        self.channel = grpc.insecure_channel(url.removeprefix("http://"))
        self.connect()

    def connect(self) -> None:
        """Anew: a channel whose daemon was gone waits before it tries again."""
        self.channel.close()
        self.channel = grpc.insecure_channel(self.url.removeprefix("http://"))
        self.control: Any = sandbox_pb2_grpc.SandboxServiceStub(self.channel)
        self.data_plane: Any = data_plane_pb2_grpc.SandboxSessionDataPlaneServiceStub(self.channel)

    def call(self, method: str, request: Any, *, api_key: str | None = None) -> Any:
        """One call of the control plane."""
        metadata = [("authorization", f"Bearer {api_key}")] if api_key else self.metadata
        return getattr(self.control, method)(request, metadata=metadata)

    def create(self, **fields: Any) -> sandbox_pb2.CreateSessionResponse:
        """A session of little memory, as the SDK asks for it."""
        request = sandbox_pb2.CreateSessionRequest(
            owner_type="SERVICE", owner_id="self", **({"memory_mb": 256} | fields)
        )
        made: sandbox_pb2.CreateSessionResponse = self.call("CreateSession", request)
        return made

    def get(self, session: str) -> records_pb2.SandboxSession:
        found: sandbox_pb2.GetSessionResponse = self.call(
            "GetSession", sandbox_pb2.GetSessionRequest(session_id=session)
        )
        return found.session

    def wait(self, session: str) -> Iterator[sandbox_pb2.WaitSessionResponse]:
        request = sandbox_pb2.WaitSessionRequest(session_id=session)
        told: Iterator[sandbox_pb2.WaitSessionResponse] = self.control.WaitSession(
            request, metadata=self.metadata
        )
        return told

    def snapshot(self, snapshot: str) -> records_pb2.Snapshot:
        found: sandbox_pb2.GetSnapshotResponse = self.call(
            "GetSnapshot", sandbox_pb2.GetSnapshotRequest(snapshot_id=snapshot)
        )
        return found.snapshot

    def pause(self, session: str) -> records_pb2.SandboxSession:
        """Ask for a pause, and do not wait for it."""
        request = sandbox_pb2.PauseSessionRequest(session_id=session)
        setattr(request, "async", True)  # a word of Python's
        begun: sandbox_pb2.PauseSessionResponse = self.call("PauseSession", request)
        return begun.session

    def credential(self, session: str) -> list[tuple[str, str]]:
        """Metadata that open a session's data plane."""
        made = self.call(
            "CreateSessionCredential",
            sandbox_pb2.CreateSessionCredentialRequest(session_id=session),
        )
        return [("x-tenki-session-cert", made.credential.credential)]

    def terminate(self, session: str) -> records_pb2.SandboxSession:
        done: sandbox_pb2.TerminateSessionResponse = self.call(
            "TerminateSession", sandbox_pb2.TerminateSessionRequest(session_id=session)
        )
        return done.session

    def close(self) -> None:
        self.channel.close()


@contextmanager
def tenki_daemon(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Tenki]:
    """A daemon of its own whose default image is the tiny one; nothing is left of it."""
    url = f"http://127.0.0.1:{free_port()}"
    more = {
        "STRATABOX_LISTEN": url,
        "STRATABOX_PREVIEWS": f"http://127.0.0.1:{free_port()}",
        "STRATABOX_DEFAULT_IMAGE": "tiny",
        **(environment or {}),
    }
    with daemon(folder, more) as process:
        with process.start() as client:
            client.images.build_tiny()
        made = Tenki(process, url, key(process, "create", "--role", "user")["key"])
        try:
            yield made
        finally:
            made.close()
        if process.runs:
            with Client(process.address) as client:
                for sandbox in client.sandboxes.list():
                    sandbox.delete()
            assert process.guests() == {}
            process.stop()
