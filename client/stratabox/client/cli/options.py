"""Options and types of values that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from stratabox.client.cli.app import App
from stratabox.client.records import Identity, SnapshotLevel, SnapshotSchedule, TimeoutAction

F = TypeVar("F", bound=Callable[..., Any])

_SPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
_MILLISECONDS = re.compile(r"(\d+)ms", re.ASCII)
_SIZE = re.compile(r"(\d+)(?:([KMGT])i?B?)?", re.ASCII)
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


def keys_in(text: str) -> list[str]:
    """Take the keys out of a .pub or authorized_keys file."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def parse_size(text: str) -> int:
    """Read a size, as 512MiB, 10GiB or 1048576; in bytes.

    :raise ValueError: when it is none.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size as 512MiB, 10GiB or 1048576 (bytes)")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


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
SIZE = _Parsed("size", parse_size)
DEFAULT_LEVEL = "STRATABOX_DEFAULT_LEVEL"
"""The level of snapshots whose command names none."""
LEVELS = click.Choice(
    [str(SnapshotLevel.CRASH), str(SnapshotLevel.APPLICATION), str(SnapshotLevel.MEMORY)]
)


def common(command: F) -> F:
    """Add what every command takes: --address, --workspace and --json."""

    def set_address(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(App).address = value

    def set_workspace(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.ensure_object(App).workspace = value

    def set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(App).json = True

    address = click.option(
        "--address",
        metavar="ADDRESS",
        expose_value=False,
        is_eager=True,
        callback=set_address,
        help="The daemon's: unix:///PATH, https://HOST:PORT, or http://HOST:PORT on this host.",
    )
    json = click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=set_json,
        help="Print JSON for programs.",
    )
    workspace = click.option(
        "--workspace",
        metavar="NAME",
        expose_value=False,
        is_eager=True,
        callback=set_workspace,
        help="To work in, for admins; without: the key's own, or default.",
    )
    return address(workspace(json(command)))


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


def default_level(command: F) -> F:
    """Take the level from `DEFAULT_LEVEL` where no option names one."""

    @wraps(command)
    def wrapped(*args: Any, level: str | None, memory: bool, **kwargs: Any) -> Any:
        named = level or memory or kwargs["quick"]
        if not named and (found := os.environ.get(DEFAULT_LEVEL)):
            if found not in LEVELS.choices:
                raise click.UsageError(
                    f"{DEFAULT_LEVEL} is {found!r}; it must be one of {', '.join(LEVELS.choices)}"
                )
            level = found
        return command(*args, level=level, memory=memory, **kwargs)

    return cast(F, wrapped)


def identity_option(command: F) -> F:
    """Add --identity."""
    return click.option(
        "--identity",
        type=click.Choice([str(Identity.KEEP), str(Identity.RENEW)]),
        help="Whether host name, machine-id, SSH host keys and MAC address are new.",
    )(command)


def paused_option(command: F) -> F:
    """Add --paused."""
    text = "Leave it at its first instant, until it is resumed."
    return click.option("--paused", is_flag=True, help=text)(command)


def expiry_options(command: F) -> F:
    """Add --expires-at and --timeout (both as `expires_at`), and --on-timeout."""

    @wraps(command)
    def wrapped(
        *args: Any, expires_at: datetime | None, timeout: float | None, **kwargs: Any
    ) -> Any:
        if timeout is not None:
            if expires_at is not None:
                raise click.UsageError("--timeout and --expires-at name two times")
            expires_at = datetime.now(UTC) + timedelta(seconds=timeout)
        return command(*args, expires_at=expires_at, **kwargs)

    action = click.option(
        "--on-timeout",
        type=click.Choice(
            [str(TimeoutAction.TERMINATE), str(TimeoutAction.PAUSE), str(TimeoutAction.SNAPSHOT)]
        ),
        help="What is done when its time is up: terminate (the default), pause, to disk, or"
        " snapshot and terminate.",
    )
    span = click.option(
        "--timeout", type=DURATION, metavar="DURATION", help="As 2h from now: its time."
    )
    point = click.option(
        "--expires-at", type=TIMESTAMP, metavar="RFC3339", help="As 2026-03-20T12:00:00Z: its time."
    )
    return cast(F, point(span(action(wrapped))))


def keeping_options(command: F) -> F:
    """Add --keep-last, and --snapshot-every and --snapshot-level (both as `snapshot_schedule`)."""

    @wraps(command)
    def wrapped(
        *args: Any, snapshot_every: float | None, snapshot_level: str | None, **kwargs: Any
    ) -> Any:
        if snapshot_level and snapshot_every is None:
            raise click.UsageError("--snapshot-level says how, and --snapshot-every how often.")
        schedule = None
        if snapshot_every is not None:
            schedule = SnapshotSchedule(
                every=timedelta(seconds=snapshot_every),
                level=SnapshotLevel(snapshot_level) if snapshot_level else None,
            )
        return command(*args, snapshot_schedule=schedule, **kwargs)

    level = click.option(
        "--snapshot-level", type=LEVELS, help="Of those that are taken so; as by hand."
    )
    every = click.option(
        "--snapshot-every",
        type=DURATION,
        metavar="DURATION",
        help="As 1h: take snapshots of it by the clock, 1m or more from one to the next.",
    )
    keep = click.option(
        "--keep-last",
        type=click.IntRange(min=0),
        metavar="N",
        help="With each new snapshot, delete its oldest beyond so many; 0: keep all.",
    )
    return cast(F, keep(every(level(wrapped))))


def paging_options(command: F) -> F:
    """Add --limit and --page-token."""
    token = click.option("--page-token", metavar="TOKEN", help="Begin where a page ended.")
    limit = click.option(
        "--limit",
        type=click.IntRange(1, 1000),
        help="One page of at most so many; without it, everything.",
    )
    return limit(token(command))


def volume_option(command: F) -> F:
    """Add --volume (as `volumes`)."""
    return click.option(
        "--volume",
        "volumes",
        multiple=True,
        metavar="VOLUME:/PATH[:ro]",
        help="Mounted there before it is ready, :ro only to be read; may be repeated.",
    )(command)


def idempotency_option(command: F) -> F:
    """Add --idempotency-key."""
    text = "The same key within 24 hours returns the same thing."
    return click.option("--idempotency-key", metavar="KEY", help=text)(command)
