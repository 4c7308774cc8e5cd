"""The errors that a caller can meet, named for what the caller does next.

```
StrataboxError
├── NotFoundError            the name is wrong                    NOT_FOUND
├── AlreadyExistsError       choose another name                  ALREADY_EXISTS
├── InvalidArgumentError     mend the request                     INVALID_ARGUMENT
├── DeniedError              change the state of things first     FAILED_PRECONDITION
├── FailedError              it was tried and failed; see why     FAILED_PRECONDITION
├── ConflictError            somebody else was quicker            ABORTED
├── NoSpaceError             free something first                 RESOURCE_EXHAUSTED
├── UnavailableError         wait, or mend the host               UNAVAILABLE
├── UnauthenticatedError     show a key that is good              UNAUTHENTICATED
├── ForbiddenError           use a key with a higher role         PERMISSION_DENIED
├── RateLimitedError         try again a little later             RESOURCE_EXHAUSTED
├── CorruptError             bytes are not what they were         DATA_LOSS
└── InternalError            a bug; report it                     INTERNAL
```

Each carries a stable `reason` (upper snake case, part of the API) and string `metadata`.
The gRPC codes are given by the one table in ``stratabox.daemon.rpc.errors``; nothing here knows
gRPC.
"""

from __future__ import annotations


class StrataboxError(Exception):
    """Ancestor of every error that is shown to a caller.

    :param message: A sentence for people: names the thing, and says what to do where that helps.
    :param reason: Stable identifier; the class's own where none is given.
    :param metadata: Details for programs, as strings (ids, limits, figures).
    """

    default_reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = {key: str(value) for key, value in metadata.items() if value is not None}


class NotFoundError(StrataboxError):
    """Nothing has that id or name. SANDBOX_NOT_FOUND, SNAPSHOT_NOT_FOUND, IMAGE_NOT_FOUND."""

    default_reason = "NOT_FOUND"


class AlreadyExistsError(StrataboxError):
    """The name is taken. IMAGE_ALREADY_EXISTS."""

    default_reason = "ALREADY_EXISTS"


class InvalidArgumentError(StrataboxError):
    """The request cannot be right, whatever the state of things.

    INVALID_ARGUMENT, INVALID_RESOURCES, INVALID_IMAGE, INVALID_ARCHIVE,
    IDEMPOTENCY_MISMATCH, INVALID_USER_DATA.
    """

    default_reason = "INVALID_ARGUMENT"


class DeniedError(StrataboxError):
    """Not in this state of things.

    INVALID_STATE, IMAGE_IN_USE, SNAPSHOT_NOT_READY, AMBIGUOUS_NAME, STATE_DIR_IN_USE,
    TOOL_MISSING, KVM_UNUSABLE, IMAGE_NOT_READY, NOT_ITS_SNAPSHOT, CATALOG_TOO_NEW,
    MISSING_BASE, TRUST_REQUIRED, NO_CLOUD_INIT.
    """

    default_reason = "INVALID_STATE"


class FailedError(StrataboxError):
    """It was tried, it failed, and what was begun was undone.

    SNAPSHOT_FAILED, IMAGE_BUILD_FAILED, QEMU_FAILED, GUEST_ENDED, AGENT_FAILED, HOST_DISK_FAILED,
    CLOUD_INIT_FAILED, LIBVIRT_REFUSED.
    """

    default_reason = "FAILED"


class ConflictError(StrataboxError):
    """Overtaken by another request.

    INTERRUPTED (the sandbox was ended meanwhile), RESUME_MISMATCH (what is exported has changed).
    """

    default_reason = "CONFLICT"


class NoSpaceError(StrataboxError):
    """No room on the host.

    NO_SPACE, UIDS_EXHAUSTED, ADMISSION_REFUSED, BUDGET_EXCEEDED, STORE_NEARLY_FULL, QUOTA_EXCEEDED.
    """

    default_reason = "NO_SPACE"


class UnavailableError(StrataboxError):
    """Something does not answer. AGENT_UNAVAILABLE, MONITOR_UNAVAILABLE, LIBVIRT_UNAVAILABLE."""

    default_reason = "UNAVAILABLE"


class UnauthenticatedError(StrataboxError):
    """Nobody knows who is calling.

    NO_KEY, INVALID_KEY (malformed, unknown, wrong, revoked: not told apart), KEY_EXPIRED (to its
    holder alone).

    :param why: for the audit log alone, never for the caller.
    """

    default_reason = "INVALID_KEY"

    def __init__(
        self, message: str, *, reason: str | None = None, why: str = "", **metadata: object
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.why = why


class ForbiddenError(StrataboxError):
    """Whoever is calling may not do this. FORBIDDEN."""

    default_reason = "FORBIDDEN"


class RateLimitedError(StrataboxError):
    """Too much at once for one key. RATE_LIMITED, TOO_MANY_CALLS.

    :param retry_after: seconds after which it is worth another try.
    """

    default_reason = "RATE_LIMITED"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_after: float | None = None,
        **metadata: object,
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.retry_after = retry_after


class CorruptError(StrataboxError):
    """Stored bytes or rows are not what they must be.

    CATALOG_CORRUPT, CATALOG_LOST, LAYER_MISSING, LAYER_CORRUPT, BLOB_MISSING.
    """

    default_reason = "CORRUPT"


class InternalError(StrataboxError):
    """A broken promise of our own; its text is logged and not shown. INTERNAL."""
