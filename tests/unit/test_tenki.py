"""Tenki's words: credentials, texts of errors, lists; what its clients make of them."""

from __future__ import annotations

import base64
import sqlite3
import typing
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.access.credentials import LIFETIME, Credentials
from stratabox.daemon.access.gate import LOCAL, Principal, current, require_session
from stratabox.daemon.config import load
from stratabox.daemon.hypervisor.usage import ProcessUsage
from stratabox.daemon.lifecycle.observing import history
from stratabox.daemon.tenki import endpoints, errors, services, serving
from stratabox.storage.catalog import keyset, secrets
from stratabox.storage.catalog.database import Catalog, Transaction
from stratabox.storage.catalog.keyset import By
from stratabox.storage.catalog.lookup import Page
from stratabox.storage.model.access import Role
from stratabox.storage.model.errors import (
    DeniedError,
    InvalidArgumentError,
    NoSpaceError,
    NotFoundError,
    RateLimitedError,
    StrataboxError,
    UnauthenticatedError,
)
from stratabox.storage.model.ids import mint

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = "abcdefghijkl"
SESSION = mint()


# -- credentials ----------------------------------------------------------------------------------


def test_a_credential_says_what_it_was_made_for_until_its_time_is_up() -> None:
    made = Credentials(b"secret")
    text, claim = made.issue(SESSION, KEY, NOW)
    assert (claim.session, claim.key) == (SESSION, KEY)
    assert made.read(text, NOW) == claim
    again = Credentials(b"secret")
    assert again.read(text, claim.expires_at - timedelta(seconds=1)) == claim, "after a restart"
    with pytest.raises(UnauthenticatedError) as caught:
        made.read(text, NOW + LIFETIME)
    assert caught.value.reason == "CREDENTIAL_EXPIRED"
    local, _ = made.issue(SESSION, None, NOW)
    assert made.read(local, NOW).key is None


def test_what_others_signed_or_nobody_is_no_credential() -> None:
    made = Credentials(b"secret")
    text, _ = made.issue(SESSION, KEY, NOW)
    foreign, _ = Credentials(b"other").issue(SESSION, KEY, NOW)
    raw = base64.urlsafe_b64decode(text[3:] + "=" * (-len(text[3:]) % 4))
    for position in range(len(raw)):
        changed = bytes([*raw[:position], raw[position] ^ 1, *raw[position + 1 :]])
        forged = "sc_" + base64.urlsafe_b64encode(changed).decode().rstrip("=")
        with pytest.raises(UnauthenticatedError) as caught:
            made.read(forged, NOW)
        assert caught.value.reason == "INVALID_CREDENTIAL"
    for bad in (
        foreign,
        text[:-1],
        text + "A",
        text[3:],
        "sc_",
        "tk_" + text[3:],
        "sc_" + "é" * 91,
    ):
        with pytest.raises(UnauthenticatedError):
            made.read(bad, NOW)
    for none in ("", None):
        with pytest.raises(UnauthenticatedError) as caught:
            made.read(none, NOW)
        assert caught.value.reason == "NO_CREDENTIAL"


@given(st.text(max_size=200))
def test_no_text_at_all_is_taken_for_a_credential(text: str) -> None:
    with pytest.raises(UnauthenticatedError):
        Credentials(b"secret").read(text, NOW)


def test_a_credential_is_for_its_session_alone() -> None:
    require_session(SESSION)  # the Unix socket's caller
    principal = Principal(role=Role.USER, workspace="default", key=KEY, session=SESSION)
    reset = current.set(principal)
    try:
        require_session(SESSION)
        for other in (mint(), "", SESSION.upper(), "é"):
            with pytest.raises(UnauthenticatedError):
                require_session(other)
    finally:
        current.reset(reset)
    assert current.get() is LOCAL


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")
    with catalog.transaction() as tx:
        first = secrets.get(tx, secrets.SESSIONS)
    catalog.close()
    again = Catalog(tmp_path / "catalog.db")
    with again.transaction() as tx:
        assert secrets.get(tx, secrets.SESSIONS) == first
        assert secrets.get(tx, "another") != first
    again.close()
    assert len(first) == 32


# -- errors ---------------------------------------------------------------------------------------


