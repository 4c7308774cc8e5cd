"""Tenki's sessions over the wire, as no SDK shows them."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import asyncssh
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from stratabox.storage.model.ids import mint
from stratabox.tenki.v1 import data_plane_pb2, records_pb2, sandbox_pb2
from support.rig import eventually
from support.tenki import VERIFIED, Refused, Tenki, refused

Session = records_pb2.SandboxSession

TERMINATED = Refused(grpc.StatusCode.FAILED_PRECONDITION, "session is terminated")


def duration(**spans: float) -> Duration:
    made = Duration()
    made.FromTimedelta(timedelta(**spans))
    return made


def test_a_session_is_ready_and_reachable_when_its_creation_answers(tenki: Tenki) -> None:
    public = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().strip()
    creating = tenki.control.CreateSession.future(
        sandbox_pb2.CreateSessionRequest(
            name="first", memory_mb=256, tags=["b", "a"], metadata={"for": "tests"},
            ssh_authorized_keys=[public],
        ),
        metadata=tenki.metadata,
    )  # fmt: skip
    search = sandbox_pb2.ListWorkspaceSandboxesRequest(search="first")
    eventually(lambda: tenki.call("ListWorkspaceSandboxes", search).sessions)
    (begun,) = tenki.call("ListWorkspaceSandboxes", search).sessions
    waited = list(tenki.wait(begun.id))
    assert waited[-1].session.state == records_pb2.SESSION_STATE_RUNNING
    assert {each.session.state for each in waited[:-1]} <= {records_pb2.SESSION_STATE_CREATING}
    assert (waited[-1].data_plane_endpoint, waited[-1].route_status) == (tenki.url, VERIFIED)
    made = creating.result()
    session = made.session
    try:
        assert (session.state, session.name) == (records_pb2.SESSION_STATE_RUNNING, "first")
        assert (list(session.tags), dict(session.metadata)) == (["b", "a"], {"for": "tests"})
        assert session.outbound_enabled
        assert session.inbound_enabled
        assert not session.HasField("timeout_at")
        assert made.data_plane_endpoint == tenki.url
        assert made.route_status == VERIFIED
        assert made.credential.expires_at.seconds > time.time()
        assert tenki.get(session.id) == session
        kept = tenki.data_plane.ReadFile(
            data_plane_pb2.SandboxSessionDataPlaneServiceReadFileRequest(
                request=data_plane_pb2.ReadFileRequest(
                    session_id=session.id, path=".ssh/authorized_keys"
                )
            ),
            metadata=[("x-tenki-session-cert", made.credential.credential)],
        )
        assert kept.response.content.decode().split() == public.split()
    finally:
        over = tenki.terminate(session.id)
    assert over.state == records_pb2.SESSION_STATE_TERMINATED
    assert tenki.terminate(session.id).state == over.state, "again is fine"
    with pytest.raises(grpc.RpcError) as caught:
        tenki.credential(session.id)
    assert refused(caught) == TERMINATED


def test_who_is_not_there_is_not_found_by_these_very_words(tenki: Tenki, session: Session) -> None:
    for reference in (mint(), session.name, session.id[:8], session.id.upper(), "", "snapshot"):
        with pytest.raises(grpc.RpcError) as caught:
            tenki.get(reference)
        assert refused(caught) == Refused(grpc.StatusCode.NOT_FOUND, "session not found")
    missing = mint()
    with pytest.raises(grpc.RpcError) as caught:
        tenki.create(snapshot_id=missing)
    assert refused(caught) == Refused(grpc.StatusCode.NOT_FOUND, f"snapshot {missing} not found")


@pytest.mark.parametrize(
    "method", ["SandboxService/CreateTemplate", "SSHGatewayService/List404", "New/Thing"]
)
def test_what_is_not_served_says_so(tenki: Tenki, method: str) -> None:
    call: Any = tenki.channel.unary_unary(f"/tenki.sandbox.v1.{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=tenki.metadata)
    answer = refused(caught)
    assert answer.code is grpc.StatusCode.UNIMPLEMENTED
    assert "does not serve" in answer.text
    assert "404" not in answer.text, "clients would try again for a minute"
    with pytest.raises(grpc.RpcError) as caught:
        call(b"")
    assert refused(caught).code is grpc.StatusCode.UNAUTHENTICATED


def test_what_a_session_cannot_have_is_refused(tenki: Tenki) -> None:
    unserved: list[dict[str, Any]] = [
        {"template_spec_id": mint()},
        {"registry_ref": "a/b:c"},
        {"clone_repo_url": "https://example.org/x.git"},
        {"setup_secrets": {"A": "b"}},
        {"enable_opencode": True},
    ]
    for fields in unserved:
        with pytest.raises(grpc.RpcError) as caught:
            tenki.create(**fields)
        assert refused(caught).code is grpc.StatusCode.UNIMPLEMENTED
    wrong: list[dict[str, Any]] = [
        {"tags": ["Upper"]},
        {"tags": [f"t{number}" for number in range(21)]},
        {"cpu_cores": 0},
        {"ssh_authorized_keys": ["no key"]},
        {"egress": records_pb2.SessionEgressPolicy(allow_cidrs=["127.0.0.0/8"])},
    ]
    for fields in wrong:
        with pytest.raises(grpc.RpcError) as caught:
            tenki.create(**fields)
        assert refused(caught).code is grpc.StatusCode.INVALID_ARGUMENT, fields


# -- lists ----------------------------------------------------------------------------------------


def test_lists_are_searched_sorted_and_counted(tenki: Tenki, session: Session) -> None:
    def names(**fields: Any) -> list[str]:
        request = sandbox_pb2.ListWorkspaceSandboxesRequest(**fields)
        return [each.id for each in tenki.call("ListWorkspaceSandboxes", request).sessions]

    tenki.call(
        "UpdateSession",
        sandbox_pb2.UpdateSessionRequest(
            session_id=session.id, name="needle in hay", tags=["x", "y"], sticky=True
        ),
    )
    assert names(tags=["x", "y"], sticky=True, search="DLE in") == [session.id]
    assert names(search=session.id[:8], states=[records_pb2.SESSION_STATE_RUNNING]) == [session.id]
    for fields in (
        {"tags": ["x", "z"]},
        {"search": "nothing"},
        {"sticky": False, "search": "needle"},
        {"states": [records_pb2.SESSION_STATE_PAUSED], "search": "needle"},
        {"min_memory_mb": 4096, "search": "needle"},
    ):
        assert names(**fields) == [], fields
    for sort_by in records_pb2.SandboxSortField.values():
        assert session.id in names(sort_by=sort_by, sort_desc=True)
    first = tenki.call(
        "ListWorkspaceSandboxes",
        sandbox_pb2.ListWorkspaceSandboxesRequest(
            include_terminated=True, include_facets=True, page_size=1
        ),
    )
    counts = {each.state: each.count for each in first.facets.state_counts}
    assert counts[records_pb2.SESSION_STATE_RUNNING] >= 1
    assert first.facets.total == sum(counts.values())
    everything = names(include_terminated=True)
    assert len(everything) == len(set(everything)) == first.facets.total
    with pytest.raises(grpc.RpcError) as caught:
        names(workspace_id="somebody-elses")
    assert refused(caught).code is grpc.StatusCode.PERMISSION_DENIED


# -- time -----------------------------------------------------------------------------------------


def test_a_session_is_extended_made_sticky_and_given_an_end_again(
    tenki: Tenki, session: Session
) -> None:
    def update(**fields: Any) -> sandbox_pb2.UpdateSessionResponse:
        request = sandbox_pb2.UpdateSessionRequest(session_id=session.id, **fields)
        made: sandbox_pb2.UpdateSessionResponse = tenki.call("UpdateSession", request)
        return made

    created = session.created_at.seconds
    changed = update(sticky=False, max_duration=duration(hours=2)).session
    assert changed.timeout_at.seconds == created + 7200
    longer = tenki.call(
        "ExtendSession",
        sandbox_pb2.ExtendSessionRequest(
            session_id=session.id, additional_duration=duration(minutes=30)
        ),
    ).session
    assert longer.timeout_at.seconds == created + 9000
    sticky = update(sticky=True, max_duration=duration(hours=1))
    assert not sticky.session.HasField("timeout_at")
    assert [each.code for each in sticky.warnings] == [
        records_pb2.SANDBOX_WARNING_CODE_STICKY_OVERRIDES_MAX_DURATION
    ]
    assert update(sticky=False, clear_tags=True).session.timeout_at.seconds == 0
    with pytest.raises(grpc.RpcError) as caught:
        update(max_duration=duration(microseconds=1))
    assert refused(caught).code is grpc.StatusCode.INVALID_ARGUMENT


# -- snapshots, pauses, volumes -------------------------------------------------------------------


def test_a_session_goes_through_its_life(tenki: Tenki) -> None:
    volume = tenki.call(
        "CreateVolume", sandbox_pb2.CreateVolumeRequest(name="data", size_bytes=(16 << 20) - 1)
    ).volume
    assert (volume.state, volume.size_bytes) == (records_pb2.VOLUME_STATE_AVAILABLE, 16 << 20)
    session = tenki.create(
        sticky=False,
        max_duration=duration(hours=1),
        pause_retention=duration(days=1),
        volumes=[records_pb2.VolumeMount(volume_id=volume.id, mount_path="/data")],
    ).session
    (mounted,) = session.volume_attachments
    assert (mounted.volume_id, mounted.mount_path, mounted.state) == (
        volume.id,
        "/data",
        "ATTACHED",
    )
    with pytest.raises(grpc.RpcError) as caught:
        tenki.call("DeleteVolume", sandbox_pb2.DeleteVolumeRequest(volume_id=volume.id))
    assert refused(caught).text.startswith("volume is in use")

    # A snapshot that is asked for, and one that is waited for.
    request = sandbox_pb2.CreateSnapshotRequest(session_id=session.id, name="first")
    setattr(request, "async", True)  # a word of Python's
    begun = tenki.call("CreateSnapshot", request).snapshot
    eventually(lambda: tenki.snapshot(begun.id).state == records_pb2.SNAPSHOT_STATE_READY)
    taken = tenki.snapshot(begun.id)
    assert taken.durability_state == records_pb2.SNAPSHOT_DURABILITY_STATE_DURABLE
    assert (taken.restore_mode, taken.session_id) == ("MEMORY", session.id)
    assert taken.size_bytes >= taken.memory_bytes > 0
    second = tenki.call(
        "CreateSnapshot", sandbox_pb2.CreateSnapshotRequest(session_id=session.id)
    ).snapshot
    assert second.state == records_pb2.SNAPSHOT_STATE_READY
    changed = tenki.call(
        "UpdateSnapshot",
        sandbox_pb2.UpdateSnapshotRequest(snapshot_id=second.id, name="renamed", tags=["kept"]),
    ).snapshot
    assert (changed.name, list(changed.tags)) == ("renamed", ["kept"])
    listed = tenki.call(
        "ListSessionSnapshots", sandbox_pb2.ListSessionSnapshotsRequest(session_id=session.id)
    ).snapshots
    assert [each.id for each in listed] == [second.id, taken.id]

    # Paused: the end of its life is put off, and how long it is kept is told.
    ends = session.timeout_at.seconds
    paused = tenki.pause(session.id)
    assert paused.state == records_pb2.SESSION_STATE_PAUSING
    eventually(lambda: tenki.get(session.id).state == records_pb2.SESSION_STATE_PAUSED)
    kept = tenki.get(session.id)
    assert session.id not in tenki.process.guests()
    assert kept.timeout_at.seconds == ends
    assert abs(kept.pause_expires_at.seconds - kept.paused_at.seconds - 86400) <= 1
    with pytest.raises(grpc.RpcError) as caught:
        tenki.credential(session.id)
    assert refused(caught) == Refused(
        grpc.StatusCode.FAILED_PRECONDITION, "session is not running: state = PAUSED"
    )
    # Its memory is damaged, and put right again.
    resume = sandbox_pb2.ResumeSessionRequest(session_id=session.id)
    ((parked,),) = tenki.process.rows(f"SELECT ram_parked FROM sandboxes WHERE id = '{session.id}'")
    saved = tenki.process.state / "ram" / f"{parked}.state"
    good = saved.read_bytes()
    saved.chmod(0o600)
    saved.write_bytes(good[:-1])
    with pytest.raises(grpc.RpcError) as caught:
        tenki.call("ResumeSession", resume)
    assert "stays paused to disk" in refused(caught).text
    stays = tenki.get(session.id)
    assert stays.state == records_pb2.SESSION_STATE_PAUSED
    assert "stays paused to disk" in stays.last_resume_error
    assert stays.pause_expires_at == kept.pause_expires_at
    saved.write_bytes(good)
    resumed = tenki.call("ResumeSession", resume).session
    assert not resumed.last_resume_error
    assert resumed.state == records_pb2.SESSION_STATE_RUNNING
    assert resumed.timeout_at.seconds >= ends
    assert not resumed.HasField("paused_at")
    waited = list(tenki.wait(session.id))
    assert [each.session.state for each in waited] == [records_pb2.SESSION_STATE_RUNNING]
    assert waited[0].credential.credential.startswith("sc_")

    used = tenki.call(
        "GetSessionMetrics", sandbox_pb2.GetSessionMetricsRequest(session_id=session.id)
    )
    assert used.cpu.average_cores > 0
    assert used.memory.average_bytes > 0
    assert used.memory.limit_bytes == 256 << 20

    # A copy of what it was; its volume stays behind, and can be moved live.
    copy = tenki.create(snapshot_id=taken.id, name="copy").session
    assert copy.source_snapshot_id == taken.id
    assert not copy.volume_attachments
    tenki.call(
        "DetachVolume",
        sandbox_pb2.DetachVolumeRequest(session_id=session.id, volume_id=volume.id),
    )
    moved = tenki.call(
        "AttachVolume",
        sandbox_pb2.AttachVolumeRequest(
            session_id=copy.id,
            volume=records_pb2.VolumeMount(volume_id=volume.id, mount_path="/moved"),
        ),
    ).attachment
    assert (moved.session_id, moved.state) == (copy.id, "ATTACHED")
    in_use = tenki.call("GetVolume", sandbox_pb2.GetVolumeRequest(volume_id=volume.id))
    assert in_use.volume.state == records_pb2.VOLUME_STATE_IN_USE
    assert [each.session_id for each in in_use.active_attachments] == [copy.id]

    over = tenki.call(
        "TerminateSessions",
        sandbox_pb2.TerminateSessionsRequest(session_ids=[session.id, copy.id, "nobody"]),
    )
    assert [each.state for each in over.sessions] == [records_pb2.SESSION_STATE_TERMINATED] * 2
    assert [each.message for each in over.failures] == ["session not found"]
    grown = tenki.call(
        "ResizeVolume",
        sandbox_pb2.ResizeVolumeRequest(volume_id=volume.id, new_size_bytes=32 << 20),
    ).volume
    assert grown.size_bytes == 32 << 20
    dangling = tenki.call("ListDanglingSnapshots", sandbox_pb2.ListDanglingSnapshotsRequest())
    assert {taken.id, second.id} <= {each.id for each in dangling.snapshots}
    for each in (taken.id, second.id):
        gone = tenki.call("DeleteSnapshot", sandbox_pb2.DeleteSnapshotRequest(snapshot_id=each))
        assert gone.snapshot.state == records_pb2.SNAPSHOT_STATE_DELETED
        with pytest.raises(grpc.RpcError) as caught:
            tenki.snapshot(each)
        assert refused(caught) == Refused(grpc.StatusCode.NOT_FOUND, f"snapshot {each} not found")
    tenki.call("DeleteVolume", sandbox_pb2.DeleteVolumeRequest(volume_id=volume.id))
    with pytest.raises(grpc.RpcError) as caught:
        tenki.call("GetVolume", sandbox_pb2.GetVolumeRequest(volume_id=volume.id))
    assert refused(caught) == Refused(grpc.StatusCode.NOT_FOUND, f"volume {volume.id} not found")


def test_a_caller_learns_who_it_is_and_what_is_used(tenki: Tenki, session: Session) -> None:
    me = tenki.call("WhoAmI", sandbox_pb2.WhoAmIRequest())
    assert me.owner_id == tenki.api_key.split("_")[1]
    assert [each.workspace_id for each in me.workspaces] == ["default"]
    usage = tenki.call("GetWorkspaceSandboxUsage", sandbox_pb2.GetWorkspaceSandboxUsageRequest())
    found = {each.key: each.current for each in usage.limits}
    assert found["sandboxes"] >= 1
    assert found["memory_bytes"] >= 256 << 20
