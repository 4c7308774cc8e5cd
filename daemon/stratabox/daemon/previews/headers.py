"""Which headers of a message go on, and which are of one connection alone (RFC 9110, 7.6). Pure."""

from __future__ import annotations

from collections.abc import Iterable

import h11

Headers = list[tuple[bytes, bytes]]

_OF_ONE_CONNECTION = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"upgrade",
    )
)
_OURS = frozenset((b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"forwarded"))


def host_of(request: h11.Request) -> str:
    """Where a request is addressed to; "": it does not say."""
    found = [value for name, value in request.headers if name == b"host"]
    return found[0].decode("latin-1") if len(found) == 1 else ""


def upgrades(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The protocol that a message wants to go over to."""
    found = list(headers)
    if b"upgrade" not in _words(found):
        return None
    return next((value for name, value in found if name == b"upgrade"), None)


def to_guest(request: h11.Request, peer: str, scheme: str) -> Headers:
    """The headers of a request as the guest gets them: one request, and the connection is over."""
    kept = [each for each in _lasting(request.headers) if each[0] not in _OURS]
    kept += [
        (b"x-forwarded-for", peer.encode("latin-1")),
        (b"x-forwarded-host", host_of(request).encode("latin-1")),
        (b"x-forwarded-proto", scheme.encode("latin-1")),
    ]
    return kept + _ending(upgrades(request.headers))


def to_browser(headers: Iterable[tuple[bytes, bytes]], *, closes: bool) -> Headers:
    """The headers of an answer as the browser gets them.

    :param closes: the browser's connection is over with it.
    """
    kept = _lasting(headers)
    return [*kept, (b"connection", b"close")] if closes else kept


def of_switch(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of an answer by which both go over to another protocol."""
    found = list(headers)
    return _lasting(found) + _ending(upgrades(found))


def _ending(protocol: bytes | None) -> Headers:
    if protocol is None:
        return [(b"connection", b"close")]
    return [(b"connection", b"Upgrade"), (b"upgrade", protocol)]


def _lasting(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    found = list(headers)
    named = _words(found) - {b"close", b"keep-alive", b"content-length", b"transfer-encoding"}
    return [
        (name, value)
        for name, value in found
        if name not in _OF_ONE_CONNECTION and name not in named
    ]


def _words(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """What the Connection headers name."""
    values = [value for name, value in headers if name == b"connection"]
    return {word.strip().lower() for value in values for word in value.split(b",")}
