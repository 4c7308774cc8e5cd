"""Pieces of requests, built from what callers give. Pure."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from enum import Enum

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from stratabox.client import _convert
from stratabox.client.errors import InvalidArgumentError
from stratabox.client.network_records import Network, NetworkMode
from stratabox.client.records import (
    Identity,
    SnapshotLevel,
    SnapshotSchedule,
    TimeoutAction,
    VolumeMount,
)
from stratabox.v1 import network_pb2, records_pb2

#: Seconds, or a timedelta.
Seconds = float | timedelta

_LONGEST = 10_000 * 365 * 24 * 3600.0  # seconds; what a Duration can hold, roughly


class Unset(Enum):
    """Stands for "leave it as it is" where None means something else."""

    UNSET = "unset"


UNSET = Unset.UNSET


@contextmanager
def checked() -> Generator[None]:
    """Turn protobuf's complaint about a value into ours.

    :raise InvalidArgumentError: for a number that does not fit its field, or text that is no UTF-8.
    """
    try:
        yield
    except ValueError as error:
        raise InvalidArgumentError(str(error)) from error


def seconds(value: Seconds | None) -> float:
    """Turn a time span into seconds; none is 0.

    :raise InvalidArgumentError: when it is negative, or no span that can be sent.
    """
    if value is None:
        return 0.0
    count = value.total_seconds() if isinstance(value, timedelta) else float(value)
    if not 0 <= count <= _LONGEST:
        raise InvalidArgumentError(f"{value} is no span of time to wait")
    return count


def duration(value: Seconds | None) -> Duration | None:
    """Turn a time span into a message; none stays none."""
    if value is None:
        return None
    message = Duration()
    message.FromNanoseconds(round(seconds(value) * 1e9))
    return message


def timestamp(value: datetime | None) -> Timestamp | None:
    """Turn a point of time into a message; none stays none.

    :raise InvalidArgumentError: when it has no time zone.
    """
    if value is None:
        return None
    if value.tzinfo is None:
        raise InvalidArgumentError(f"the time {value.isoformat()} has no time zone")
    message = Timestamp()
    message.FromDatetime(value)
    return message


def resources(
    cpus: int | None, memory: int | None, storage: int | None = None
) -> records_pb2.Resources | None:
    """Build the size of a guest; none when nothing of it is given."""
    if cpus is None and memory is None and storage is None:
        return None
    with checked():
        return records_pb2.Resources(cpus=cpus, memory=memory, storage=storage)


def identity(named: Identity | str | None) -> records_pb2.IdentityPolicy.ValueType:
    """Choose the policy to ask for.

    :raise InvalidArgumentError: when there is no such policy.
    """
    if named is None:
        return records_pb2.IDENTITY_POLICY_UNSPECIFIED
    chosen: records_pb2.IdentityPolicy.ValueType = _convert.number(Identity, named)
    return chosen


def on_timeout(
    named: TimeoutAction | str | None,
) -> records_pb2.TimeoutAction.ValueType:
    """Choose what is done when the time is up; none is the daemon's default.

    :raise InvalidArgumentError: when there is no such action.
    """
    if named is None:
        return records_pb2.TIMEOUT_ACTION_UNSPECIFIED
    chosen: records_pb2.TimeoutAction.ValueType = _convert.number(TimeoutAction, named)
    return chosen


def schedule(
    value: SnapshotSchedule | Seconds | None,
) -> records_pb2.SnapshotSchedule | None:
    """Turn a schedule, or how often, into a message; none stays none."""
    if value is None:
        return None
    if not isinstance(value, SnapshotSchedule):
        value = SnapshotSchedule(every=timedelta(seconds=seconds(value)))
    return records_pb2.SnapshotSchedule(
        every=duration(value.every), level=level(value.level, quick=None)
    )


def level(
    named: SnapshotLevel | str | None, quick: bool | None
) -> records_pb2.SnapshotLevel.ValueType:
    """Choose the level to ask for; `quick` is another word for crash.

    :raise InvalidArgumentError: when the two contradict each other, or there is no such level.
    """
    if quick:
        if named is not None and named != SnapshotLevel.CRASH:
            raise InvalidArgumentError(f"quick means level crash, not {named!s}")
        named = SnapshotLevel.CRASH
    if named is None:
        return records_pb2.SNAPSHOT_LEVEL_UNSPECIFIED
    chosen: records_pb2.SnapshotLevel.ValueType = _convert.number(SnapshotLevel, named)
    return chosen


def network(
    value: Network | str | Sequence[str] | None,
) -> network_pb2.Network | None:
    """Turn a policy, "none", "egress", or what is allowed into a message; none stays none."""
    if value is None:
        return None
    if isinstance(value, str):
        mode = NetworkMode(value) if value in list(NetworkMode) else None
        if mode not in (NetworkMode.NONE, NetworkMode.EGRESS):
            raise InvalidArgumentError(
                f'{value!r} is no network: "none", "egress", or a list of what is allowed'
            )
        value = Network(mode=mode, allow=("public",) if mode is NetworkMode.EGRESS else ())
    elif not isinstance(value, Network):
        value = Network(allow=tuple(value))
    with checked():
        return network_pb2.Network(mode=_convert.number(NetworkMode, value.mode), allow=value.allow)


def mounts(volumes: Sequence[VolumeMount | str]) -> list[records_pb2.VolumeMount]:
    """Build the volumes that a new sandbox gets.

    :raise InvalidArgumentError: when a text is not VOLUME:/PATH, or that with :ro behind.
    """
    with checked():
        return [
            records_pb2.VolumeMount(volume=one.volume, path=one.path, read_only=one.read_only)
            for one in (mount(each) if isinstance(each, str) else each for each in volumes)
        ]


def mount(text: str) -> VolumeMount:
    """Read VOLUME:/PATH, with :ro behind where it is only to be read.

    :raise InvalidArgumentError: when it is not that.
    """
    volume, found, path = text.partition(":/")
    read_only = path.endswith(":ro")
    if not found or not volume:
        raise InvalidArgumentError(f"{text!r} is not VOLUME:/PATH or VOLUME:/PATH:ro")
    return VolumeMount(volume=volume, path=f"/{path.removesuffix(':ro')}", read_only=read_only)