def exception_of(code: grpc.StatusCode, text: str) -> str:
    """What Tenki's Python SDK raises, by its own table."""
    text = text.lower()
    table: dict[grpc.StatusCode, list[tuple[str, str]]] = {
        grpc.StatusCode.NOT_FOUND: [
            ("template", "TemplateNotFound"),
            ("snapshot", "SnapshotNotFound"),
            ("volume", "VolumeNotFound"),
            ("registry image", "RegistryImageNotFound"),
            ("no such file or directory", "FileNotFound"),
            ("", "SessionNotFound"),
        ],
        grpc.StatusCode.RESOURCE_EXHAUSTED: [
            ("maximum exposed ports", "PortLimitExceeded"),
            ("rate limit", "RateLimited"),
            ("", "QuotaExceeded"),
        ],
        grpc.StatusCode.FAILED_PRECONDITION: [
            ("template runtime failed", "TemplateRuntimeFailed"),
            ("terminated", "SessionTerminated"),
            ("sync_pending", "VolumeSyncPending"),
            ("sync pending", "VolumeSyncPending"),
            ("volume is attached", "VolumeInUse"),
            ("volume is in use", "VolumeInUse"),
            ("inbound access is disabled", "InboundDisabled"),
            ("build in progress", "TemplateBuildInProgress"),
            ("", "InvalidState"),
        ],
    }
    return next(name for word, name in table[code] if word in text)


NASTY = "terminated template snapshot volume is in use, rate limit no such file or directory"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotFoundError(f"no {NASTY}", reason="SANDBOX_NOT_FOUND"), "SessionNotFound"),
        (NotFoundError("x", reason="SNAPSHOT_NOT_FOUND", snapshot=mint()), "SnapshotNotFound"),
        (NotFoundError("x", reason="SNAPSHOT_NOT_FOUND", snapshot=NASTY), "SnapshotNotFound"),
        (NotFoundError("x", reason="VOLUME_NOT_FOUND", volume=NASTY), "VolumeNotFound"),
        (NotFoundError(f"no image {NASTY}", reason="IMAGE_NOT_FOUND"), "RegistryImageNotFound"),
        (
            NotFoundError("open /snapshot: no such file or directory", reason="FILE_NOT_FOUND"),
            "FileNotFound",
        ),
        (DeniedError(f"volume {NASTY!r} is in use", reason="VOLUME_IN_USE"), "VolumeInUse"),
        (DeniedError(f"sandbox {NASTY!r} is busy", reason="GUEST_BOOTING"), "InvalidState"),
        (errors.not_running("PAUSED"), "InvalidState"),
        (errors.terminated(), "SessionTerminated"),
        (DeniedError("x", sandbox="s", state="terminated"), "SessionTerminated"),
        (DeniedError("x", sandbox="s", state="paused"), "InvalidState"),
        (RateLimitedError("this key's rate limit is reached"), "RateLimited"),
        (NoSpaceError(f"no room for {NASTY!r}"), "QuotaExceeded"),
    ],
)
def test_each_error_becomes_the_right_exception_whatever_names_are_in_it(
    error: StrataboxError, expected: str
) -> None:
    status = errors.status_of(error)
    code = next(each for each in grpc.StatusCode if each.value[0] == status.code)
    assert exception_of(code, status.message) == expected, status.message


def test_the_texts_that_clients_compare() -> None:
    snapshot = mint()
    for error, text in (
        (NotFoundError("x", reason="SANDBOX_NOT_FOUND"), "session not found"),
        (
            NotFoundError("x", reason="SNAPSHOT_NOT_FOUND", snapshot=snapshot),
            f"snapshot {snapshot} not found",
        ),
        (errors.not_running("PAUSED"), "session is not running: state = PAUSED"),
        (
            DeniedError("x", sandbox="s", state="paused"),
            "session is not running: state = PAUSED",
        ),
    ):
        assert errors.status_of(error).message == text
    unserved = errors.status_of(errors.UnservedError("A/Get404"))
    assert unserved.code == grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert "404" not in unserved.message


# -- services -------------------------------------------------------------------------------------


class Anything:
    """In the place of parts that nobody uses."""

    def __getattr__(self, name: str) -> Anything:
        return self


def test_every_call_takes_and_gives_what_its_method_does() -> None:
    parts: Any = Anything()
    made = serving.tenki_services(parts)
    for service in (services.CONTROL, services.DATA_PLANE):
        for method in service.methods:
            if method.name not in made.handlers[service.full_name]:
                continue
            handler = made.handlers[service.full_name][method.name]
            kind = (handler.request_streaming, handler.response_streaming)
            assert kind == (method.client_streaming, method.server_streaming), method.name
            answer = (
                handler.unary_unary
                or handler.unary_stream
                or handler.stream_unary
                or handler.stream_stream
            )
            hints = typing.get_type_hints(answer.__wrapped__)
            request, reply = (
                GetMessageClass(each) for each in (method.input_type, method.output_type)
            )
            assert request in (hints.get("request"), *typing.get_args(hints.get("requests"))), (
                method.name
            )
            assert reply in (hints["return"], *typing.get_args(hints["return"])), method.name


