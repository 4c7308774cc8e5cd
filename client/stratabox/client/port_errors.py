"""The errors about connections into guests: part of the tree in `errors`."""

from __future__ import annotations

from stratabox.client import errors


class PortNotFoundError(errors.NotFoundError):
    """There is no such forwarded port."""

    default_reason = "PORT_NOT_FOUND"


class PortInUseError(errors.AlreadyExistsError):
    """Something listens there already, or there is a file at the path."""

    default_reason = "PORT_IN_USE"


class PortNotAllowedError(errors.DeniedError):
    """The daemon's configuration does not allow that address or path at its host."""

    default_reason = "PORT_NOT_ALLOWED"


class NoSshdError(errors.DeniedError):
    """The guest has no sshd, by which streams, files and ports go."""

    default_reason = "NO_SSHD"


class ConnectionRefusedByGuestError(errors.FailedError):
    """Nothing in the guest listens there."""

    default_reason = "CONNECTION_REFUSED"


class ConnectionLostError(errors.UnavailableError):
    """A connection into a guest is closed, or has broken."""

    default_reason = "CONNECTION_LOST"


errors.learn(
    PortNotFoundError,
    PortInUseError,
    PortNotAllowedError,
    NoSshdError,
    ConnectionRefusedByGuestError,
    ConnectionLostError,
)
