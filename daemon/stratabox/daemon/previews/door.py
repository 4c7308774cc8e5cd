"""The door's socket, TLS, and its connections' beginnings and ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from contextlib import ExitStack, suppress

from stratabox.daemon.access.certificates import Certificates
from stratabox.daemon.config.kinds import TcpAddress
from stratabox.daemon.lifecycle.inside.crowd import Crowd
from stratabox.daemon.lifecycle.inside.visits import Visits
from stratabox.daemon.previews.downloads import Downloads
from stratabox.daemon.previews.exchange import Connection, Exchange
from stratabox.storage.model.errors import UnavailableError

log = logging.getLogger(__name__)

_CONNECTIONS = 512
_HANDSHAKE_SECONDS = 15.0
_FAREWELL_SECONDS = 2.0
_FAREWELL_BYTES = 1 << 20
_BUFFER = 64 << 10


class Door:
    """Where previews and downloads are served."""

    def __init__(
        self,
        address: TcpAddress,
        visits: Visits,
        downloads: Downloads,
        certificates: Certificates | None,
    ) -> None:
        self._address = address
        self._visits = visits
        self._downloads = downloads
        self._certificates = certificates
        self._crowd = Crowd(_CONNECTIONS)
        self._servers: list[asyncio.Server] = []

    async def start(self) -> None:
        """Open the address and serve.

        :raise UnavailableError: ADDRESS_IN_USE, when it cannot be opened.
        """
        context = self._context()
        try:
            for each in await self._bind():
                server = await asyncio.start_server(
                    self._take,
                    sock=each,
                    ssl=context,
                    limit=_BUFFER,
                    ssl_handshake_timeout=None if context is None else _HANDSHAKE_SECONDS,
                )
                self._servers.append(server)
        except OSError as error:
            await self.stop()
            raise UnavailableError(
                f"cannot listen on {self._address}: {error}", reason="ADDRESS_IN_USE"
            ) from error
        log.info("previews: listening on %s", self._address)

    async def stop(self) -> None:
        """Take no more connections, and end those that are there."""
        for server in self._servers:
            server.close()
        await self._crowd.disperse()

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._crowd.is_full:
            writer.transport.abort()
            return
        self._crowd.enter(self._serve(reader, writer), "preview")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("peername")
        connection = Connection(
            reader=reader,
            writer=writer,
            peer=str(peer[0]) if peer else "unknown",
            scheme="https" if self._address.tls else "http",
        )
        try:
            await Exchange(connection, self._visits, self._downloads).run()
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_FAREWELL_SECONDS):
                    await _part(reader, writer)
        finally:
            writer.transport.abort()

    def _context(self) -> ssl.SSLContext | None:
        if not self._address.tls:
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

    async def _bind(self) -> list[socket.socket]:
        host, port = self._address.host, self._address.port
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
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


async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Close in good order: whoever still writes would not get to read the answer otherwise."""
    await writer.drain()
    if not writer.can_write_eof():
        writer.close()
        await writer.wait_closed()
        return
    writer.write_eof()
    size = 0
    while size < _FAREWELL_BYTES and (data := await reader.read(_BUFFER)):
        size += len(data)
