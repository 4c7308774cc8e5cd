"""What goes over the wire, as the OpenAPI document shows it. Unknown fields are refused.

The page of Akira's names the fields of its requests and replies; these are exactly those, and no
more where it prints a whole reply. The limits are ``lifecycle.policy``'s, in JSON Schema's words.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from stratabox.daemon.lifecycle import policy

# What `policy.check_name` takes, but for what a pattern cannot count: the bytes of a name of more
# than 63 characters that are not ASCII.
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
_NAME = rf"^[^\s/\\{_CONTROL}][^/\\{_CONTROL}]*$"
_NO_NUL = r"^[^\x00]*$"

Name = Annotated[str, Field(min_length=1, max_length=policy.NAME_BYTES, pattern=_NAME)]
Image = Annotated[str, Field(min_length=1, max_length=255, examples=["debian"])]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=4096)]
EnvValue = Annotated[str, Field(pattern=_NO_NUL, max_length=100_000)]
Env = Annotated[
    dict[EnvName, EnvValue],
    Field(max_length=256, json_schema_extra={"additionalProperties": False}),
]


def _integral(value: object) -> object:
    """JSON has one kind of numbers: 2.0 is as much an integer as 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Integral = BeforeValidator(_integral)
Cpus = Annotated[int, Field(ge=policy.CPUS[0], le=policy.CPUS[-1], examples=[2]), _Integral]
Memory = Annotated[
    int,
    Field(ge=policy.MEMORY[0], le=policy.MEMORY[-1], description="MiB.", examples=[1024]),
    _Integral,
]
Storage = Annotated[
    int,
    Field(ge=policy.STORAGE[0], le=policy.STORAGE[-1], description="Root disk, GiB."),
    _Integral,
]
_WAIT = "Answer only when its guest has answered; else the reply's status is `creating`."


def _seconds(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


Time = Annotated[datetime, PlainSerializer(_seconds, return_type=str), Field(strict=False)]
"""In UTC, to the second."""


class Request(BaseModel):
    """Ancestor of the bodies of requests: exact types, no unknown fields; null is as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Reply(BaseModel):
    """Ancestor of the bodies of replies."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class SandboxStatus(StrEnum):
    """What a sandbox does: `creating` until its guest has answered."""

    CREATING = "creating"
    READY = "ready"
    PAUSED = "paused"
    STOPPED = "stopped"
    FAILED = "failed"
    DELETING = "deleting"


class SnapshotStatus(StrEnum):
    """Where a snapshot is in its life."""

    CREATING = "creating"
    READY = "ready"
    FAILED = "failed"
    DELETING = "deleting"


class Consistency(StrEnum):
    """How consistent a snapshot is."""

    CRASH = "crash"
    APPLICATION = "application"
    MEMORY = "memory"


class Resources(Request):
    """The size of a guest; what is absent is the default's, or the source's."""

    cpus: Cpus | None = Field(default=None)
    memory: Memory | None = Field(default=None)


class DiskResources(Resources):
    """The size of a guest and of its root disk."""

    storage: Storage | None = Field(default=None)


class CreateRequest(Request):
    """A new sandbox, which reaches every public address."""

    image: Image | None = Field(
        default=None,
        description="Name or id of an image; absent, or Akira's default's name: the configured"
        " default.",
    )
    name: Name | None = Field(default=None, description="Absent: made up.")
    resources: DiskResources | None = Field(default=None)
    env: Env = Field(default_factory=dict, description="The environment of all its commands.")
    wait_for_ready: bool = Field(default=False, description=_WAIT)


class RestoreRequest(Request):
    """A new sandbox from a snapshot."""

    name: Name | None = Field(default=None, description="Absent: made up.")
    resources: DiskResources | None = Field(default=None)
    wait_for_ready: bool = Field(default=False, description=_WAIT)


class CloneRequest(Request):
    """A copy of a sandbox as it is now."""

    name: Name | None = Field(default=None, description="Of the clone. Absent: made up.")
    snapshot_name: Name | None = Field(
        default=None, description="Of the intermediate snapshot. Absent: made up."
    )
    resources: Resources | None = Field(
        default=None, description="Storage is inherited from the source."
    )
    image: Image | None = Field(
        default=None,
        description="The source's. Any other is refused: a clone has its source's disks.",
    )
    quick: bool = Field(
        default=False, description="Crash-consistent instead of application-consistent."
    )
    wait_for_ready: bool = Field(default=False, description=_WAIT)


class SnapshotRequest(Request):
    """A snapshot of a sandbox."""

    name: Name | None = Field(default=None, description="Absent: made up.")
    quick: bool = Field(
        default=False, description="Crash-consistent (faster) instead of application-consistent."
    )


class ExecuteRequest(Request):
    """A command for a shell."""

    command: str = Field(
        min_length=1, max_length=131_071, pattern=_NO_NUL, description="A line for /bin/sh."
    )
    cwd: str | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        pattern=_NO_NUL,
        description="Where it starts. Absent: HOME.",
    )
    env: Env = Field(default_factory=dict, description="Added to the sandbox's.")
    timeout: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Seconds, after which it is ended with all that it started.",
    )


class Sandbox(Reply):
    """A sandbox."""

    id: str
    name: str
    created_at: Time
    cpu: int
    """CPUs."""
    memory: int
    """MiB."""
    storage: int
    """Root disk, GiB."""
    status: SandboxStatus


class Snapshot(Reply):
    """A snapshot."""

    id: str
    name: str
    source_sandbox_id: str
    source_sandbox_name: str
    status: SnapshotStatus
    created_at: Time
    consistency: Consistency | None
    """What was achieved; null until it is ready."""


class Clone(Reply):
    """The new sandbox, and the snapshot that it was made from."""

    sandbox: Sandbox
    snapshot: Snapshot


class Deleted(Reply):
    """What was deleted."""

    id: str


class Executed(Reply):
    """What a command did, when it has ended."""

    exit_code: int | None
    """null when a signal ended it."""
    signal: int | None
    stdout: str
    """What is not UTF-8 is replaced by U+FFFD."""
    stderr: str
    stdout_truncated: bool
    stderr_truncated: bool
    timed_out: bool
    duration_ms: int


class ErrorDetail(Reply):
    """What went wrong."""

    code: str
    """Stable, in upper snake case."""
    message: str
    details: dict[str, str]


class Error(Reply):
    """The body of every error."""

    error: ErrorDetail
