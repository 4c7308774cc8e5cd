"""Answers `GET /metrics`: on loopback and Unix sockets to everybody, elsewhere to good API keys.

On loopback the Host header must name loopback: else a page in somebody's browser could read the
figures through a name of its own that leads here.
"""

from __future__ import annotations

import ipaddress

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stratabox.daemon.access.gate import Gate
from stratabox.daemon.config.kinds import Address, TcpAddress
from stratabox.daemon.prometheus.figures import Figures
from stratabox.storage.model.access import Role
from stratabox.storage.model.errors import (
    ForbiddenError,
    RateLimitedError,
    StrataboxError,
    UnauthenticatedError,
)
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE

PATH = "/metrics"
METHOD = "stratabox.v1.MetricsService/GetMetrics"
"""The call that shows as much: it takes the same role."""


class Exposition:
    """The ASGI application of one address."""

    def __init__(self, figures: Figures, gate: Gate, address: Address) -> None:
        self._figures = figures
        self._gate = gate
        self._keyless = not isinstance(address, TcpAddress) or address.is_loopback
        self._checks_host = isinstance(address, TcpAddress) and address.is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            answer: ASGIApp = await self._answer(Request(scope))
            await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if self._checks_host and not _is_loopback(request.headers.get("host", "")):
            return PlainTextResponse("this address is loopback's\n", 421)
        if request.url.path != PATH:
            return PlainTextResponse(f"there is only {PATH}\n", 404)
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("GET it\n", 405, {"allow": "GET, HEAD"})
        try:
            if not self._keyless:
                self._admit(request)
            text = await self._figures.text()
        except StrataboxError as error:
            return _refusal(error)
        return Response(
            text, headers={"content-type": CONTENT_TYPE_LATEST, "cache-control": "no-store"}
        )

    def _admit(self, request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
        host, port = request.client or ("unknown", 0)
        peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        principal = None
        try:
            principal = self._gate.authenticate(shown, peer)
            self._gate.admit(principal, METHOD)
            if principal.workspace != DEFAULT_WORKSPACE and principal.role is not Role.ADMIN:
                raise ForbiddenError(
                    "these figures are of the whole host: use a key of the workspace"
                    f" {DEFAULT_WORKSPACE!r}, or an admin's"
                )
        except StrataboxError as error:
            self._gate.refuse(error, principal, "GET /metrics", peer)
            raise


def _refusal(error: StrataboxError) -> Response:
    match error:
        case UnauthenticatedError():
            return PlainTextResponse(
                f"{error.message}\n", 401, {"www-authenticate": 'Bearer realm="stratabox"'}
            )
        case ForbiddenError():
            return PlainTextResponse(f"{error.message}\n", 403)
        case RateLimitedError():
            return PlainTextResponse(f"{error.message}\n", 429)
    return PlainTextResponse(f"{error.message}\n", 503)


def _is_loopback(host: str) -> bool:
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
