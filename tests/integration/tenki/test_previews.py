"""Pages of guests in browsers: each on an origin of its own, for as long as its guest runs."""

from __future__ import annotations

import http.client
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from stratabox.client import Client, Sandbox
from stratabox.tenki.v1 import records_pb2, sandbox_pb2
from support.rig import eventually
from support.tenki import Tenki, refused

Session = records_pb2.SandboxSession
SITE = """\
mkdir -p /www/cgi-bin && echo page >/www/index.html
printf '#!/bin/sh\\necho; cat' >/www/cgi-bin/echo
printf '#!/bin/sh\\necho; env' >/www/cgi-bin/env
chmod +x /www/cgi-bin/*
"""
SERVE = "busybox httpd -f -p 127.0.0.1:3000 -h /www >/dev/null 2>&1 </dev/null & echo $! >/httpd"
LISTENS = "cat /proc/net/tcp* | grep -q ':%04X [0-9A-F]*:0000 0A '"
SWITCHING = r"""
while read -r line && [ ${#line} -gt 1 ]; do :; done
printf 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'
exec cat
"""


@dataclass(frozen=True)
class Page:
    """What a browser got."""

    status: int
    body: bytes


def get(url: str, *, body: bytes | None = None, host: str = "", chunked: bool = False) -> Page:
    """Ask as a browser does, for which every name below localhost is this host."""
    parts = urlsplit(url)
    assert parts.port
    connection = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=60)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    pieces = iter([body]) if chunked and body is not None else body
    try:
        connection.request(
            "GET" if body is None else "POST",
            target,
            pieces,
            {"Host": host or parts.netloc},
            encode_chunked=chunked,
        )
        response = connection.getresponse()
        return Page(response.status, response.read())
    finally:
        connection.close()


@contextmanager
def raw(url: str, head: str) -> Iterator[socket.socket]:
    """A connection on which a request's head was sent."""
    parts = urlsplit(url)
    assert parts.port
    with socket.create_connection(("127.0.0.1", parts.port), timeout=60) as connection:
        connection.sendall(head.format(host=parts.netloc).encode())
        yield connection


def expose(tenki: Tenki, session: Session, port: int = 3000, **more: Any) -> Any:
    request = sandbox_pb2.ExposePortRequest(session_id=session.id, port=port, **more)
    return tenki.call("ExposePort", request)


def unexpose(tenki: Tenki, session: Session, port: int = 3000) -> None:
    tenki.call("UnexposePort", sandbox_pb2.UnexposePortRequest(session_id=session.id, port=port))


@pytest.fixture(scope="module")
def box(tenki: Tenki, session: Session) -> Iterator[Sandbox]:
    """The session's guest, in which a web server listens on its loopback."""
    with Client(tenki.process.address) as client:
        found = client.sandboxes.get(session.id)
        assert found.execute(SITE).exit_code == 0
        serve(found)
        yield found


def serve(box: Sandbox) -> None:
    """Have the guest's site be served."""
    box.execute(SERVE).check()
    eventually(lambda: box.execute(LISTENS % 3000).exit_code == 0)


@pytest.fixture
def url(tenki: Tenki, session: Session, box: Sandbox) -> Iterator[str]:
    """Where the guest's site is seen."""
    yield expose(tenki, session).preview_url
    unexpose(tenki, session)


def test_a_page_and_its_bodies(url: str) -> None:
    # As users do: curl takes every name below localhost for this host.
    done = subprocess.run(["curl", "-sS", url], capture_output=True, check=True, timeout=60)
    assert done.stdout == b"page\n"
    assert get(f"{url}/none").status == 404
    data = bytes(range(256)) * 4096
    assert get(f"{url}/cgi-bin/echo", body=data) == Page(200, data)
    seen = get(f"{url}/cgi-bin/env?a=b").body.decode()
    assert "QUERY_STRING=a=b" in seen
    assert f"HTTP_HOST={urlsplit(url).netloc}" in seen
    assert "HTTP_X_FORWARDED_FOR=127.0.0.1" in seen


def test_each_preview_is_an_origin_of_its_own(tenki: Tenki, session: Session, url: str) -> None:
    request = sandbox_pb2.CreatePreviewUrlRequest(slug="other", session_id=session.id, port=3000)
    other = tenki.call("CreatePreviewUrl", request).preview_url
    try:
        assert get(other.preview_url) == get(url)
        names = [urlsplit(each).hostname or "" for each in (url, other.preview_url, tenki.url)]
        assert len(set(names)) == 3
        token = names[0].removesuffix(".localhost")[-26:]
        # Who does not know the token finds nothing, whatever else fits.
        wrong = names[0].replace(token, token[1:] + "a")
        for host in (wrong, "localhost", "127.0.0.1", f"{token}.example.org", "", names[1][:-4]):
            assert get(url, host=host or "x").status == 404
    finally:
        deleting = sandbox_pb2.DeletePreviewUrlRequest(preview_url_id=other.id)
        tenki.call("DeletePreviewUrl", deleting)
    assert get(other.preview_url).status == 404


