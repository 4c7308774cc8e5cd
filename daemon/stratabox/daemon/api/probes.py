"""Readiness probes as messages, and back."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from google.protobuf import duration_pb2

from stratabox.daemon.api import convert
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.probes import INTERVAL, TIMEOUT, Probe
from stratabox.v1 import records_pb2

_SHELL = ("/bin/sh", "-c")


def put(message: records_pb2.Sandbox | records_pb2.Snapshot, probe: Probe | None) -> None:
    """Write a record's probe into its message; None leaves the field unset."""
    if probe is not None:
        message.readiness_probe.CopyFrom(_message(probe))


def _message(probe: Probe) -> records_pb2.ReadinessProbe:
    message = records_pb2.ReadinessProbe(
        interval=_span(probe.interval),
        timeout=_span(probe.timeout),
        start_period=None if probe.start_period is None else _span(probe.start_period),
    )
    if probe.argv[:2] == _SHELL and len(probe.argv) == 3:
        message.command.shell = probe.argv[2]
    elif probe.argv:
        message.command.argv.extend(probe.argv)
    elif probe.path:
        message.http.port, message.http.path = probe.port, probe.path
    else:
        message.port = probe.port
    return message


def probe_from(request: Any) -> Probe | None:
    """`readiness_probe` of a request or record; None where it is not set.

    What it checks may still be refused: see ``probing.check``.

    :raise InvalidArgumentError: when a check is named and says nothing, or two things.
    """
    if not request.HasField("readiness_probe"):
        return None
    message: records_pb2.ReadinessProbe = request.readiness_probe
    argv: tuple[str, ...] = ()
    port, path = 0, ""
    match message.WhichOneof("check"):
        case "command":
            if bool(message.command.argv) == bool(message.command.shell):
                raise InvalidArgumentError(
                    "name the probe's command once: as argv or as shell",
                    field="readiness_probe.command",
                )
            argv = tuple(message.command.argv) or (*_SHELL, message.command.shell)
        case "port":
            port = _port(message.port)
        case "http":
            port, path = _port(message.http.port), message.http.path or "/"
    start_period = None
    if message.HasField("start_period"):
        start_period = _seconds(message.start_period, "start_period")
    return Probe(
        argv=argv,
        port=port,
        path=path,
        interval=_seconds(message.interval, "interval") or INTERVAL,
        timeout=_seconds(message.timeout, "timeout") or TIMEOUT,
        start_period=start_period,
    )


def _port(port: int) -> int:
    if not port:
        raise InvalidArgumentError("the probe names no port", field="readiness_probe.port")
    return port


def _seconds(span: duration_pb2.Duration, name: str) -> float:
    return convert.seconds_from(span, f"readiness_probe.{name}")


def _span(seconds: float) -> duration_pb2.Duration | None:
    return convert.duration(timedelta(seconds=seconds))
