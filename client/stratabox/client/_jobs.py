"""The plans of `client.jobs`."""

from __future__ import annotations

import builtins

from stratabox.client import _convert, _requests
from stratabox.client._plans import Call, Plan
from stratabox.client.background import Job, JobKind, JobState
from stratabox.v1 import jobs_pb2 as pb

SERVICE = "jobs"


class JobPlans:
    """Looking at jobs in the background, holding them and giving them up.

    The daemon plans them by itself, so that chains of layers stay short; only those of the kind
    "compact" are asked for, by `client.snapshots.compact`. A job is named by its id or the start
    of it.
    """

    def list(self, *, include_over: bool = False) -> Plan[builtins.list[Job]]:
        """Return the jobs that wait, run or are paused, oldest first.

        :param include_over: Those of the last day that are over, too.
        """
        with _requests.checked():
            request = pb.ListJobsRequest(include_over=include_over)
        return Call(SERVICE, "ListJobs", request, _jobs)

    def get(self, job: str) -> Plan[Job]:
        """Return one job as it is now."""
        with _requests.checked():
            request = pb.GetJobRequest(job=job)
        return Call(SERVICE, "GetJob", request, job_of)

    def pause(self, job: str) -> Plan[Job]:
        """Hold a job where it is, until it is resumed; paused already is fine.

        :raise InvalidStateError: when it is over.
        """
        with _requests.checked():
            request = pb.PauseJobRequest(job=job)
        return Call(SERVICE, "PauseJob", request, job_of)

    def resume(self, job: str) -> Plan[Job]:
        """Let a paused job go on when its turn comes; one that is not paused is left alone.

        :raise InvalidStateError: when it is over.
        """
        with _requests.checked():
            request = pb.ResumeJobRequest(job=job)
        return Call(SERVICE, "ResumeJob", request, job_of)

    def cancel(self, job: str) -> Plan[Job]:
        """Give a job up: all is as it was before it, and the same is not planned again for a day.

        :raise InvalidStateError: when it is over, or has replaced its layer already.
        """
        with _requests.checked():
            request = pb.CancelJobRequest(job=job)
        return Call(SERVICE, "CancelJob", request, job_of)


def job_of(message: pb.Job) -> Job:
    """Read a job."""
    return Job(
        id=message.id,
        kind=_convert.word(JobKind, message.kind),
        state=_convert.word(JobState, message.state),
        layer_id=message.layer_id,
        snapshot_ids=tuple(message.snapshot_ids),
        sandbox_ids=tuple(message.sandbox_ids),
        done_bytes=message.done_bytes,
        total_bytes=message.total_bytes,
        reason=message.reason or None,
        created_at=_convert.moment(message.created_at),
        started_at=_convert.time(message, "started_at"),
        ended_at=_convert.time(message, "ended_at"),
    )


def _jobs(message: pb.ListJobsResponse) -> builtins.list[Job]:
    return [job_of(one) for one in message.jobs]
