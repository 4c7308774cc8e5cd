"""How a client comes in: its API key, what it trusts of TLS, and a channel that brings both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from stratabox.client.access_errors import UnauthenticatedError
from stratabox.client.addresses import grpc_target, is_loopback
from stratabox.client.errors import InvalidAddressError, InvalidArgumentError

KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # gRPC counts by the longer of the two
    ("grpc.http2.max_pings_without_data", 0),  # no limit
)
"""A call that is quiet is kept known to NATs, and ends soon after the way to its daemon did, as it
may while a laptop sleeps. On a Unix socket the kernel tells."""

WAITING_OPTIONS = (("grpc.min_reconnect_backoff_ms", 120_000),)
"""How long a connection may be made without an answer, which is what this option stands for in gRPC
(20 s without). systemd holds the Unix socket while the daemon starts: who has connected waits."""

Pair = tuple[str | os.PathLike[str], str | os.PathLike[str]]
"""Files of a certificate and of its private key, PEM."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a client shows, and whom it trusts."""

    address: str
    key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    certificate: tuple[Path, Path] | None = None
    workspace: str | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call. The Unix socket takes no key, so it gets none."""
        found = (("x-stratabox-workspace", self.workspace),) if self.workspace else ()
        if self.key is None or self.address.startswith("unix:"):
            return found
        return (("authorization", f"Bearer {self.key}"), *found)

    def channel(self, library: Any, options: Any) -> Any:
        """Open a channel of `grpc`, or of `grpc.aio`.

        :raise InvalidArgumentError: when a file cannot be read.
        """
        target = grpc_target(self.address)
        local = self.address.startswith("unix:")
        options = [*options, *(WAITING_OPTIONS if local else KEEPALIVE_OPTIONS)]
        if not self.address.startswith("https:"):
            return library.insecure_channel(target, options=options)
        certificate, key = self.certificate or (None, None)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_content(self.ca_file),
            private_key=_content(key),
            certificate_chain=_content(certificate),
        )
        return library.secure_channel(target, credentials, options=options)


def access(
    address: str,
    api_key: str | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    client_certificate: Pair | None = None,
    workspace: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Access:
    """Put together what the caller gave and, where nothing, what the environment says.

    :raise UnauthenticatedError: when the key is none.
    :raise InvalidAddressError: when the address is none, or the key would go there in the clear.
    :raise InvalidArgumentError: when there is a certificate without its key, or the other way; for
        a workspace that cannot be one.
    """
    grpc_target(address)
    env = os.environ if environ is None else environ
    key = (api_key or env.get("STRATABOX_API_KEY") or "").strip() or None
    # Its text is never in a message: it may be one, only mistyped.
    if key is not None and not (key.startswith("tk_") and key.isascii() and key.isprintable()):
        raise UnauthenticatedError("the API key (STRATABOX_API_KEY) is none: they begin with tk_")
    if key is not None and address.startswith("http:") and not is_loopback(address):
        raise InvalidAddressError(
            f"the address {address!r} has no TLS, so the API key is not sent there; use https://"
        )
    authority = ca_file or env.get("STRATABOX_CA_FILE")
    pair = client_certificate
    if pair is None:
        names = ("STRATABOX_CLIENT_CERTIFICATE", "STRATABOX_CLIENT_KEY")
        found = [env.get(name) or "" for name in names]
        if any(found) and not all(found):
            raise InvalidArgumentError(f"{names[0]} and {names[1]} go together; one is not set")
        pair = (found[0], found[1]) if all(found) else None
    inside = workspace or env.get("STRATABOX_WORKSPACE") or None
    if inside is not None and not (inside.isascii() and inside.isprintable()):
        raise InvalidArgumentError(f"the workspace {inside!r} (STRATABOX_WORKSPACE) cannot be one")
    return Access(
        address=address,
        workspace=inside,
        key=key,
        ca_file=Path(authority) if authority else None,
        certificate=(Path(pair[0]), Path(pair[1])) if pair else None,
    )


class WithMetadata:
    """A channel whose every call brings the same metadata; for stubs."""

    def __init__(self, channel: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            raise AttributeError(name)
        make = getattr(self._channel, name)

        def with_metadata(*arguments: Any, **options: Any) -> Any:
            return partial(make(*arguments, **options), metadata=self._metadata)

        return with_metadata


def _content(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error.strerror}") from error
