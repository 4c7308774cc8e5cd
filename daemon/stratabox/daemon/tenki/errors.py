"""Our errors in Tenki's words.

Its clients make an exception of a code and of what they find anywhere in the text: a session's
NOT_FOUND whose text has "volume" in it, in a name that a user has chosen, would become the wrong
one. So each text is said here that they look at, and of the others none is let through that holds
a word that they would take for something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import grpc
from google.rpc import status_pb2

from stratabox.daemon.rpc import errors as rpc
from stratabox.storage.model.errors import DeniedError, InvalidArgumentError, StrataboxError
from stratabox.storage.model.ids import is_id
from stratabox.storage.model.states import SandboxState

_TELLING: Mapping[grpc.StatusCode, tuple[str, ...]] = {
    grpc.StatusCode.NOT_FOUND: (
        "template",
        "snapshot",
        "volume",
        "registry image",
        "no such file or directory",
        "artifact",
    ),
    grpc.StatusCode.ALREADY_EXISTS: ("template",),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        "maximum exposed ports",
        "rate limit",
        "volume",
        "capacity",
    ),
    grpc.StatusCode.FAILED_PRECONDITION: (
        "template runtime failed",
        "terminated",
        "sync_pending",
        "sync pending",
        "volume is attached",
        "volume is in use",
        "inbound access is disabled",
        "build in progress",
        "snapshot not yet durable",
    ),
}
"""What clients look for in texts, by code."""

_TERMINATED = "session is terminated"

_MEANT: Mapping[str, tuple[str, ...]] = {
    "SNAPSHOT_NOT_FOUND": ("snapshot",),
    "VOLUME_NOT_FOUND": ("volume",),
    "IMAGE_NOT_FOUND": ("registry image",),
    "FILE_NOT_FOUND": ("no such file or directory",),
    "SESSION_TERMINATED": ("terminated",),
    "VOLUME_IN_USE": ("volume is in use",),
    "INBOUND_DISABLED": ("inbound access is disabled",),
    "TOO_MANY_PORTS": ("maximum exposed ports",),
    "RATE_LIMITED": ("rate limit",),
    "TOO_MANY_CALLS": ("rate limit",),
    "ADMISSION_REFUSED": ("capacity",),
}
"""Which of them a reason's text is to hold."""

_PLAIN: Mapping[str, str] = {
    "FILE_NOT_FOUND": "no such file or directory",
    "VOLUME_IN_USE": "volume is in use",
    "IMAGE_NOT_FOUND": "registry image not found",
    "ADMISSION_REFUSED": "the host has no capacity left for it",
}
"""Texts without a name in them, for where a name would mislead."""


class UnservedError(InvalidArgumentError):
    """What Tenki has and this daemon does not. UNSERVED.

    :param what: as the client calls it.
    """

    default_reason = "UNSERVED"

    def __init__(self, what: str) -> None:
        named = "" if "404" in what else f" {what}"  # which clients take for a passing trouble
        super().__init__(
            f"this is a Stratabox daemon, which does not serve{named}; its docs/compatibility.md"
            " says what it does"
        )


def not_running(state: str) -> DeniedError:
    """For what takes a session that runs; clients stop asking when they read PAUSED.

    :param state: Tenki's name of it, as "PAUSED".
    """
    return DeniedError(
        f"session is not running: state = {state}", reason="SESSION_NOT_RUNNING", state=state
    )


def terminated() -> DeniedError:
    """For what takes a session that is not over."""
    return DeniedError(_TERMINATED, reason="SESSION_TERMINATED")


def status_of(error: StrataboxError) -> status_pb2.Status:
    """An error as Tenki's clients understand it."""
    status = rpc.status_of(error)
    if isinstance(error, UnservedError):
        status.code = grpc.StatusCode.UNIMPLEMENTED.value[0]
        return status
    code = rpc.code_of(error)
    said = _SAID.get(error.reason)
    if said is not None:
        status.message = said(error)
    meant = _MEANT.get(error.reason, ())
    text = status.message.lower()
    if text != _TERMINATED and any(
        word in text for word in _TELLING.get(code, ()) if word not in meant
    ):
        status.message = _PLAIN.get(error.reason, error.reason.lower().replace("_", " "))
    return status


_answering = rpc.Answering(status_of)
unary = _answering.unary
"""Has a method answer one message."""
streaming = _answering.streaming
"""Has a method answer a stream of messages."""


def _named(noun: str) -> Callable[[StrataboxError], str]:
    def say(error: StrataboxError) -> str:
        reference = error.metadata.get(noun, "")
        return f"{noun} {reference} not found" if is_id(reference) else f"{noun} not found"

    return say


def _state(error: StrataboxError) -> str:
    state = error.metadata.get("state")
    if state is None or "sandbox" not in error.metadata:
        return error.message
    if state in (SandboxState.TERMINATING, SandboxState.TERMINATED):
        return _TERMINATED
    return not_running(state.upper()).message


_SAID: Mapping[str, Callable[[StrataboxError], str]] = {
    "SANDBOX_NOT_FOUND": lambda error: "session not found",
    "SNAPSHOT_NOT_FOUND": _named("snapshot"),
    "VOLUME_NOT_FOUND": _named("volume"),
    "IMAGE_NOT_FOUND": lambda error: f"registry image not found: {error.message}",
    "VOLUME_IN_USE": lambda error: f"volume is in use: {error.message}",
    "ADMISSION_REFUSED": lambda error: f"no capacity: {error.message}",
    "INVALID_STATE": _state,
}
"""Texts that are said otherwise than ours, by reason."""
