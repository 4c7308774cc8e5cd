"""Readiness probes as messages."""

from __future__ import annotations

from stratabox.client import _requests
from stratabox.client.errors import InvalidArgumentError
from stratabox.client.probe_records import ReadinessProbe
from stratabox.v1 import records_pb2 as pb


def message(probe: ReadinessProbe | None) -> pb.ReadinessProbe | None:
    """Build the message; none stays none.

    :raise InvalidArgumentError: when it names two checks, or a path without a port.
    """
    if probe is None:
        return None
    if probe.command and (probe.port or probe.path):
        raise InvalidArgumentError("a readiness probe checks a command or a port, not both")
    if probe.path and not probe.port:
        raise InvalidArgumentError("a readiness probe by HTTP needs a port, too")
    with _requests.checked():
        built = pb.ReadinessProbe(
            interval=_requests.duration(probe.interval),
            timeout=_requests.duration(probe.timeout),
            start_period=_requests.duration(probe.start_period),
        )
        if isinstance(probe.command, str) and probe.command:
            built.command.shell = probe.command
        elif probe.command:
            built.command.argv.extend(probe.command)
        elif probe.path:
            built.http.port, built.http.path = probe.port or 0, probe.path
        elif probe.port is not None:
            built.port = probe.port
    return built
