"""What opens Tenki's planes, attacked: keys, tenants, and sessions' credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

from stratabox.daemon.access.credentials import Credentials
from stratabox.storage.catalog import secrets, workspaces
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.model.ids import mint
from stratabox.storage.model.workspaces import Workspace
from stratabox.tenki.v1 import data_plane_pb2, records_pb2, sandbox_pb2
from support.doors import key
from support.tenki import Refused, Tenki, refused, tenki_daemon

Metadata = list[tuple[str, str]]

HEADER = "x-tenki-session-cert"
UNKNOWN = "/tenki.sandbox.v1.SandboxSessionDataPlaneService/NoSuchMethod"
NOT_VALID = "the session's credential is not valid: ask for another with CreateSessionCredential"


@pytest.fixture(scope="module")
def tenki(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenki]:
    """A daemon that these tests may start anew."""
    with tenki_daemon(tmp_path_factory.mktemp("credentials")) as made:
        yield made


@pytest.fixture(scope="module")
def session(tenki: Tenki) -> records_pb2.SandboxSession:
    return tenki.create().session


def answer(tenki: Tenki, metadata: Metadata) -> grpc.StatusCode:
    """UNIMPLEMENTED: they were let in, and learn that there is no such method."""
    call: Any = tenki.channel.unary_unary(UNKNOWN)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=metadata)
    return refused(caught).code


def credential_of(tenki: Tenki, session: str, api_key: str) -> Metadata:
    request = sandbox_pb2.CreateSessionCredentialRequest(session_id=session)
    made = tenki.call("CreateSessionCredential", request, api_key=api_key)
    return [(HEADER, made.credential.credential)]


def stat(tenki: Tenki, session: str, metadata: Metadata) -> data_plane_pb2.StatResponse:
    request = data_plane_pb2.SandboxSessionDataPlaneServiceStatRequest(
        request=data_plane_pb2.StatRequest(session_id=session, path="/")
    )
    found: data_plane_pb2.StatResponse = tenki.data_plane.Stat(request, metadata=metadata).response
    return found


def commands(session: str, *argv: str) -> Iterator[Any]:
    start = data_plane_pb2.RunStart(session_id=session, cmd=argv)
    yield data_plane_pb2.SandboxSessionDataPlaneServiceRunRequest(
        frame=data_plane_pb2.RunRequest(start=start)
    )


def test_only_a_sessions_credential_opens_the_data_plane(
    tenki: Tenki, session: records_pb2.SandboxSession
) -> None:
    good = tenki.credential(session.id)
    assert answer(tenki, good) is grpc.StatusCode.UNIMPLEMENTED
    text = good[0][1]
    foreign, _ = Credentials(b"guessed").issue(session.id, tenki.api_key[3:15], datetime.now(UTC))
    for bad in ("", "sc_", text[:-4] + "AAAA", text + "A", foreign, tenki.api_key, "~" * 94):
        assert answer(tenki, [(HEADER, bad)]) is grpc.StatusCode.UNAUTHENTICATED, bad
    assert answer(tenki, tenki.metadata) is grpc.StatusCode.UNAUTHENTICATED, "an API key does not"
    with pytest.raises(grpc.RpcError) as caught:
        tenki.control.GetSession(
            sandbox_pb2.GetSessionRequest(session_id=session.id), metadata=good
        )
    assert refused(caught).code is grpc.StatusCode.UNAUTHENTICATED, "nor does it open the other"


def test_a_credential_opens_its_own_session_and_tells_nothing_of_others(
    tenki: Tenki, session: records_pb2.SandboxSession
) -> None:
    good = tenki.credential(session.id)
    assert stat(tenki, session.id, good).exists
    path = tenki.process.state / "catalog.db"
    with closing(Catalog(path, joining=True)) as catalog, catalog.transaction() as tx:
        ours = Credentials(secrets.get(tx, secrets.SESSIONS))
    owner = tenki.api_key.split("_")[1]
    missing = mint()
    text, _ = ours.issue(missing, owner, datetime.now(UTC))
    with pytest.raises(grpc.RpcError) as caught:
        stat(tenki, session.id, [(HEADER, text)])
    of_other = refused(caught)
    with pytest.raises(grpc.RpcError) as caught:
        stat(tenki, missing, good)
    assert of_other == refused(caught) == Refused(grpc.StatusCode.UNAUTHENTICATED, NOT_VALID)
    old, claim = ours.issue(session.id, owner, datetime(2020, 1, 1, tzinfo=UTC))
    assert claim.expires_at < datetime.now(UTC)
    assert answer(tenki, [(HEADER, old)]) is grpc.StatusCode.UNAUTHENTICATED
    socket, _ = ours.issue(session.id, None, datetime.now(UTC))
    assert answer(tenki, [(HEADER, socket)]) is grpc.StatusCode.UNAUTHENTICATED


def test_a_revoked_key_takes_its_credentials_and_what_runs_by_them_along(
    tenki: Tenki, session: records_pb2.SandboxSession
) -> None:
    made = key(tenki.process, "create", "--role", "user")
    metadata = credential_of(tenki, session.id, made["key"])
    frames = tenki.data_plane.Run(commands(session.id, "sleep", "600"), metadata=metadata)
    assert next(frames).frame.HasField("started")
    key(tenki.process, "revoke", made["id"])
    with pytest.raises(grpc.RpcError) as caught:
        list(frames)
    assert refused(caught).code is grpc.StatusCode.UNAUTHENTICATED
    assert answer(tenki, metadata) is grpc.StatusCode.UNAUTHENTICATED
    reader = key(tenki.process, "create", "--role", "read-only")["key"]
    with pytest.raises(grpc.RpcError) as caught:
        credential_of(tenki, session.id, reader)
    assert refused(caught).code is grpc.StatusCode.PERMISSION_DENIED


def test_what_is_another_tenants_is_not_there(
    tenki: Tenki, session: records_pb2.SandboxSession
) -> None:
    path = tenki.process.state / "catalog.db"
    with closing(Catalog(path, joining=True)) as catalog, catalog.transaction() as tx:
        workspaces.insert(tx, Workspace(name="others", created_at=tx.now))
    other = key(tenki.process, "create", "--role", "user", "--workspace", "others")["key"]

    def asked(method: str, request: Any) -> Refused:
        with pytest.raises(grpc.RpcError) as caught:
            tenki.call(method, request, api_key=other)
        return refused(caught)

    taken = tenki.call(
        "CreateSnapshot", sandbox_pb2.CreateSnapshotRequest(session_id=session.id)
    ).snapshot
    missing = mint()
    of_sessions: list[tuple[str, Any]] = [
        (name, getattr(sandbox_pb2, f"{name}Request"))
        for name in (
            "GetSession", "CreateSessionCredential", "PauseSession", "ResumeSession",
            "TerminateSession", "UpdateSession", "ExtendSession", "CreateSnapshot",
            "ListSessionSnapshots", "GetSessionMetrics",
        )
    ]  # fmt: skip
    for name, make in of_sessions:
        theirs = asked(name, make(session_id=session.id))
        assert theirs == asked(name, make(session_id=missing)), name
        assert theirs == Refused(grpc.StatusCode.NOT_FOUND, "session not found"), name
    for name in ("GetSnapshot", "DeleteSnapshot", "UpdateSnapshot", "GetSnapshotDownloadURL"):
        found = asked(name, getattr(sandbox_pb2, f"{name}Request")(snapshot_id=taken.id))
        assert found == Refused(grpc.StatusCode.NOT_FOUND, f"snapshot {taken.id} not found"), name
    restore = sandbox_pb2.CreateSessionRequest(snapshot_id=taken.id)
    assert asked("CreateSession", restore).text == f"snapshot {taken.id} not found"
    for name in ("ListSessions", "ListWorkspaceSandboxes", "ListWorkspaceSnapshots"):
        listed = tenki.call(name, getattr(sandbox_pb2, f"{name}Request")(), api_key=other)
        assert not listed.ListFields(), name
    facets = tenki.call(
        "ListWorkspaceSandboxes",
        sandbox_pb2.ListWorkspaceSandboxesRequest(include_facets=True),
        api_key=other,
    ).facets
    assert facets.total == 0
    me = tenki.call("WhoAmI", sandbox_pb2.WhoAmIRequest(), api_key=other)
    assert [each.workspace_id for each in me.workspaces] == ["others"]
    tenki.call("DeleteSnapshot", sandbox_pb2.DeleteSnapshotRequest(snapshot_id=taken.id))


def test_a_credential_outlives_the_daemon_that_gave_it_and_not_its_session(
    tenki: Tenki, session: records_pb2.SandboxSession
) -> None:
    good = tenki.credential(session.id)
    tenki.process.stop()
    tenki.process.start().close()
    tenki.connect()
    assert stat(tenki, session.id, good).exists
    tenki.terminate(session.id)
    with pytest.raises(grpc.RpcError) as caught:
        stat(tenki, session.id, good)
    assert refused(caught) == Refused(grpc.StatusCode.FAILED_PRECONDITION, "session is terminated")
