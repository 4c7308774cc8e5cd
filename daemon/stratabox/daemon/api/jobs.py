"""JobsService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import unary
from stratabox.daemon.lifecycle.chains.jobs import Jobs
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import chains
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.records import Job
from stratabox.v1 import jobs_pb2, jobs_pb2_grpc

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class JobsServicer(jobs_pb2_grpc.JobsServiceServicer):
    """Message in, one call, message out."""

    world: World
    jobs: Jobs

    @unary
    async def ListJobs(
        self, request: jobs_pb2.ListJobsRequest, context: Context
    ) -> jobs_pb2.ListJobsResponse:
        """List jobs, oldest first."""
        found = await self.jobs.everything(over=request.include_over)
        return jobs_pb2.ListJobsResponse(jobs=await as_messages(self.world, found))

    @unary
    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.Job:
        """Return one job."""
        return await self._message(await self.jobs.get(request.job))

    @unary
    async def PauseJob(self, request: jobs_pb2.PauseJobRequest, context: Context) -> jobs_pb2.Job:
        """Hold a job."""
        return await self._message(await self.jobs.pause(request.job))

    @unary
    async def ResumeJob(self, request: jobs_pb2.ResumeJobRequest, context: Context) -> jobs_pb2.Job:
        """Let a job go on."""
        return await self._message(await self.jobs.resume(request.job))

    @unary
    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Context) -> jobs_pb2.Job:
        """Give a job up."""
        return await self._message(await self.jobs.cancel(request.job))

    async def _message(self, job: Job) -> jobs_pb2.Job:
        return (await as_messages(self.world, [job]))[0]


async def as_messages(world: World, found: Sequence[Job]) -> list[jobs_pb2.Job]:
    """Jobs' messages, in their order."""

    def look(tx: Transaction) -> list[jobs_pb2.Job]:
        return [_message(job, chains.concerned(tx, job)) for job in found]

    return await world.read(look)


def _message(job: Job, concerned: chains.Concerned) -> jobs_pb2.Job:
    return jobs_pb2.Job(
        id=job.id,
        kind=jobs_pb2.JobKind.Value(f"JOB_KIND_{job.kind.upper()}"),
        state=jobs_pb2.JobState.Value(f"JOB_STATE_{job.state.upper()}"),
        layer_id=job.layer,
        snapshot_ids=concerned.snapshots,
        sandbox_ids=concerned.sandboxes,
        done_bytes=job.done_bytes,
        total_bytes=job.total_bytes,
        reason=job.reason,
        created_at=convert.timestamp(job.created_at),
        started_at=convert.timestamp(job.started_at) if job.started_at else None,
        ended_at=convert.timestamp(job.ended_at) if job.ended_at else None,
    )
