"""One connection of a browser: requests one after the other, each led to a guest and back.

h11 reads and writes both sides, so that what a guest sees is one whole, unambiguous request, and
nothing can be smuggled past the look at its Host. Bodies are carried as they come, with
back-pressure; and bytes, once both sides agree on another protocol (WebSockets).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from email.utils import formatdate

import h11

from stratabox.daemon.lifecycle.inside.carrying import (
    BROKEN,
    PIECE,
    Far,
    carry,
    pump,
    pump_in,
)
from stratabox.daemon.lifecycle.inside.visits import Visits
from stratabox.daemon.previews import headers
from stratabox.daemon.previews.downloads import Download, Downloads
from stratabox.daemon.previews.refusals import Refusal, refusal_of
from stratabox.storage.model.errors import StrataboxError

HEAD_BYTES = 32 << 10
HEAD_SECONDS = 15.0
"""For a request's head to come, and for the next one after an answer."""
DRAIN_SECONDS = 60.0
"""For a browser to take some more."""


class _GoneError(Exception):
    """The browser has gone."""


class _GuestError(Exception):
    """What the guest sends is no answer."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """What is known of a browser's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    peer: str
    scheme: str


class Exchange:
    """Serves one connection, to its end."""

    def __init__(self, connection: Connection, visits: Visits, downloads: Downloads) -> None:
        self._reader = connection.reader
        self._writer = connection.writer
        self._connection = connection
        self._visits = visits
        self._downloads = downloads
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)

    async def run(self) -> None:
        """Answer requests until either side has enough. Nothing of what they do is raised."""
        try:
            while await self._one():
                self._http.start_next_cycle()
        except h11.RemoteProtocolError as error:
            with suppress(_GoneError):
                await self._refuse(Refusal(error.error_status_hint, "this is no request"), b"GET")
        except (_GoneError, _GuestError, TimeoutError):
            pass  # who waits for the rest sees the connection break

    async def _one(self) -> bool:
        """Answer one request; whether there may be another on this connection."""
        async with asyncio.timeout(HEAD_SECONDS):
            request = await self._event()
        if not isinstance(request, h11.Request):
            return False
        try:
            await self._answer(request)
        except StrataboxError as error:
            if self._http.our_state is not h11.SEND_RESPONSE:
                raise _GuestError from error
            await self._refuse(refusal_of(error), request.method)
        except Refusal as refusal:
            await self._refuse(refusal, request.method)
        # What is left of the request is not waited for.
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _answer(self, request: h11.Request) -> None:
        """Lead a request to where it belongs.

        :raise Refusal, StrataboxError: when it does not.
        """
        host = headers.host_of(request)
        if not request.target.startswith(b"/"):
            raise Refusal(400, "a request's target is a path here")
        token = self._visits.token_in(host)
        if token is None:
            await self._download(self._downloads.find(request, host), request.method)
            return
        async with self._visits.open(token) as far:
            try:
                await _Relay(self, far).run(request)
            except BROKEN as error:
                if self._http.our_state is h11.SEND_RESPONSE:
                    raise Refusal(502, "the connection into the guest has broken") from error
                raise _GuestError from error

    async def _download(self, download: Download, method: bytes) -> None:
        async with aclosing(download.pieces()) as pieces:
            first = await anext(pieces)  # before it is promised that there is something
            await self.send(h11.Response(status_code=200, headers=_stamped(download.headers)))
            if method != b"HEAD":
                await self.send(h11.Data(data=first))
                await self._rest(pieces)
        await self.send(h11.EndOfMessage())

    async def _rest(self, pieces: AsyncGenerator[bytes, None]) -> None:
        async for piece in pieces:
            await self.send(h11.Data(data=piece))

    async def _refuse(self, refusal: Refusal, method: bytes) -> None:
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        if self._http.their_state is h11.SEND_BODY:
            self._http.next_event()  # that there is no body, if there is none
        body = f"{refusal}\n".encode()
        head = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        if self._http.their_state is not h11.DONE:
            head.append((b"connection", b"close"))
        await self.send(h11.Response(status_code=refusal.status, headers=_stamped(head)))
        if method != b"HEAD":
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What comes next from the browser. :raise _GoneError: nothing does."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            await self.receive()
        if isinstance(event, h11.ConnectionClosed):
            raise _GoneError
        return event

    # What `_Relay` needs of the browser's side.

    @property
    def http(self) -> h11.Connection:
        """The state of the browser's side."""
        return self._http

    @property
    def connection(self) -> Connection:
        """Where the browser is."""
        return self._connection

    async def event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """What comes next from the browser. :raise _GoneError: it has gone."""
        return await self._event()

    async def receive(self) -> None:
        """Take in some more of what the browser sends. :raise _GoneError: it has gone."""
        try:
            data = await self._reader.read(PIECE)
        except OSError as error:
            raise _GoneError from error
        if not data:
            raise _GoneError
        self._http.receive_data(data)

    async def send(self, event: h11.Event) -> None:
        """Send the browser something. :raise _GoneError: it has gone, or takes nothing."""
        data = self._http.send(event)
        if data:
            await self.write(data)

    async def write(self, data: bytes) -> None:
        """Send the browser some bytes. :raise _GoneError: as `send`."""
        try:
            self._writer.write(data)
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._writer.drain()
        except (OSError, TimeoutError) as error:
            raise _GoneError from error