# -- lists ----------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc")), max_size=12),
    descending=st.tuples(st.booleans(), st.booleans()),
    size=st.integers(1, 5),
)
def test_pages_in_any_order_show_each_row_once(
    rows: list[tuple[int, str]], descending: tuple[bool, bool], size: int
) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("CREATE TABLE things (id TEXT, number INTEGER, word TEXT)")
        for place, (number, word) in enumerate(rows):
            connection.execute("INSERT INTO things VALUES (?, ?, ?)", (f"{place}", number, word))
        tx = Transaction(connection, NOW)
        order = (By("things.number", descending[0]), By("things.word", descending[1]))
        seen, token = [], ""
        while True:
            found, token = keyset.list_page(
                tx, "things", Page(size=size, token=token), [], {}, order
            )
            seen += [(row["number"], row["word"], row["id"]) for row in found]
            if not token:
                break
        assert len(seen) == len(set(seen)) == len(rows)
        by_word = sorted(seen, key=lambda row: row[1], reverse=descending[1])
        expected = sorted(by_word, key=lambda row: row[0], reverse=descending[0])
        assert [row[:2] for row in seen] == [row[:2] for row in expected]


def test_a_token_of_another_list_or_of_nobody_is_refused() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("CREATE TABLE things (id TEXT, number INTEGER)")
        connection.executemany("INSERT INTO things VALUES (?, ?)", [("a", 1), ("b", 2)])
        tx = Transaction(connection, NOW)
        order = (By("things.number"),)
        _, token = keyset.list_page(tx, "things", Page(size=1), [], {}, order)
        other = (By("things.number", descending=True),)
        nested = base64.urlsafe_b64encode(b"[" * 3000).decode()
        for bad in (token[:-4], "x", nested, "A" * 5000, "é"):
            with pytest.raises(InvalidArgumentError):
                keyset.list_page(tx, "things", Page(token=bad), [], {}, order)
        with pytest.raises(InvalidArgumentError):
            keyset.list_page(tx, "things", Page(token=token), [], {}, other)


# -- metrics --------------------------------------------------------------------------------------


def used(at: float, cpu: float, rss: int, uptime: float = 1.0) -> ProcessUsage:
    return ProcessUsage(at=at, uptime=uptime, cpu=cpu, rss=rss)


def test_an_average_is_of_what_was_seen() -> None:
    found = history.average([used(10, 1, 100), used(20, 6, 300), used(30, 11, 200)])
    assert (found.samples, found.observed) == (3, timedelta(seconds=20))
    assert (found.cores, found.bytes) == (0.5, 200)
    alone = history.average([used(10, 1, 100)])
    assert (alone.samples, alone.cores, alone.bytes) == (1, None, 100)


def test_that_a_process_began_with_nothing_counts_for_its_cpu_alone() -> None:
    found = history.average([used(10, 0, 0, uptime=0.0), used(14, 2, 100)])
    assert (found.samples, found.cores, found.bytes) == (1, 0.5, 100)


# -- endpoints ------------------------------------------------------------------------------------


class Connection:
    """A call, as far as its connection is known."""

    def __init__(self, peer: str, *, secure: bool = False) -> None:
        self._peer = peer
        self._secure = secure

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"transport_security_type": [b"ssl" if self._secure else b"insecure"]}


NEAR, FAR = "ipv4:127.0.0.1:4000", "ipv4:192.0.2.9:4000"


@pytest.mark.parametrize(
    ("listen", "endpoint", "peer", "secure", "expected"),
    [
        ("http://127.0.0.1:1", "", NEAR, False, "http://127.0.0.1:1"),
        ("http://[::1]:1", "", "ipv6:%5B::1%5D:4000", False, "http://[::1]:1"),
        ("http://127.0.0.1:1, https://box:2", "", FAR, True, "https://box:2"),
        ("http://127.0.0.1:1, https://box:2", "", NEAR, True, "https://box:2"),
        ("http://127.0.0.1:1, https://box:2", "", NEAR, False, "http://127.0.0.1:1"),
        ("https://0.0.0.0:2", "", NEAR, True, "https://127.0.0.1:2"),
        ("https://0.0.0.0:2", "https://box.test:3", FAR, True, "https://box.test:3"),
        ("http://127.0.0.1:1", "", "unix:", False, ""),
        ("https://0.0.0.0:2", "", FAR, True, None),
    ],
)
def test_clients_are_told_of_an_address_that_they_can_reach(
    listen: str, endpoint: str, peer: str, secure: bool, expected: str | None
) -> None:
    config = load(["--listen", listen, "--endpoint", endpoint], {"HOME": "/root"}, root=True)
    connection: Any = Connection(peer, secure=secure)
    if expected is None:
        with pytest.raises(DeniedError, match="set endpoint"):
            endpoints.data_plane(config, connection)
        return
    assert endpoints.data_plane(config, connection) == expected
