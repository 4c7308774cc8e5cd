"""What strangers are told who get nothing: as little as helps whoever made the preview."""

from __future__ import annotations

from stratabox.storage.model import errors


class Refusal(Exception):  # noqa: N818  # an answer, not a fault of ours
    """An answer that is none of a guest's."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


NOTHING = (404, "there is nothing here, or it does not run just now")

_ANSWERS: tuple[tuple[type[errors.StrataboxError], int, str], ...] = (
    (errors.NotFoundError, *NOTHING),
    (errors.NoSpaceError, 503, "too many requests are under way: try again later"),
    (errors.FailedError, 502, "nothing in the guest takes connections on that port"),
    (errors.DeniedError, 502, "the guest cannot be reached"),
    (errors.UnavailableError, 503, "the guest does not answer just now"),
)


def refusal_of(error: errors.StrataboxError) -> Refusal:
    """An error, as strangers see it."""
    for kind, status, text in _ANSWERS:
        if isinstance(error, kind):
            return Refusal(status, text)
    return Refusal(500, "internal error")
