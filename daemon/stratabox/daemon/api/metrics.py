"""MetricsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.hypervisor.network.walls import Counters
from stratabox.daemon.lifecycle.common.ending import until_end
from stratabox.daemon.lifecycle.observing.metrics import Meter, Metrics, Sample
from stratabox.daemon.lifecycle.world import World
from stratabox.v1 import metrics_pb2, metrics_pb2_grpc, records_pb2

Context = ServicerContext[Any, Any]

_INTERVAL = 1.0


@dataclass(frozen=True, kw_only=True)
class MetricsServicer(metrics_pb2_grpc.MetricsServiceServicer):
    """Message in, one call, message out."""

    world: World
    meter: Meter

    @unary
    async def GetMetrics(
        self, request: metrics_pb2.GetMetricsRequest, context: Context
    ) -> metrics_pb2.Metrics:
        """Return the metrics of some sandboxes, or of all that run."""
        return _sample(await self.meter.once(request.sandboxes))

    @streaming
    async def WatchMetrics(
        self, request: metrics_pb2.WatchMetricsRequest, context: Context
    ) -> AsyncIterator[metrics_pb2.Metrics]:
        """Stream them."""
        every = _INTERVAL
        if request.HasField("interval"):
            every = convert.seconds_from(request.interval, "interval")
        samples = self.meter.again(request.sandboxes, every)
        async for sample in until_end(self.world.bus, samples):
            yield _sample(sample)


def _sample(sample: Sample) -> metrics_pb2.Metrics:
    return metrics_pb2.Metrics(
        time=convert.timestamp(sample.time),
        sandboxes=[_message(each) for each in sample.sandboxes],
    )


def _network(counted: Counters | None) -> metrics_pb2.NetworkMetrics:
    if counted is None:
        return metrics_pb2.NetworkMetrics()
    return metrics_pb2.NetworkMetrics(
        received_bytes=counted.received_bytes,
        sent_bytes=counted.sent_bytes,
        received_packets=counted.received_packets,
        sent_packets=counted.sent_packets,
        refused=counted.refused + counted.names_refused,
    )


def _message(each: Metrics) -> metrics_pb2.SandboxMetrics:
    record, process, memory = each.sandbox, each.process, each.memory
    message = metrics_pb2.SandboxMetrics(
        sandbox_id=record.id,
        name=record.name,
        state=records_pb2.SandboxState.Value(f"SANDBOX_STATE_{record.state.upper()}"),
        cpus=record.cpus,
        memory=record.memory,
        own_bytes=each.own_bytes,
        disks=[
            metrics_pb2.DiskMetrics(
                device=disk.device,
                read_bytes=disk.read_bytes,
                written_bytes=disk.written_bytes,
                read_operations=disk.reads,
                write_operations=disk.writes,
                flush_operations=disk.flushes,
            )
            for disk in each.disks
        ],
        network=_network(each.network),
    )
    if process is not None:
        message.process.CopyFrom(
            metrics_pb2.ProcessMetrics(
                uptime=convert.duration(timedelta(seconds=process.uptime)),
                cpu_time=convert.duration(timedelta(seconds=process.cpu)),
                cpu_share=each.cpu_share,
                rss_bytes=process.rss,
                pss_bytes=memory.pss if memory else None,
                private_bytes=memory.private if memory else None,
            )
        )
    return message
