"""Tenki's messages to arguments: every field that is not served is refused, and none is passed over
that would change what the session is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from stratabox.daemon.access import gate
from stratabox.daemon.lifecycle.policy import Resources
from stratabox.daemon.lifecycle.volumes.claims import Wish
from stratabox.daemon.tenki.errors import UnservedError
from stratabox.storage.model.errors import ForbiddenError, InvalidArgumentError
from stratabox.storage.model.network import NO_NETWORK, PUBLIC, Network, NetworkMode, network
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

MAX_TAGS = 20
NAME_LENGTH = 64
LONGEST = timedelta(days=3660)

_TAG = re.compile(r"[a-z0-9][a-z0-9_:.-]{0,31}")
_UNSERVED = (
    "registry_ref",
    "template_spec_id",
    "tailnet",
    "clone_repo_url",
    "enable_opencode",
    "setup_env",
    "setup_secrets",
    "secret_policies",
    "secret_overrides",
    "nested_virtualization",
)
"""Fields of a request to create; a set one changes what the client would get."""


def require_served(request: sandbox_pb2.CreateSessionRequest) -> None:
    """See that nothing is wanted that there is not here.

    :raise UnservedError: with the field's name.
    """
    for field, value in request.ListFields():
        if field.name in _UNSERVED and value:
            raise UnservedError(f"CreateSession with {field.name}")


def resources(request: sandbox_pb2.CreateSessionRequest) -> Resources:
    """The size of a guest."""
    return Resources(
        cpus=request.cpu_cores if request.HasField("cpu_cores") else None,
        memory=request.memory_mb if request.HasField("memory_mb") else None,
        storage=request.disk_size_gb if request.HasField("disk_size_gb") else None,
    )


def reach(request: sandbox_pb2.CreateSessionRequest) -> Network:
    """What a new session may reach: every public address, unless something else is said.

    :raise InvalidArgumentError: for an egress policy that cannot be.
    """
    if request.HasField("allow_outbound") and not request.allow_outbound:
        return NO_NETWORK
    named = [*request.egress.allow_domains, *request.egress.allow_cidrs]
    return network(NetworkMode.EGRESS, named or [PUBLIC])


def wishes(mounts: Iterable[records_pb2.VolumeMount]) -> list[Wish]:
    """The volumes that a session is to have."""
    return [
        Wish(volume=each.volume_id, path=each.mount_path, read_only=each.readonly)
        for each in mounts
    ]


def tags(given: Sequence[str]) -> tuple[str, ...]:
    """Tags, each once. :raise InvalidArgumentError: for one that cannot be, or too many."""
    if len(given) > MAX_TAGS:
        raise InvalidArgumentError(
            f"{len(given)} tags; at most {MAX_TAGS} are allowed", field="tags"
        )
    for tag in given:
        if not _TAG.fullmatch(tag):
            raise InvalidArgumentError(
                f"tag {tag[:40]!r} must be 1-32 lower-case letters, digits, '_', ':', '.' or '-',"
                " and start with a letter or digit",
                field="tags",
            )
    return tuple(dict.fromkeys(given))


def name(given: str) -> str:
    """A new name. :raise InvalidArgumentError: when it is too long."""
    if len(given) > NAME_LENGTH:
        raise InvalidArgumentError(
            f"name has {len(given)} characters; at most {NAME_LENGTH} are allowed", field="name"
        )
    return given


def span(message: duration_pb2.Duration, field: str) -> timedelta:
    """A span of time. :raise InvalidArgumentError: when it is not one, or longer than 10 years."""
    try:
        found = message.ToTimedelta()
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"{field} is not a span of time", field=field) from error
    if not timedelta(0) < found <= LONGEST:
        raise InvalidArgumentError(
            f"{field} of {found.total_seconds():g} s is not within 0 s - {LONGEST.days} days",
            field=field,
        )
    return found


def time(message: timestamp_pb2.Timestamp, field: str) -> datetime:
    """A time. :raise InvalidArgumentError: when it is outside the calendar."""
    try:
        return message.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgumentError(f"{field} is not a time", field=field) from error


def require_workspace(workspace: str) -> None:
    """See that a request that names a workspace means its caller's.

    :raise ForbiddenError: FORBIDDEN; whether there is another one is not told.
    """
    if workspace and workspace != gate.current.get().workspace:
        raise ForbiddenError("this key is not one of that workspace")


def enum_name(kind: Any, value: int, field: str) -> str:
    """The name of an enum's value. :raise InvalidArgumentError: when it has none."""
    try:
        name: str = kind.Name(value)
    except ValueError as error:
        raise InvalidArgumentError(f"{field} cannot be {value}", field=field) from error
    return name
