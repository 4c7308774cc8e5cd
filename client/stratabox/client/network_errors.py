"""The errors of what sandboxes may reach."""

from __future__ import annotations

from stratabox.client import errors


class NetworkUnavailableError(errors.DeniedError):
    """The host lacks what a network needs; the message says what to install."""

    default_reason = "NETWORK_UNAVAILABLE"


class NetworkUnsupportedError(errors.DeniedError):
    """The machine is of before there was a network: stop and start it, or restore it cold."""

    default_reason = "NETWORK_UNSUPPORTED"


class NetworkFailedError(errors.FailedError):
    """The network's helper did not come up or has ended; the message has its last words."""

    default_reason = "NETWORK_FAILED"


errors.learn(NetworkUnavailableError, NetworkUnsupportedError, NetworkFailedError)
