"""The errors of what is seen of guests from outside: part of the tree in `errors`."""

from __future__ import annotations

from stratabox.client import errors


class ProbeFailedError(errors.FailedError):
    """A readiness probe did not pass in time; metadata `failure` has why its last try did not."""

    default_reason = "PROBE_FAILED"


class ConsoleUnavailableError(errors.UnavailableError):
    """The guest's console is not connected: stop and start it."""

    default_reason = "CONSOLE_UNAVAILABLE"


class ConsoleNotReadError(errors.UnavailableError):
    """Nothing in the guest reads its console; metadata `written` says how much was taken."""

    default_reason = "CONSOLE_NOT_READ"


errors.learn(ProbeFailedError, ConsoleUnavailableError, ConsoleNotReadError)
