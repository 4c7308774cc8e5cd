"""Errors over the wire."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from stratabox import client as sdk
from stratabox.client import AsyncClient, Client

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (CODE.NOT_FOUND, "SANDBOX_NOT_FOUND", sdk.SandboxNotFoundError),
        (CODE.FAILED_PRECONDITION, "AMBIGUOUS_NAME", sdk.AmbiguousNameError),
        (CODE.FAILED_PRECONDITION, "SNAPSHOT_FAILED", sdk.SnapshotFailedError),
        (CODE.FAILED_PRECONDITION, "SOMETHING_NEW", sdk.DeniedError),
        (CODE.INVALID_ARGUMENT, "INVALID_RESOURCES", sdk.InvalidResourcesError),
        (CODE.ABORTED, "INTERRUPTED", sdk.InterruptedOperationError),
        (CODE.RESOURCE_EXHAUSTED, "UIDS_EXHAUSTED", sdk.NoSpaceError),
        (CODE.UNAVAILABLE, "AGENT_UNAVAILABLE", sdk.AgentUnavailableError),
        (CODE.UNAVAILABLE, "DAEMON_ENDING", sdk.DaemonEndingError),
        (CODE.DATA_LOSS, "LAYER_MISSING", sdk.CorruptError),
        (CODE.INTERNAL, "INTERNAL", sdk.InternalError),
        (CODE.UNIMPLEMENTED, None, sdk.UnsupportedError),
        (CODE.RESOURCE_EXHAUSTED, None, sdk.StrataboxError),
        (CODE.PERMISSION_DENIED, "FORBIDDEN", sdk.ForbiddenError),
        (CODE.PERMISSION_DENIED, None, sdk.ForbiddenError),
        (CODE.UNAUTHENTICATED, "NO_KEY", sdk.NoKeyError),
        (CODE.UNAUTHENTICATED, "KEY_EXPIRED", sdk.KeyExpiredError),
        (CODE.UNAUTHENTICATED, "INVALID_KEY", sdk.UnauthenticatedError),
        (CODE.RESOURCE_EXHAUSTED, "RATE_LIMITED", sdk.RateLimitedError),
        (CODE.DEADLINE_EXCEEDED, None, sdk.DeadlineExceededError),
    ],
)
def test_reasons_become_classes(
    daemon: Any, client: Client, make: Any, code: CODE, reason: str | None, kind: type
) -> None:
    daemon.answers["GetSandbox"] = make.refusal(
        code, reason, metadata={"snapshot_id": make.snapshot_id}
    )
    with pytest.raises(sdk.StrataboxError) as caught:
        client.sandboxes.get("x")
    assert type(caught.value) is kind
    if reason:
        assert caught.value.reason == reason
        assert caught.value.message == "no, because"
        assert caught.value.metadata == {"snapshot_id": make.snapshot_id}


def test_a_failed_snapshot_names_its_record(daemon: Any, client: Client, make: Any) -> None:
    daemon.answers["CreateSnapshot"] = make.refusal(
        CODE.FAILED_PRECONDITION, "SNAPSHOT_FAILED", metadata={"snapshot_id": make.snapshot_id}
    )
    with pytest.raises(sdk.SnapshotFailedError) as caught:
        client.snapshots.create("x")
    assert caught.value.snapshot_id == make.snapshot_id


def test_errors_of_streams(daemon: Any, client: Client, make: Any) -> None:
    refusal = make.refusal(CODE.NOT_FOUND, "SANDBOX_NOT_FOUND")
    daemon.answers |= {"WatchSandboxes": [refusal], "BuildImage": [refusal]}
    with pytest.raises(sdk.SandboxNotFoundError):
        next(client.sandboxes.watch())
    with pytest.raises(sdk.SandboxNotFoundError):
        client.images.build_tiny()


def test_a_daemon_that_ends(daemon: Any, client: Client, make: Any) -> None:
    """What its gRPC says, where the daemon itself could not."""
    daemon.answers |= {
        "GetSandbox": make.refusal(CODE.CANCELLED, None, message="CANCELLED"),
        "WatchSnapshots": [make.snapshot_event(1), ...],
    }
    with pytest.raises(sdk.DaemonUnavailableError, match="in the middle of the call"):
        client.sandboxes.get("x")
    watch = client.snapshots.watch()
    next(watch)
    daemon.server.stop(None)
    with pytest.raises(sdk.DaemonUnavailableError, match="in the middle of the call"):
        next(watch)


def test_a_client_that_is_closed(daemon: Any, make: Any) -> None:
    daemon.answers["WatchSnapshots"] = [make.snapshot_event(1), ...]
    client = Client(daemon.address)
    watch = client.snapshots.watch()
    next(watch)
    client.close()
    with pytest.raises(sdk.StrataboxError) as caught:
        next(watch)
    assert caught.value.reason == "CANCELLED"


def test_nobody_there(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/none.sock"
    with Client(address) as client, pytest.raises(sdk.DaemonUnavailableError) as caught:
        client.sandboxes.list()
    assert caught.value.address == address
    assert address in caught.value.message
    assert "stratabox daemon" in caught.value.message


async def test_nobody_there_either(tmp_path: Path) -> None:
    async with AsyncClient(f"unix://{tmp_path}/none.sock") as client:
        with pytest.raises(sdk.DaemonUnavailableError):
            await client.sandboxes.list()


def test_the_clients_own_time_out(daemon: Any, make: Any) -> None:
    given_up = threading.Event()

    def never(request: Any) -> Any:
        assert given_up.wait(60)
        return make.sandbox()

    def slow(request: Any) -> Any:
        time.sleep(0.2)
        return make.sandbox()

    daemon.answers |= {"GetSandbox": never, "CreateSandbox": slow}
    with Client(daemon.address, timeout=0.1) as client:
        with pytest.raises(sdk.DeadlineExceededError):
            client.sandboxes.get("x")
        given_up.set()
        # What the daemon was told that it may take comes on top.
        assert client.sandboxes.create(ready_timeout=60).name == "debugbox"
