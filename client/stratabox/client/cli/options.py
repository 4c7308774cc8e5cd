"""Options and types of values that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from stratabox.client.cli.app import App
from stratabox.client.records import SnapshotLevel

F = TypeVar("F", bound=Callable[..., Any])

_SPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
_MILLISECONDS = re.compile(r"(\d+)ms", re.ASCII)
_PLAIN = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def parse_duration(text: str) -> float:
    """Read a span of time, as 90, 30s, 10m, 1h, 1h30m or 500ms; in seconds.

    :raise ValueError: when it is none.
    """
    if _PLAIN.fullmatch(text):
        return float(text)
    if match := _MILLISECONDS.fullmatch(text):
        return int(match[1]) / 1000
    match = _SPAN.fullmatch(text)
    if match is None or not text:
        raise ValueError(f"{text!r} is no span of time as 30s, 10m, 1h or 90 (seconds)")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_rfc3339(text: str) -> datetime:
    """Read a point of time, as 2026-03-20T12:00:00Z; the zone is required.

    :raise ValueError: when it is none.
    """
    if not _RFC3339.fullmatch(text):
        raise ValueError(f"{text!r} is no RFC 3339 time as 2026-03-20T12:00:00Z")
    return datetime.fromisoformat(text.upper())


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # generic only in newer stubs
    _ParamType = click.ParamType


class _Parsed(_ParamType):
    """A type of value that a function reads from text."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text; a default is taken as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _parse_pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    return key, value


DURATION = _Parsed("duration", parse_duration)
TIMESTAMP = _Parsed("rfc3339", parse_rfc3339)
PAIR = _Parsed("key=value", _parse_pair)
LEVELS = click.Choice(
    [str(SnapshotLevel.CRASH), str(SnapshotLevel.APPLICATION), str(SnapshotLevel.MEMORY)]
)


def common(command: F) -> F:
    """Add what every command takes: --address and --json."""

    def set_address(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(App).address = value

    def set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(App).json = True

    address = click.option(
        "--address",
        metavar="ADDRESS",
        expose_value=False,
        is_eager=True,
        callback=set_address,
        help="The daemon's: unix:///PATH or http://HOST:PORT.",
    )
    json = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=set_json,
        help="Print JSON for programs.",
    )
    return address(json(command))


def sandbox_argument(command: F) -> F:
    """Take the sandbox as the argument or as --session, whichever is given; pass `sandbox`."""

    @wraps(command)
    def wrapped(*args: Any, sandbox: str | None, session: str | None, **kwargs: Any) -> Any:
        if sandbox and session and sandbox != session:
            raise click.UsageError(f"both {sandbox!r} and --session {session!r} are named")
        chosen = sandbox or session
        if not chosen:
            raise click.UsageError("Missing the sandbox: an argument, or --session.")
        return command(*args, sandbox=chosen, **kwargs)

    argument = click.argument("sandbox", required=False, metavar="[SANDBOX]")
    option = click.option(
        "--session",
        metavar="SANDBOX",
        help="The sandbox: id, exact name, or unambiguous start of an id.",
    )
    return cast(F, argument(option(wrapped)))


def env_option(command: F) -> F:
    """Add --env."""
    text = "Environment for every command; may be repeated."
    return click.option("--env", type=PAIR, multiple=True, metavar="K=V", help=text)(command)


def metadata_option(command: F) -> F:
    """Add --metadata."""
    text = "A key and value of your own; may be repeated."
    option = click.option("--metadata", type=PAIR, multiple=True, metavar="K=V", help=text)
    return option(command)


def size_options(command: F) -> F:
    """Add --cpus and --memory."""
    memory = click.option("--memory", type=int, metavar="MIB", help="RAM in MiB, 128-32768.")
    cpus = click.option("--cpus", type=int, metavar="N", help="Virtual CPUs, 1-32.")
    return cpus(memory(command))


def ready_options(command: F) -> F:
    """Add --no-wait (as `wait_for_ready`) and --ready-timeout."""
    limit = click.option(
        "--ready-timeout", type=DURATION, metavar="DURATION", help="As 60s; the daemon's default."
    )
    wait = click.option(
        "--wait/--no-wait",
        "wait_for_ready",
        default=True,
        help="Whether to wait until the guest's agent answers.",
    )
    return wait(limit(command))


def level_options(command: F) -> F:
    """Add --level and --quick."""
    quick = click.option("--quick", is_flag=True, default=None, help="The same as --level crash.")
    level = click.option(
        "--level",
        type=LEVELS,
        help="That one or nothing; otherwise the strongest that is possible.",
    )
    return level(quick(command))


def paging_options(command: F) -> F:
    """Add --limit and --page-token."""
    token = click.option("--page-token", metavar="TOKEN", help="Begin where a page ended.")
    limit = click.option(
        "--limit",
        type=click.IntRange(1, 1000),
        help="One page of at most so many; without it, everything.",
    )
    return limit(token(command))


def idempotency_option(command: F) -> F:
    """Add --idempotency-key."""
    text = "The same key within 24 hours returns the same thing."
    return click.option("--idempotency-key", metavar="KEY", help=text)(command)
