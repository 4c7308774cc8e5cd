"""What callers hear when the daemon is told to end: one reason, DAEMON_ENDING, in all protocols.

Metadata `begun` of calls is "yes" or "no"; after a "no" the same call may be made again whatever it
does.
"""

from __future__ import annotations

from stratabox.storage.model.errors import UnavailableError


class DaemonEndingError(UnavailableError):
    """The daemon is ending."""

    default_reason = "DAEMON_ENDING"


def not_begun() -> DaemonEndingError:
    """To a call that came too late."""
    return DaemonEndingError(
        "the daemon is ending: nothing was begun; ask again when it is back", begun="no"
    )


def broken_off() -> DaemonEndingError:
    """To a call that was not over in time."""
    return DaemonEndingError(
        "the daemon is ending, and this call was not over in time: what it had begun is broken off"
        " and undone, or goes on to its end; when the daemon is back, look what has come of it, or"
        " ask again with the same idempotency key",
        begun="yes",
    )


def watch_again() -> DaemonEndingError:
    """To whoever watches."""
    return DaemonEndingError("the daemon is ending: watch again when it is back")
