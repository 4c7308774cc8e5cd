"""The errors of the API's door: who calls, what they may do, how often.

```
StrataboxError
├── UnauthenticatedError   NoKeyError, KeyExpiredError
├── ForbiddenError
└── RateLimitedError       TooManyCallsError
```
"""

from __future__ import annotations

from stratabox.client.errors import StrataboxError, learn


class UnauthenticatedError(StrataboxError):
    """The daemon does not know who calls; with another API key it might."""

    default_reason = "INVALID_KEY"


class NoKeyError(UnauthenticatedError):
    """The address takes an API key, and the client has none."""

    default_reason = "NO_KEY"


class KeyExpiredError(UnauthenticatedError):
    """The time of the API key is up."""

    default_reason = "KEY_EXPIRED"


class ForbiddenError(StrataboxError):
    """The API key is valid, and its role does not allow this call."""

    default_reason = "FORBIDDEN"


class RateLimitedError(StrataboxError):
    """Too many calls a second with one API key.

    :ivar retry_after: Seconds after which it is worth another try; None: the daemon did not say.
    """

    default_reason = "RATE_LIMITED"
    retry_after: float | None = None


class TooManyCallsError(RateLimitedError):
    """Too many calls with one API key are under way; end some of them."""

    default_reason = "TOO_MANY_CALLS"


learn(
    UnauthenticatedError,
    NoKeyError,
    KeyExpiredError,
    ForbiddenError,
    RateLimitedError,
    TooManyCallsError,
)