class _Relay:
    """One request to a guest, and its answer."""

    def __init__(self, browser: Exchange, far: Far) -> None:
        self._browser = browser
        self._far = far
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
        self._answered = False

    async def run(self, request: h11.Request) -> None:
        """Carry it, and what comes back.

        :raise _GoneError, _GuestError, OSError, asyncssh.Error: when either side breaks.
        """
        connection = self._browser.connection
        to_guest = headers.to_guest(request, connection.peer, connection.scheme)
        await self._send(
            h11.Request(method=request.method, target=request.target, headers=to_guest)
        )
        up = asyncio.create_task(self._up(), name="preview up")
        down = asyncio.create_task(self._down(), name="preview down")
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
            if up.done():
                up.result()  # the browser has gone: nobody waits for an answer
            await down
        finally:
            up.cancel()
            down.cancel()
            await asyncio.wait((up, down))
        if down.result():
            await self._switched()

    async def _up(self) -> None:
        """Carry the request's body, then see whether the browser stays."""
        takes = True
        while True:
            event = await self._browser.event()
            if isinstance(event, h11.Data) and takes:
                takes = await self._sent(event)
            elif isinstance(event, h11.EndOfMessage):
                if takes:
                    await self._sent(h11.EndOfMessage(headers=event.headers))
                break
            elif not isinstance(event, h11.Data):
                break
        while len(self._browser.http.trailing_data[0]) < PIECE:
            await self._browser.receive()
        # So much of what is to come after the answer: no more is taken in.
        await asyncio.get_running_loop().create_future()

    async def _down(self) -> bool:
        """Carry the answer; whether both go over to another protocol with it."""
        while True:
            event = await self._from_guest()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 101:
                    head = headers.of_switch(event.headers)
                    switch = h11.InformationalResponse(status_code=101, headers=head)
                    await self._browser.send(switch)
                    return True
                await self._browser.send(
                    h11.InformationalResponse(
                        status_code=event.status_code,
                        headers=headers.to_browser(event.headers, closes=False),
                    )
                )
            elif isinstance(event, h11.Response):
                self._answered = True
                closes = self._browser.http.their_state is not h11.DONE
                await self._browser.send(
                    h11.Response(
                        status_code=event.status_code,
                        reason=event.reason,
                        headers=headers.to_browser(event.headers, closes=closes),
                    )
                )
            elif isinstance(event, h11.Data):
                await self._browser.send(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self._browser.send(h11.EndOfMessage(headers=event.headers))
                return False
            else:
                raise _GuestError

    async def _switched(self) -> None:
        """Carry bytes, both ways, until both have ended or one has broken off."""
        browser = self._browser.connection
        if first := self._http.trailing_data[0]:
            await self._browser.write(first)
        if first := self._browser.http.trailing_data[0]:
            self._far.writer.write(first)
            await self._far.writer.drain()
        with suppress(*BROKEN):
            await carry(
                pump_in(browser.reader, self._far), pump(self._far, browser.writer), self._far
            )

    async def _from_guest(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._far.read())
        except h11.RemoteProtocolError as error:
            if self._answered:
                raise _GuestError from error
            raise Refusal(502, "what answers in the guest does not speak HTTP") from error
        return event

    async def _sent(self, event: h11.Event) -> bool:
        """Send the guest something; False: it takes no more."""
        try:
            await self._send(event)
        except BROKEN:
            return False
        return True

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            self._far.writer.write(data)
            await self._far.writer.drain()


def _stamped(head: headers.Headers) -> headers.Headers:
    return [*head, (b"date", formatdate(usegmt=True).encode())]
