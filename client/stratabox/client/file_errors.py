"""The errors about files in guests, one class for each reason: part of the tree in `errors`."""

from __future__ import annotations

from stratabox.client import errors


class GuestFileNotFoundError(errors.NotFoundError):
    """There is no such file in the guest; the metadata has its `path`, as in all of these."""

    default_reason = "FILE_NOT_FOUND"


class UserNotFoundError(errors.NotFoundError):
    """The guest has no such user or group."""

    default_reason = "USER_NOT_FOUND"


class GuestFileExistsError(errors.AlreadyExistsError):
    """There is a file already."""

    default_reason = "FILE_EXISTS"


class GuestNotADirectoryError(errors.DeniedError):
    """What is used as a directory is none."""

    default_reason = "NOT_A_DIRECTORY"


class GuestIsADirectoryError(errors.DeniedError):
    """It is a directory."""

    default_reason = "IS_A_DIRECTORY"


class GuestDirectoryNotEmptyError(errors.DeniedError):
    """The directory is not empty."""

    default_reason = "DIRECTORY_NOT_EMPTY"


class GuestPermissionError(errors.DeniedError):
    """The guest does not permit that."""

    default_reason = "PERMISSION_DENIED"


class GuestReadOnlyError(errors.DeniedError):
    """The file system in the guest is read-only."""

    default_reason = "READ_ONLY_FILE_SYSTEM"


class GuestToolMissingError(errors.DeniedError):
    """The guest has not the program that this takes, as tar."""

    default_reason = "GUEST_TOOL_MISSING"


class GuestNoSpaceError(errors.NoSpaceError):
    """The guest's file system is full."""

    default_reason = "GUEST_NO_SPACE"


class GuestFileError(errors.FailedError):
    """Whatever else went wrong with a file in the guest; the message has the guest's words."""

    default_reason = "FILE_FAILED"


errors.learn(
    GuestFileNotFoundError,
    UserNotFoundError,
    GuestFileExistsError,
    GuestNotADirectoryError,
    GuestIsADirectoryError,
    GuestDirectoryNotEmptyError,
    GuestPermissionError,
    GuestReadOnlyError,
    GuestToolMissingError,
    GuestNoSpaceError,
    GuestFileError,
)