def test_both_sides_go_over_to_another_protocol(
    tenki: Tenki, session: Session, box: Sandbox
) -> None:
    box.files.write("/ws", SWITCHING.encode())
    line = "busybox nc -ll -p 3001 -e sh /ws >/dev/null 2>&1 </dev/null &"
    assert box.execute(line).exit_code == 0
    eventually(lambda: box.execute(LISTENS % 3001).exit_code == 0)
    head = "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with raw(expose(tenki, session, 3001).preview_url, head) as connection:
        stream = connection.makefile("rb")
        assert stream.readline() == b"HTTP/1.1 101 \r\n"
        while stream.readline() != b"\r\n":
            pass
        connection.sendall(b"\x81\x02hi")
        assert stream.read(4) == b"\x81\x02hi"
        # Who is looking is cut off when the port is not exposed any more.
        unexpose(tenki, session, 3001)
        assert stream.read() == b""


def test_an_end_of_its_own(tenki: Tenki, session: Session, box: Sandbox) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=4)
    made = expose(tenki, session, expires_at=ends, slug="short")
    assert made.expires_at.ToDatetime(UTC) == ends
    with raw(made.preview_url, "GET /none HTTP/1.1\r\nHost: {host}\r\n\r\n") as connection:
        assert connection.makefile("rb").read(13) == b"HTTP/1.1 404 "
    eventually(lambda: datetime.now(UTC) >= ends)
    assert get(made.preview_url).status == 404
    listed = tenki.call(
        "ListExposedPorts", sandbox_pb2.ListExposedPortsRequest(session_id=session.id)
    )
    assert list(listed.ports) == []
    with pytest.raises(grpc.RpcError) as caught:
        expose(tenki, session, expires_at=ends)
    assert refused(caught).code is grpc.StatusCode.INVALID_ARGUMENT


def test_what_cannot_be_exposed(tenki: Tenki, session: Session, box: Sandbox) -> None:
    snapshot = box.snapshot(level="memory")
    closed = tenki.create(snapshot_id=snapshot.id, allow_inbound=False).session
    try:
        assert not closed.inbound_enabled
        with pytest.raises(grpc.RpcError) as caught:
            expose(tenki, closed)
        assert refused(caught).code is grpc.StatusCode.FAILED_PRECONDITION
        assert "inbound access is disabled" in refused(caught).text
    finally:
        tenki.terminate(closed.id)
        with Client(tenki.process.address) as client:
            client.snapshots.delete(snapshot.id)
    with pytest.raises(grpc.RpcError) as caught:
        expose(tenki, closed)
    assert "terminated" in refused(caught).text
    for wrong in ({"port": 0}, {"port": 65536}, {"slug": "no_good"}, {"slug": "a"}):
        with pytest.raises(grpc.RpcError) as caught:
            expose(tenki, session, **({"port": 3000} | wrong))
        assert refused(caught).code is grpc.StatusCode.INVALID_ARGUMENT, wrong
    try:
        for port in range(5000, 5032):
            expose(tenki, session, port)
        with pytest.raises(grpc.RpcError) as caught:
            expose(tenki, session, 5032)
        assert refused(caught).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "maximum exposed ports" in refused(caught).text
        assert expose(tenki, session, 5000).port == 5000  # it has its place already
    finally:
        for port in range(5000, 5032):
            unexpose(tenki, session, port)


def test_nothing_is_served_of_a_guest_that_does_not_run(
    tenki: Tenki, session: Session, box: Sandbox, url: str
) -> None:
    assert get(url).status == 200
    box.execute("kill $(cat /httpd)").check()
    eventually(lambda: box.execute(LISTENS % 3000).exit_code != 0)
    assert get(url).status == 502
    serve(box)
    box.pause()
    try:
        assert get(url).status == 404
    finally:
        box.resume()
    assert get(url) == Page(200, b"page\n")


def test_downloads_take_a_link_that_was_signed(
    tenki: Tenki, session: Session, box: Sandbox, tmp_path: Path
) -> None:
    snapshot = box.snapshot(name="to-download", quick=True)
    request = sandbox_pb2.GetSnapshotDownloadURLRequest(snapshot_id=snapshot.id)
    try:
        link = tenki.call("GetSnapshotDownloadURL", request)
        assert link.expires_at.ToDatetime(UTC) > datetime.now(UTC)
        page = get(link.url)
        assert page.status == 200
        (tmp_path / "a.sbx").write_bytes(page.body)
        with Client(tenki.process.address) as client:
            brought = client.snapshots.import_file(tmp_path / "a.sbx", name="brought")
            client.snapshots.delete(brought.snapshot.id)
        assert get(link.url.replace("signature=", "signature=0")).status == 403
        assert get(link.url.replace(snapshot.id, session.id)).status == 403
        assert get(link.url.replace("expires=", "expires=9")).status == 403
        assert get(link.url, body=b"x").status == 405
    finally:
        with Client(tenki.process.address) as client:
            client.snapshots.delete(snapshot.id)
    assert get(link.url).status == 404
    with pytest.raises(grpc.RpcError) as caught:
        tenki.call("GetSnapshotDownloadURL", request)
    assert refused(caught).text == f"snapshot {snapshot.id} not found"
