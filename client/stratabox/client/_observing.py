"""The plans of `client.sandboxes` that look at sandboxes from outside: consoles and metrics."""

from __future__ import annotations

from collections.abc import Sequence

from stratabox.client import _convert, _requests
from stratabox.client._plans import Call, Plan, Stream
from stratabox.client._requests import Seconds
from stratabox.client.errors import SandboxNotFoundError
from stratabox.client.observed_records import (
    ConsoleOutput,
    DiskMetrics,
    Metrics,
    NetworkMetrics,
    ProcessMetrics,
    SandboxMetrics,
)
from stratabox.client.records import SandboxState
from stratabox.v1 import console_pb2, metrics_pb2


class ObservingPlans:
    """Consoles and metrics: no guest is asked or disturbed by any of it."""

    def console_log(self, sandbox: str) -> Plan[bytes]:
        """Return what is kept of a sandbox's serial console, also when it does not run.

        The bytes are the guest's own, control sequences of terminals included.
        """
        with _requests.checked():
            request = console_pb2.GetConsoleLogRequest(sandbox=sandbox)
        return Call("console", "GetConsoleLog", request, lambda message: bytes(message.data))

    def watch_console(self, sandbox: str, *, from_log: bool = False) -> Stream[ConsoleOutput]:
        """Follow what a guest writes to its serial console, until its process ends.

        The first output has no bytes and says that the watch has begun. A caller that is too slow
        loses bytes, and is told how many.

        :param from_log: All that is kept comes first, without a gap.
        :raise InvalidStateError: when the sandbox has no process.
        """
        with _requests.checked():
            request = console_pb2.WatchConsoleRequest(sandbox=sandbox, from_log=from_log)
        return Stream("console", "WatchConsole", request, _output)

    def write_console(self, sandbox: str, data: bytes | str) -> Plan[None]:
        """Type something into a sandbox's serial console; return when all of it was taken.

        :param data: 64 KiB at most.
        :raise InvalidStateError: when the sandbox has no process.
        :raise ConsoleNotReadError: when nothing in the guest reads it.
        """
        typed = data.encode() if isinstance(data, str) else data
        with _requests.checked():
            request = console_pb2.WriteConsoleRequest(sandbox=sandbox, data=typed)
        return Call("console", "WriteConsole", request, lambda message: None)

    def metrics(self, sandbox: str) -> Plan[SandboxMetrics]:
        """Return what one sandbox uses of the host; takes 0.2 s, to measure its CPU share."""
        with _requests.checked():
            request = metrics_pb2.GetMetricsRequest(sandboxes=[sandbox])

        def only(message: metrics_pb2.Metrics) -> SandboxMetrics:
            found = _metrics(message).sandboxes
            if not found:
                raise SandboxNotFoundError(f"the sandbox {sandbox} was deleted just now")
            return found[0]

        return Call("metrics", "GetMetrics", request, only)

    def list_metrics(self, sandboxes: Sequence[str] = ()) -> Plan[Metrics]:
        """Return what several sandboxes use of the host, all at one time.

        :param sandboxes: None given: all that have a process.
        """
        with _requests.checked():
            request = metrics_pb2.GetMetricsRequest(sandboxes=sandboxes)
        return Call("metrics", "GetMetrics", request, _metrics)

    def watch_metrics(
        self, sandboxes: Sequence[str] = (), *, interval: Seconds | None = None
    ) -> Stream[Metrics]:
        """Follow what sandboxes use of the host, for as long as the caller reads.

        :param sandboxes: None given: all that have a process, also those to come.
        :param interval: 0.2 s to 1 hour; None: 1 s.
        :raise InvalidArgumentError: when the interval is not within that.
        """
        with _requests.checked():
            request = metrics_pb2.WatchMetricsRequest(
                sandboxes=sandboxes, interval=_requests.duration(interval)
            )
        return Stream("metrics", "WatchMetrics", request, _metrics)


def _output(message: console_pb2.ConsoleOutput) -> ConsoleOutput:
    return ConsoleOutput(data=message.data, lost_bytes=message.lost_bytes)


def _metrics(message: metrics_pb2.Metrics) -> Metrics:
    return Metrics(
        time=_convert.moment(message.time),
        sandboxes=tuple(_sandbox(one) for one in message.sandboxes),
    )


def _sandbox(message: metrics_pb2.SandboxMetrics) -> SandboxMetrics:
    network = message.network
    return SandboxMetrics(
        sandbox_id=message.sandbox_id,
        name=message.name,
        state=_convert.word(SandboxState, message.state),
        cpus=message.cpus,
        memory=message.memory,
        process=_process(message.process) if message.HasField("process") else None,
        disks=tuple(
            DiskMetrics(
                device=disk.device,
                read_bytes=disk.read_bytes,
                written_bytes=disk.written_bytes,
                read_operations=disk.read_operations,
                write_operations=disk.write_operations,
                flush_operations=disk.flush_operations,
            )
            for disk in message.disks
        ),
        own_bytes=message.own_bytes,
        network=NetworkMetrics(
            received_bytes=network.received_bytes,
            sent_bytes=network.sent_bytes,
            received_packets=network.received_packets,
            sent_packets=network.sent_packets,
            refused=network.refused,
        ),
    )


def _process(message: metrics_pb2.ProcessMetrics) -> ProcessMetrics:
    return ProcessMetrics(
        uptime=message.uptime.ToTimedelta(),
        cpu_time=message.cpu_time.ToTimedelta(),
        cpu_share=message.cpu_share if message.HasField("cpu_share") else None,
        rss_bytes=message.rss_bytes,
        pss_bytes=message.pss_bytes if message.HasField("pss_bytes") else None,
        private_bytes=message.private_bytes if message.HasField("private_bytes") else None,
    )
