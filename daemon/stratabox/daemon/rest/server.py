"""Addresses that speak HTTP: sockets, TLS, and the ASGI server's start and end.

uvicorn serves in the daemon's own event loop, one server for each address. It takes sockets that
are open already, and neither signals nor the log are its business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from stratabox.daemon.access.certificates import Certificates
from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import Address, TcpAddress, UnixAddress
from stratabox.daemon.lifecycle.common.threads import in_thread
from stratabox.storage.model.errors import UnavailableError

log = logging.getLogger(__name__)

GRACE = 10
"""Seconds that calls under way get when the daemon is told to end."""

_HEAD_SECONDS = 15
"""For a request's head to come, and for the next one after an answer."""
_HEAD_BYTES = 32 << 10
_CONNECTIONS = 1024


class _Protocol(H11Protocol):
    """uvicorn's, but who connects and does not say what they want is let go."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        waits_since = self.timeout_keep_alive_task
        self.timeout_keep_alive_task = None  # the half of a head is no reason to wait longer
        super().data_received(data)
        if self.timeout_keep_alive_task is None and (
            self.cycle is None or self.cycle.response_complete
        ):
            self.timeout_keep_alive_task = waits_since
        elif waits_since is not None:
            waits_since.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def _arm(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )


class HttpServer:
    """One API, on all its addresses.

    :param name: what it is, for the log.
    :param application: makes the ASGI application of one address.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        addresses: Sequence[Address],
        application: Callable[[Address], ASGIApp],
        *,
        certificates: Certificates | None,
    ) -> None:
        self._name = name
        self._config = config
        self._addresses = addresses
        self._application = application
        self._certificates = certificates
        self._servers: list[uvicorn.Server] = []
        self._sockets: list[list[socket.socket]] = []

    async def start(self) -> None:
        """Open the addresses and serve. Whatever is open when this raises, `stop` closes.

        :raise UnavailableError: ADDRESS_IN_USE, when one cannot be opened.
        """
        for address in self._addresses:
            try:
                sockets = await self._bind(address)
            except OSError as error:
                raise UnavailableError(
                    f"cannot listen on {address}: {error}", reason="ADDRESS_IN_USE"
                ) from error
            server = uvicorn.Server(self._settings(address))
            server.config.load()
            server.config.ssl = self._context(address)
            server.lifespan = server.config.lifespan_class(server.config)
            # Not `serve`, which takes the process's signals and wakes ten times a second.
            await server.startup(sockets)
            self._servers.append(server)
            self._sockets.append(sockets)
        log.info("%s: listening on %s", self._name, ", ".join(map(str, self._addresses)))

    async def stop(self) -> None:
        """Take no more calls; those under way get a while, then they are cancelled."""
        servers = zip(self._servers, self._sockets, strict=True)
        await asyncio.gather(*(server.shutdown(sockets) for server, sockets in servers))
        for server in self._servers:
            if tasks := set(server.server_state.tasks):
                await asyncio.wait(tasks)  # cancelled, and undoing what they had begun
        for address in self._addresses:
            if isinstance(address, UnixAddress):
                await in_thread(address.path.unlink, missing_ok=True)

    def _settings(self, address: Address) -> uvicorn.Config:
        return uvicorn.Config(
            self._application(address),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.ERROR,  # strangers could fill the log with their mistakes
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,  # the guard's: uvicorn's would take its wakings
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=_HEAD_SECONDS,
            timeout_graceful_shutdown=GRACE,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )

    def _context(self, address: Address) -> ssl.SSLContext | None:
        if not (isinstance(address, TcpAddress) and address.tls):
            return None
        certificates = self._certificates
        assert certificates is not None, "an https address is not served without"
        context = certificates.ssl_context()
        files = certificates.files
        certificates.on_reload.append(
            # For handshakes to come; connections that are there keep what they have.
            lambda: context.load_cert_chain(files.certificate, files.key, password="")
        )
        return context

    async def _bind(self, address: Address) -> list[socket.socket]:
        if isinstance(address, UnixAddress):
            return [self._bind_unix(address.path)]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        with ExitStack() as undo:
            sockets = []
            for family, _, _, _, place in dict.fromkeys(found):
                opened = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family is socket.AF_INET6:
                    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                opened.bind(place)
                opened.setblocking(False)
                sockets.append(opened)
            undo.pop_all()
        return sockets

    def _bind_unix(self, path: Path) -> socket.socket:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # The state folder's lock is ours, so a socket that lies here is a dead daemon's.
        path.unlink(missing_ok=True)
        with ExitStack() as undo:
            opened = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            # The socket must not be open to others for even a moment between bind and chmod.
            before = os.umask(0o777 & ~self._config.socket_mode)
            try:
                opened.bind(str(path))
            finally:
                os.umask(before)
            path.chmod(self._config.socket_mode)
            if self._config.socket_group:
                shutil.chown(path, group=self._config.socket_group)
            opened.setblocking(False)
            undo.pop_all()
        return opened
