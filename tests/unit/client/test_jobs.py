"""Jobs, in the SDK and on the command line."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from stratabox.client import (
    Client,
    CompactFailedError,
    InvalidStateError,
    JobKind,
    JobNotFoundError,
    JobState,
)
from stratabox.v1 import jobs_pb2 as pb
from stratabox.v1 import snapshots_pb2

SNAPSHOT_ID = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"
JOB_ID = "55555555-6666-4777-8888-999999999999"


def job(**fields: Any) -> pb.Job:
    given: dict[str, Any] = {
        "id": JOB_ID,
        "kind": pb.JOB_KIND_MERGE,
        "state": pb.JOB_STATE_RUNNING,
        "layer_id": "77777777-6666-4777-8888-999999999999",
        "snapshot_ids": [SNAPSHOT_ID],
        "done_bytes": 1 << 20,
        "total_bytes": 4 << 20,
    }
    made = pb.Job(**given | fields)
    made.created_at.FromSeconds(1_700_000_000)
    return made


def test_the_record(daemon: Any) -> None:
    daemon.answers["GetJob"] = job()
    with Client(daemon.address) as client:
        found = client.jobs.get(JOB_ID[:8])
    assert daemon.last("GetJob").job == JOB_ID[:8]
    assert (found.kind, found.state) == (JobKind.MERGE, JobState.RUNNING)
    assert (found.snapshot_ids, found.sandbox_ids) == ((SNAPSHOT_ID,), ())
    assert (found.done_bytes, found.total_bytes) == (1 << 20, 4 << 20)
    assert (found.reason, found.started_at, found.ended_at) == (None, None, None)


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND", JobNotFoundError),
        (grpc.StatusCode.FAILED_PRECONDITION, "INVALID_STATE", InvalidStateError),
    ],
)
def test_errors(
    daemon: Any, make: Any, code: grpc.StatusCode, reason: str, kind: type[Exception]
) -> None:
    daemon.answers["CancelJob"] = make.refusal(code, reason)
    with Client(daemon.address) as client, pytest.raises(kind):
        client.jobs.cancel(JOB_ID)


def test_compact(daemon: Any, run: Any, make: Any) -> None:
    daemon.answers["CompactSnapshot"] = snapshots_pb2.CompactSnapshotResponse(
        snapshot=make.snapshot(), jobs=[job(kind=pb.JOB_KIND_COMPACT, state=pb.JOB_STATE_DONE)]
    )
    done = run("snapshot", "compact", "point")
    assert (done.exit_code, daemon.last("CompactSnapshot").wait) == (0, True)
    assert "compressed snapshot" in done.stdout
    done = run("snapshot", "compact", "point", "--no-wait")
    assert (done.exit_code, daemon.last("CompactSnapshot").wait) == (0, False)
    assert JOB_ID in done.stdout
    done = run("snapshot", "compact", "point", "--json")
    assert json.loads(done.stdout)["jobs"][0]["kind"] == "compact"
    daemon.answers["CompactSnapshot"] = snapshots_pb2.CompactSnapshotResponse(
        snapshot=make.snapshot()
    )
    assert "already" in run("snapshot", "compact", "point").stdout
    daemon.answers["CompactSnapshot"] = make.refusal(
        grpc.StatusCode.FAILED_PRECONDITION, "COMPACT_FAILED"
    )
    with Client(daemon.address) as client, pytest.raises(CompactFailedError):
        client.snapshots.compact("point")
    assert run("snapshot", "compact", "point").exit_code == 1


def test_list(daemon: Any, run: Any) -> None:
    daemon.answers["ListJobs"] = pb.ListJobsResponse(jobs=[job(), job(total_bytes=0)])
    done = run("job", "list", "--all")
    assert done.exit_code == 0
    assert daemon.last("ListJobs").include_over
    assert "merge" in done.stdout
    assert "1.0 MiB" in done.stdout
    done = run("job", "list", "--json")
    assert not daemon.last("ListJobs").include_over
    assert json.loads(done.stdout)["jobs"][0]["state"] == "running"
    daemon.answers["GetJob"] = job()
    assert JOB_ID in run("job", "get", JOB_ID).stdout


@pytest.mark.parametrize(("verb", "rpc"), [("pause", "PauseJob"), ("resume", "ResumeJob")])
def test_one_or_all(daemon: Any, run: Any, verb: str, rpc: str) -> None:
    other = JOB_ID.replace("5", "4")
    daemon.answers["ListJobs"] = pb.ListJobsResponse(jobs=[job(), job(id=other)])
    daemon.answers[rpc] = lambda request: job(id=request.job, state=pb.JOB_STATE_PAUSED)
    assert JOB_ID in run("job", verb, JOB_ID).stdout
    done = run("job", verb, "--all")
    assert done.stdout.splitlines() == [f"{JOB_ID} paused", f"{other} paused"]
    assert len(json.loads(run("job", verb, "--all", "--json").stdout)["jobs"]) == 2
    assert run("job", verb).exit_code == run("job", verb, JOB_ID, "--all").exit_code == 2


def test_cancel(daemon: Any, run: Any) -> None:
    daemon.answers["CancelJob"] = job(state=pb.JOB_STATE_CANCELLED, reason="by request")
    assert "by request" in run("job", "cancel", JOB_ID).stdout
