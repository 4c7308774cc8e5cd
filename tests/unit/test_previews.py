"""Previews without guests: HTTP between a browser's socket and a server's, and the rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h11
import pytest

from stratabox.daemon.access import links
from stratabox.daemon.access.links import Links
from stratabox.daemon.config.kinds import TcpAddress
from stratabox.daemon.config.preview_kinds import DomainName, PreviewAddress
from stratabox.daemon.previews import headers
from stratabox.daemon.previews.exchange import HEAD_BYTES, Connection, Exchange
from stratabox.daemon.previews.refusals import NOTHING, Refusal
from stratabox.storage.catalog import previews
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.model.errors import AlreadyExistsError, FailedError, NotFoundError
from stratabox.storage.model.ids import PreviewId, mint
from stratabox.storage.model.previews import Preview

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Far:
    """A guest's end that is a socket of this host's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def read(self, n: int = 1 << 16) -> bytes:
        return await self._reader.read(n)

    async def closed(self) -> None:
        await asyncio.get_running_loop().create_future()


class Visits:
    """Leads every preview to one server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.error: Exception | None = None

    def token_in(self, host: str) -> str | None:
        return host.partition(".")[0] if host.endswith(".localhost") else None

    @asynccontextmanager
    async def open(self, token: str) -> AsyncIterator[Far]:
        if self.error is not None:
            raise self.error
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            yield Far(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()


class Downloads:
    def find(self, request: h11.Request, host: str) -> Any:
        raise Refusal(*NOTHING)


class Browser:
    """A connection to the door."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, text: bytes) -> None:
        self.writer.write(text)

    async def answer(self) -> tuple[bytes, bytes]:
        """Head and body of an answer of known length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        (size,) = [
            int(line.split(b":")[1])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        ]
        return head, await self.reader.readexactly(size)


@asynccontextmanager
async def place(serve: Serve) -> AsyncIterator[tuple[Callable[[], Awaitable[Browser]], Visits]]:
    """A server, and a door that leads to it."""

    async def guest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    async def door(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader=reader, writer=writer, peer="192.0.2.1", scheme="http")
        try:
            await Exchange(connection, visits, Downloads()).run()  # type: ignore[arg-type]
        finally:
            writer.close()

    browsers: list[Browser] = []

    async def connect() -> Browser:
        found = Browser(*await asyncio.open_connection("127.0.0.1", port_of(front)))
        browsers.append(found)
        return found

    async with (
        await asyncio.start_server(guest, "127.0.0.1", 0) as behind,
        await asyncio.start_server(door, "127.0.0.1", 0) as front,
    ):
        visits = Visits(port_of(behind))
        try:
            yield connect, visits
        finally:
            for browser in browsers:
                browser.writer.close()
                await browser.writer.wait_closed()


def port_of(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])


async def request_of(reader: asyncio.StreamReader) -> tuple[h11.Request, bytes]:
    """What a server gets, read strictly."""
    http = h11.Connection(h11.SERVER)
    request: h11.Request | None = None
    body = b""
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        else:
            assert request is not None
            return request, body


async def test_requests_on_one_connection_each_reach_the_guest_whole() -> None:
    seen: list[tuple[h11.Request, bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))
        writer.write(OK)

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(
            b"POST /a?b=1 HTTP/1.1\r\nHost: x.localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: keep-alive, X-Mine\r\nX-Mine: 1\r\nX-Forwarded-For: 10.0.0.1\r\n"
            b"Cookie: c=1\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
            # Sent ahead: it waits for its turn.
            b"GET /second HTTP/1.1\r\nHost: x.localhost\r\n\r\n"
        )
        for _ in range(2):
            head, body = await browser.answer()
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert body == b"ok"
    (first, body), (second, _body) = seen
    assert (first.method, first.target, body) == (b"POST", b"/a?b=1", b"onetwo")
    found = dict(first.headers)
    assert found[b"host"] == b"x.localhost"
    assert found[b"cookie"] == b"c=1"
    assert found[b"connection"] == b"close"
    assert found[b"x-forwarded-for"] == b"192.0.2.1"
    assert found[b"x-forwarded-proto"] == b"http"
    assert b"x-mine" not in found
    assert second.target == b"/second"


async def test_an_answer_without_a_length_ends_as_a_whole_one() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + b"x" * 300_000)

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(b"GET / HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        http.send(h11.EndOfMessage())
        size = 0
        while not isinstance(event := http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                http.receive_data(await browser.reader.read(1 << 16))
            elif isinstance(event, h11.Data):
                size += len(event.data)
        assert size == 300_000


async def test_an_answer_that_breaks_off_is_seen_to() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(b"GET / HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        with pytest.raises(asyncio.IncompleteReadError):
            await browser.answer()


async def test_both_sides_go_over_to_another_protocol() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"upgrade: websocket" in head.lower()
        assert b"sec-websocket-key: k" in head.lower()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Accept: a\r\n\r\nfirst"
        )
        writer.write(b"echo " + await reader.readexactly(4))

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(
            b"GET /ws HTTP/1.1\r\nHost: x.localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
        )
        head = await browser.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"sec-websocket-accept: a" in head.lower()
        assert await browser.reader.readexactly(5) == b"first"
        browser.say(b"ping")
        assert await browser.reader.read() == b"echo ping"


async def test_who_goes_takes_the_guests_connection_along() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        assert await reader.read() == b""
        gone.set()

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(b"GET /forever HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        browser.writer.close()
        await asyncio.wait_for(gone.wait(), 60)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n", 404),
        (b"GET http://x.localhost/ HTTP/1.1\r\nHost: x.localhost\r\n\r\n", 400),
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x.localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x.localhost\r\nHost: y.localhost\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x.localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
         400),
        (b"GET / HTTP/1.1\r\nHost: x.localhost\r\nA: " + b"a" * (HEAD_BYTES + 1), 431),
    ],
)  # fmt: skip
async def test_what_is_no_request_of_a_preview_is_refused(request_: bytes, status: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise AssertionError("it reached the guest")

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(request_)
        head, _body = await browser.answer()
        assert head.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotFoundError("secret"), 404), (FailedError("secret", reason="CONNECTION_REFUSED"), 502)],
)
async def test_strangers_are_not_told_why(error: Exception, status: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)  # who leaves words unread resets the connection
        writer.write(OK)

    async with place(serve) as (connect, visits):
        browser = await connect()
        visits.error = error
        browser.say(b"GET / HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        head, body = await browser.answer()
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"secret" not in body
        # A refusal is an answer like any other: the connection goes on.
        visits.error = None
        browser.say(b"GET / HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        assert (await browser.answer())[1] == b"ok"


async def test_a_guest_that_speaks_no_http() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp\r\n")
        await request_of(reader)

    async with place(serve) as (connect, _):
        browser = await connect()
        browser.say(b"GET / HTTP/1.1\r\nHost: x.localhost\r\n\r\n")
        head, _body = await browser.answer()
        assert head.startswith(b"HTTP/1.1 502 ")


def test_headers_of_one_connection_stay() -> None:
    kept = headers.to_browser(
        [(b"connection", b"x-a"), (b"x-a", b"1"), (b"keep-alive", b"5"), (b"etag", b"e")],
        closes=True,
    )
    assert kept == [(b"etag", b"e"), (b"connection", b"close")]


def test_links_are_good_for_one_thing_and_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    signer = Links()
    query, expires_at = signer.sign("a")
    shown = dict(part.split("=") for part in query.split("&"))
    assert signer.is_good("a", **shown)
    assert timedelta(minutes=1) < expires_at - datetime.now(UTC) <= links.LIFE
    assert not signer.is_good("b", **shown)
    assert not signer.is_good("a", str(int(shown["expires"]) + 1), shown["signature"])
    assert not signer.is_good("a", shown["expires"], "ü")
    assert not Links().is_good("a", **shown)
    monkeypatch.setattr(links, "LIFE", timedelta(seconds=-1))
    over = dict(part.split("=") for part in signer.sign("a")[0].split("&"))
    assert not signer.is_good("a", **over)


def test_addresses_and_domains() -> None:
    kind = PreviewAddress()
    assert kind.parse("") is None
    assert kind.parse("http://127.0.0.1:8081") == TcpAddress("127.0.0.1", 8081)
    for wrong in ("http://192.0.2.1:80", "unix:///x", "http://127.0.0.1:1, http://127.0.0.1:2"):
        with pytest.raises(ValueError):  # noqa: PT011  # the key's `allowed` says what can be
            kind.parse(wrong)
    assert DomainName().parse("previews.example.org") == "previews.example.org"
    for wrong in ("", "a..b", "A", "a b", "-a", "." * 4):
        with pytest.raises(ValueError):  # noqa: PT011  # the key's `allowed` says what can be
            DomainName().parse(wrong)


def test_rows_are_one_workspaces_and_end_with_what_they_lead_to(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    with catalog.transaction("one") as tx:
        kept = preview(tx, slug="kept")
        previews.insert(tx, kept)
        previews.insert(tx, preview(tx, slug="over", exposed=True))  # it leads nowhere
        with pytest.raises(AlreadyExistsError):
            previews.insert(tx, preview(tx, slug="kept"))
        previews.sweep(tx)
        assert previews.page(tx, size=10) == [kept]
        assert previews.find_token(tx, kept.token) == kept
    with catalog.transaction("another") as tx:
        with pytest.raises(NotFoundError):
            previews.get(tx, kept.id)
        assert previews.find_slug(tx, "kept") is None
        assert previews.page(tx, size=10) == []
        previews.insert(tx, preview(tx, slug="kept"))
        assert previews.count(tx) == 1
    catalog.close()


def preview(tx: Transaction, *, slug: str, exposed: bool = False) -> Preview:
    return Preview(
        id=PreviewId(mint()),
        workspace=tx.home,
        slug=slug,
        token=mint(),
        exposed=exposed,
        sandbox=None,
        port=None,
        expires_at=None,
        created_at=tx.now,
        updated_at=tx.now,
        accessed_at=None,
    )
