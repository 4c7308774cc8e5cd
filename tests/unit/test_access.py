"""Keys, roles, limits and the audit log, by themselves."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import pkgutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import stratabox.tenki.v1
import stratabox.v1
from stratabox.daemon.access import roles
from stratabox.daemon.access.audit import AuditLog
from stratabox.daemon.access.certificates import Certificates, TlsFiles
from stratabox.daemon.access.gate import LOCAL, Gate, Principal, current
from stratabox.daemon.access.keyring import Keyring
from stratabox.daemon.access.keys import new_token, parse_token, redacted
from stratabox.daemon.access.limits import Limiter, Limits
from stratabox.daemon.access.opening import certificates_of
from stratabox.daemon.access.redacting import Redacting
from stratabox.daemon.config import load
from stratabox.daemon.doctor import access as doctor_access
from stratabox.daemon.doctor.finding import Status
from stratabox.daemon.rpc.errors import status_of
from stratabox.storage.catalog import keys
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.model.access import ApiKey, Role
from stratabox.storage.model.errors import (
    AlreadyExistsError,
    DeniedError,
    ForbiddenError,
    InvalidArgumentError,
    NotFoundError,
    RateLimitedError,
    UnauthenticatedError,
    UnavailableError,
)
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE
from support.certificates import Authority

_LOOKING = ("Get", "List", "Watch", "WhoAmI", "Check", "ServerRefl")
NO_LIMITS = Limits(rate=0, burst=1, open=0)


# -- roles ----------------------------------------------------------------------------------------


def served() -> Iterator[Any]:
    for package in (stratabox.v1, stratabox.tenki.v1):
        for module in pkgutil.iter_modules(package.__path__):
            if module.name.endswith("_pb2"):
                yield from importlib.import_module(
                    f"{package.__name__}.{module.name}"
                ).DESCRIPTOR.services_by_name.values()
    yield from health_pb2.DESCRIPTOR.services_by_name.values()
    yield from reflection_pb2.DESCRIPTOR.services_by_name.values()


def test_every_method_of_every_service_has_its_role() -> None:
    methods = {service.full_name: {each.name for each in service.methods} for service in served()}
    assert len(methods) > 10
    assert {name: set(rows) for name, rows in roles.LEAST.items()} == methods


def test_roles_are_a_ladder() -> None:
    assert [role for role in Role if role.covers(Role.USER)] == [Role.USER, Role.ADMIN]
    assert Role.READ_ONLY.covers(Role.READ_ONLY)


def test_what_is_not_in_the_table_takes_an_admin() -> None:
    for method in ("stratabox.v1.SandboxesService/New", "a.B/C", "", "/", "stratabox.v1"):
        assert roles.least_role(method) is Role.ADMIN
        with pytest.raises(ForbiddenError):
            roles.require(Role.USER, method)
        roles.require(Role.ADMIN, method)


def test_what_only_looks_changes_nothing() -> None:
    for service, rows in roles.LEAST.items():
        for method, role in rows.items():
            if role is Role.READ_ONLY:
                assert method.startswith(_LOOKING), service


# -- keys -----------------------------------------------------------------------------------------


def test_a_key_is_read_as_it_was_written() -> None:
    token = new_token()
    assert parse_token(token.text()) == token
    assert token.secret not in repr(token)
    assert token.fits(token.hash())
    assert not token.fits(new_token().hash())
    assert not token.fits(None)
    assert len({new_token().secret for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: text + "\n",
        lambda text: text[:-1],
        lambda text: text[:-1] + "é",
        lambda text: text[:-1] + "1",
        lambda text: text.replace("_", "-"),
        lambda text: "",
    ],
)
def test_what_is_no_key(change: Callable[[str], str]) -> None:
    assert parse_token(change(new_token().text())) is None


def test_keys_in_texts_are_cut_down() -> None:
    token = new_token()
    assert redacted(f"a {token.text()}, b") == f"a tk_{token.id}_..., b"
    assert token.secret[:8] not in redacted(f"{token.text()}{token.text()[:30]}")


def test_the_daemons_log_holds_no_key() -> None:
    token = new_token()
    record = logging.LogRecord("x", logging.INFO, "x", 1, "no %r", (token.text(),), None)
    assert Redacting("%(message)s").format(record) == f"no 'tk_{token.id}_...'"


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with closing(Catalog(tmp_path / "catalog.db")) as catalog:
        yield catalog


def insert(catalog: Catalog, name: str = "name", **fields: Any) -> tuple[str, ApiKey]:
    token = new_token()
    values = {"role": Role.USER, "workspace": DEFAULT_WORKSPACE, "created_at": datetime.now(UTC)}
    key = ApiKey(id=token.id, name=name, hash=token.hash(), **{**values, **fields})
    with catalog.transaction() as tx:
        keys.insert(tx, key)
    return token.text(), key


def test_rows_of_keys(catalog: Catalog) -> None:
    _, first = insert(catalog, "first", expires_at=datetime.now(UTC) + timedelta(days=1))
    assert first.hash.hex() not in repr(first)
    with pytest.raises(AlreadyExistsError):
        insert(catalog, "first")
    _, second = insert(catalog, "second", role=Role.ADMIN)
    with catalog.transaction() as tx:
        assert keys.everything(tx) == [first, second]
        assert keys.get(tx, "first") == keys.get(tx, first.id) == keys.find(tx, first.id) == first
        assert keys.revoke(tx, "first").revoked_at == tx.now
        once = keys.revoke(tx, first.id)
        assert keys.revoke(tx, first.id) == once, "the first time counts"
        assert keys.everything(tx) == [second]
        assert keys.everything(tx, revoked=True) == [once, second]
        assert keys.find(tx, "nobody") is None
        for reference in ("nobody", "first"):
            with pytest.raises(NotFoundError):
                keys.get(tx, reference)
        later, sooner = tx.now, tx.now - timedelta(hours=1)
        keys.note_uses(tx, {second.id: later, "nobody": later})
        keys.note_uses(tx, {second.id: sooner})
        assert keys.get(tx, second.id).last_used_at == later
    insert(catalog, "first")  # the name is free again


def test_a_second_process_joins_the_catalog(tmp_path: Path, catalog: Catalog) -> None:
    with closing(Catalog(tmp_path / "catalog.db", joining=True)) as beside:
        _, key = insert(beside)
    with catalog.transaction() as tx:
        assert keys.get(tx, "name") == key
    with pytest.raises(UnavailableError):
        Catalog(tmp_path / "none.db", joining=True)
    assert not (tmp_path / "none.db").exists()
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.execute("PRAGMA user_version = 3")
    with pytest.raises(DeniedError, match="older Stratabox"):
        Catalog(tmp_path / "old.db", joining=True)


# -- the gate -------------------------------------------------------------------------------------


class Noted:
    def __init__(self) -> None:
        self.uses: dict[str, datetime] = {}
        self.error: Exception | None = None
        self.tried = asyncio.Event()

    async def __call__(self, uses: Mapping[str, datetime]) -> None:
        self.tried.set()
        if self.error:
            raise self.error
        self.uses.update(uses)


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
def gate(tmp_path: Path, catalog: Catalog, noted: Noted) -> Iterator[Gate]:
    logs = [AuditLog(tmp_path / "audit" / name, 1 << 20) for name in ("calls", "refused")]
    with closing(Keyring(tmp_path / "catalog.db")) as keyring:
        yield Gate(
            keyring=keyring,
            limiter=Limiter(NO_LIMITS),
            calls=logs[0],
            refused=logs[1],
            note_uses=noted,
        )
        for each in logs:
            each.close()


def why(gate: Gate, token: str | None) -> tuple[str, str]:
    with pytest.raises(UnauthenticatedError) as caught:
        gate.authenticate(token, "ipv4:192.0.2.1:5")
    return caught.value.reason, caught.value.why


def test_who_is_who(gate: Gate, catalog: Catalog) -> None:
    token, key = insert(catalog, role=Role.READ_ONLY)
    principal = gate.authenticate(token, "ipv4:192.0.2.1:5")
    assert principal == Principal(role=Role.READ_ONLY, workspace=DEFAULT_WORKSPACE, key=key.id)
    assert gate.authenticate(None, "unix:/run/x") is LOCAL
    assert why(gate, None)[0] == why(gate, "")[0] == "NO_KEY"
    assert why(gate, "tk_x") == ("INVALID_KEY", "malformed")
    other = new_token()
    assert why(gate, other.text()) == ("INVALID_KEY", f"unknown key:{other.id}")
    mixed = f"tk_{key.id}_{other.secret}"
    assert why(gate, mixed) == ("INVALID_KEY", f"wrong secret key:{key.id}")
    # What nobody may learn is in no answer.
    answers = {str(status_of(error)) for error in map(refusal(gate), (other.text(), mixed, "tk_"))}
    assert len(answers) == 1


def refusal(gate: Gate) -> Callable[[str], UnauthenticatedError]:
    def refused(token: str) -> UnauthenticatedError:
        with pytest.raises(UnauthenticatedError) as caught:
            gate.authenticate(token, "tcp")
        return caught.value

    return refused


def test_a_change_by_another_process_counts_at_once(
    gate: Gate, catalog: Catalog, tmp_path: Path
) -> None:
    token, key = insert(catalog)
    expired, _ = insert(catalog, "expired", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    gate.authenticate(token, "tcp")
    assert why(gate, expired)[0] == "KEY_EXPIRED"
    with (
        closing(Catalog(tmp_path / "catalog.db", joining=True)) as beside,
        beside.transaction() as tx,
    ):
        keys.revoke(tx, key.id)
        gate.authenticate(token, "tcp")  # not committed yet
    assert why(gate, token) == ("INVALID_KEY", f"revoked key:{key.id}")


def test_keys_that_cannot_be_read_open_nothing(gate: Gate, catalog: Catalog) -> None:
    token, _ = insert(catalog)
    with catalog.transaction() as tx:
        tx.execute("DROP TABLE api_keys")
    with pytest.raises(UnavailableError):
        gate.authenticate(token, "tcp")


async def test_a_call_is_counted_and_ended_with_its_key(
    gate: Gate, catalog: Catalog, noted: Noted, tmp_path: Path
) -> None:
    token, key = insert(catalog)
    principal = gate.authenticate(token, "tcp")
    gate.admit(principal, "stratabox.v1.SandboxesService/GetSandbox")
    with pytest.raises(ForbiddenError):
        gate.admit(principal, "stratabox.v1.HostService/GetHost")
    seen: list[str] = []

    async def work() -> None:
        with gate.call(principal, "a.B/C", "ipv4:1.2.3.4:5", long=True) as call:
            call.names["sandbox"] = "x" * 1000
            assert current.get() is principal
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                assert call.ended is not None
                seen.append(call.ended.reason)
                raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    gate.end_revoked()
    await asyncio.sleep(0)
    assert not task.done()
    with catalog.transaction() as tx:
        keys.revoke(tx, key.id)
    gate.end_revoked()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["INVALID_KEY"]
    assert current.get() is LOCAL
    noted.error = UnavailableError("no")
    with pytest.raises(UnavailableError):
        await gate.write_uses()
    noted.error = None
    await gate.write_uses()
    assert set(noted.uses) == {key.id}
    gate._calls.close()
    begun, ended = (json.loads(line) for line in (tmp_path / "audit/calls").read_text().split())
    assert (begun["phase"], begun["names"]) == ("begun", {})
    assert (ended["who"], ended["result"]) == (f"key:{key.id}", "UNAUTHENTICATED")
    assert ended["names"] == {"sandbox": "x" * 200}


async def test_a_full_disk_ends_no_watch_over_keys(
    gate: Gate, catalog: Catalog, noted: Noted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stratabox.daemon.access.gate._LOOK", 0)
    token, key = insert(catalog)
    gate.admit(gate.authenticate(token, "tcp"), "stratabox.v1.SandboxesService/GetSandbox")
    noted.error = UnavailableError("no")
    keeping = asyncio.create_task(gate.keep())
    await noted.tried.wait()
    noted.error = None
    noted.tried.clear()
    gate.admit(gate.authenticate(token, "tcp"), "stratabox.v1.SandboxesService/GetSandbox")
    await noted.tried.wait()
    assert set(noted.uses) == {key.id}
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


def test_strangers_cannot_fill_the_log(gate: Gate, tmp_path: Path) -> None:
    error = refusal(gate)("tk_x")
    for _ in range(1000):
        gate.refuse(error, None, "a.B/C", "tcp")
    known = Principal(role=Role.USER, workspace=DEFAULT_WORKSPACE, key="k")
    gate.refuse(error, known, "a.B/C", "tcp")  # those of keys are counted for themselves
    gate._refused.close()
    lines = [json.loads(line) for line in (tmp_path / "audit/refused").read_text().split()]
    assert 100 <= len(lines) < 900
    assert lines[-1]["who"] == "key:k"
    assert sum(line.get("left_out", 0) for line in lines) + len(lines) == 1001


# -- certificates ---------------------------------------------------------------------------------


def test_files_that_do_not_do(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key, _ = authority.issue("one")
    other = authority.issue("two")[1]
    empty = tmp_path / "empty"
    empty.touch()
    secret = tmp_path / "secret"
    secret.write_text("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n")
    for files, words in (
        (TlsFiles(certificate=tmp_path / "none", key=key), "cannot be read"),
        (TlsFiles(certificate=empty, key=key), "no PEM certificate"),
        (TlsFiles(certificate=certificate, key=empty), "no PEM private key"),
        (TlsFiles(certificate=certificate, key=secret), "no PEM private key"),
        (TlsFiles(certificate=certificate, key=other), "is not the key of"),
        (TlsFiles(certificate=certificate, key=key, client_ca=empty), "no PEM certificate"),
    ):
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            Certificates(files)
        assert "hunter2" not in str(caught.value)
    good = Certificates(TlsFiles(certificate=certificate, key=key, client_ca=authority.file))
    before, told = good.current, list[int]()
    good.on_reload.append(lambda: told.append(1))
    key.write_bytes(other.read_bytes())
    assert not good.reload()
    assert (good.current, told) == (before, [])


def test_what_the_configuration_must_name() -> None:
    def config(**values: str) -> Any:
        environment = {f"STRATABOX_{name}": value for name, value in values.items()}
        return load([], {"HOME": "/home/ann", **environment}, root=False)

    assert certificates_of(config()) is None
    assert certificates_of(config(LISTEN="http://127.0.0.1:1, http://[::1]:2")) is None
    for values in (
        {"LISTEN": "https://h:1"},
        {"ADDRESS": "https://h:1", "TLS_KEY": "/k"},
        {"TLS_CERTIFICATE": "/c"},
        {"TLS_CLIENT_CA": "/c"},
    ):
        with pytest.raises(InvalidArgumentError, match=r"takes tls\.") as caught:
            certificates_of(config(**values))
        assert caught.value.reason == "INVALID_TLS"
    with pytest.raises(InvalidArgumentError, match="named by `address`"):
        config(LISTEN="unix:///x")
    both = config(ADDRESS="http://localhost:1", LISTEN="https://h:2,http://localhost:1")
    assert [str(each) for each in both.ports] == ["http://localhost:1", "https://h:2"]
    assert [each.is_loopback for each in both.ports] == [True, False]


def test_the_doctor_looks_at_keys_and_certificates(tmp_path: Path) -> None:
    certificate, key, _ = Authority(tmp_path).issue("one")

    def examine(*argv: str) -> list[tuple[str, Status]]:
        config = load(["--state-dir", str(tmp_path), *argv], {"HOME": "/home/ann"}, root=False)
        checks = doctor_access.check_keys, doctor_access.check_tls
        return [(each.name, each.status) for check in checks for each in check(config)]

    tls = "--tls-certificate", str(certificate), "--tls-key", str(key)
    near, far = ("--listen", "http://127.0.0.1:1"), ("--listen", "https://0.0.0.0:1")
    assert examine() == []
    assert examine(*near) == [("api-keys", Status.WARN)]
    assert examine(*far) == [("api-keys", Status.FAIL), ("tls", Status.FAIL)]
    with closing(Catalog(tmp_path / "catalog.db")) as catalog:
        insert(catalog)
    assert examine(*near) == [("api-keys", Status.OK)]
    assert examine(*far, *tls) == [("api-keys", Status.OK), ("tls", Status.OK)]


def test_an_error_says_when_to_try_again() -> None:
    status = status_of(RateLimitedError("slowly", retry_after=0.0123))
    assert len(status.details) == 2
    assert status.details[1].type_url.endswith("google.rpc.RetryInfo")
