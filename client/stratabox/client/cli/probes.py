"""The options that say what makes a sandbox ready."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar, cast

import click

from stratabox.client.cli.options import DURATION
from stratabox.client.probe_records import ReadinessProbe

F = TypeVar("F", bound=Callable[..., Any])

_TIMES = {
    "ready_interval": "interval",
    "ready_try": "timeout",
    "ready_start_period": "start_period",
}


def probe_options(command: F) -> F:
    """Add --ready-cmd, --ready-port, --ready-http and what goes with them (`readiness_probe`)."""

    @wraps(command)
    def wrapped(
        *args: Any,
        ready_cmd: str | None,
        ready_port: int | None,
        ready_http: str | None,
        no_ready_probe: bool,
        **kwargs: Any,
    ) -> Any:
        times = {
            name: timedelta(seconds=value)
            for option, name in _TIMES.items()
            if (value := kwargs.pop(option)) is not None
        }
        named = [one for one in (ready_cmd, ready_port, ready_http) if one is not None]
        if len(named) + no_ready_probe > 1:
            raise click.UsageError(
                "one of --ready-cmd, --ready-port, --ready-http and --no-ready-probe can be given."
            )
        if times and not named:
            raise click.UsageError(
                "--ready-interval, --ready-try and --ready-start-period are of a probe: give one"
                " of --ready-cmd, --ready-port and --ready-http."
            )
        probe = None
        if named:
            port, path = (ready_port, None) if ready_http is None else _address(ready_http)
            probe = ReadinessProbe(command=ready_cmd, port=port, path=path, **times)
        elif no_ready_probe:
            probe = ReadinessProbe()
        return command(*args, readiness_probe=probe, **kwargs)

    for option in (
        click.option(
            "--no-ready-probe", is_flag=True, help="Its agent's answer is enough, whatever was."
        ),
        click.option(
            "--ready-start-period",
            type=DURATION,
            metavar="DURATION",
            help="How long that may fail until it is an error; as long as is waited.",
        ),
        click.option(
            "--ready-try", type=DURATION, metavar="DURATION", help="What one try may take; 10s."
        ),
        click.option(
            "--ready-interval", type=DURATION, metavar="DURATION", help="Between two tries; 1s."
        ),
        click.option(
            "--ready-http",
            metavar="PORT/PATH",
            help="Ready when GET of that in the guest is answered with 200-399; as 8080/health.",
        ),
        click.option(
            "--ready-port",
            type=click.IntRange(1, 65535),
            metavar="PORT",
            help="Ready when something in the guest listens on that TCP port.",
        ),
        click.option(
            "--ready-cmd", metavar="LINE", help="Ready when this shell line in the guest exits 0."
        ),
    ):
        wrapped = option(wrapped)
    return cast(F, wrapped)


def _address(text: str) -> tuple[int, str]:
    port, _, path = text.removeprefix(":").partition("/")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise click.UsageError(f"--ready-http {text!r} is not PORT/PATH, as 8080/health.")
    return int(port), f"/{path}"
