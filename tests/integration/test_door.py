"""The API's door: keys, TLS, roles, limits and the audit log, against a real daemon over TCP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stratabox.client import (
    AsyncClient,
    Client,
    DaemonUnavailableError,
    ForbiddenError,
    ImageNotFoundError,
    InvalidAddressError,
    RateLimitedError,
    Sandbox,
    SandboxNotFoundError,
    UnauthenticatedError,
)
from support.certificates import Authority
from support.daemon import DaemonProcess, daemon
from support.doors import Place, Words, free_port, key, run
from support.rig import eventually


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("door")
    authority = Authority(folder)
    certificate, private, _ = authority.issue("first")
    (folder / "tls.pem").write_bytes(certificate.read_bytes())
    (folder / "tls.key").write_bytes(private.read_bytes())
    url = f"https://127.0.0.1:{free_port()}"
    environment = {
        "STRATABOX_LISTEN": url,
        "STRATABOX_TLS_CERTIFICATE": str(folder / "tls.pem"),
        "STRATABOX_TLS_KEY": str(folder / "tls.key"),
    }
    with daemon(folder, environment) as process:
        process.start().close()
        yield Place(process, authority, url)
        process.stop()


@pytest.fixture(scope="module")
def admin(place: Place) -> str:
    """A key for everything, made while the daemon runs."""
    made: str = key(place.process, "create", "--role", "admin", "--name", "admin")["key"]
    return made


@pytest.fixture(scope="module")
def guest(place: Place, admin: str) -> Iterator[Sandbox]:
    """A guest of that daemon, reached by TLS and key alone."""
    with place.client(admin) as client:
        client.images.build_tiny()
        with client.sandboxes.create(image="tiny", name="box", memory=256) as sandbox:
            yield sandbox


# -- keys -----------------------------------------------------------------------------------------


def test_only_a_good_key_opens_the_port(place: Place) -> None:
    made = key(place.process, "create", "--name", "good")
    token: str = made["key"]
    assert re.fullmatch(r"tk_[a-z2-7]{12}_[a-z2-7]{52}", token)
    assert place.reason(token) is None
    assert place.reason(None) == "NO_KEY"
    other = "a" if token[-5] != "a" else "b"
    nobody = f"tk_{'a' * 12}_{token.rpartition('_')[2]}"
    for bad in (token[:-1], token[:-5] + other + token[-4:], nobody, "tk_", "tk_x" * 500):
        assert place.reason(bad) == "INVALID_KEY", bad
    key(place.process, "revoke", made["id"])
    assert place.reason(token) == "INVALID_KEY"
    with place.client(token) as client, pytest.raises(UnauthenticatedError) as caught:
        client.host()
    assert token.rpartition("_")[2] not in str(caught.value)


def test_a_key_whose_time_is_up_opens_nothing(place: Place) -> None:
    token: str = key(place.process, "create", "--expires", "1s")["key"]
    deadline = time.monotonic() + 60
    while (reason := place.reason(token)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert reason == "KEY_EXPIRED"
    assert place.reason(token[:-1] + ("a" if token[-1] != "a" else "b")) == "INVALID_KEY", (
        "only who has the secret learns that it was one"
    )


def test_the_key_goes_in_either_header(place: Place, admin: str) -> None:
    credentials = grpc.ssl_channel_credentials(place.authority.file.read_bytes())
    with grpc.secure_channel(place.url.removeprefix("https://"), credentials) as channel:
        method: Any = channel.unary_unary("/stratabox.v1.SandboxesService/ListSandboxes")
        for metadata in (
            [("authorization", f"Bearer {admin}")],
            [("authorization", f"bearer  {admin}")],
            [("x-api-key", admin)],
        ):
            method(b"", metadata=metadata)
        for metadata in (
            [("authorization", f"Basic {admin}")],
            [("authorization", "Bearer ")],
            [("authorization", "Bearer " + "tk_x" * 4000)],
            [("x-api-key", "")],
        ):
            with pytest.raises(grpc.RpcError) as caught:
                method(b"", metadata=metadata)
            code: Any = caught.value
            assert code.code() in (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,  # gRPC's own limit of metadata
            )
        # Whether it serves is for everybody; what there is, and who watches it, is not.
        health: Any = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert health.Check(health_pb2.HealthCheckRequest()).status == serving
        for name in (
            "stratabox.v1.SandboxesService/NoSuchMethod",
            "nobody.v1.Service/Method",
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "grpc.health.v1.Health/Watch",
        ):
            unknown: Any = channel.stream_stream(f"/{name}")
            with pytest.raises(grpc.RpcError) as caught:
                list(unknown(iter([b""])))
            code = caught.value
            assert code.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_async_client_and_the_command_line_bring_it(place: Place, admin: str) -> None:
    authority = place.authority.file
    async with AsyncClient(place.url, 60, api_key=admin, ca_file=authority) as client:
        assert (await client.host()).pid == place.process.pid
    async with AsyncClient(place.url, 60, ca_file=authority) as client:
        with pytest.raises(UnauthenticatedError):
            await client.host()
    words = {"STRATABOX_ADDRESS": place.url, "STRATABOX_CA_FILE": str(authority)}
    done = run(place.process, "config", "show", "--json", **words, STRATABOX_API_KEY=admin)
    assert done.returncode == 0, done.stderr
    assert place.url in done.stdout
    done = run(place.process, "sandbox", "list", "--json", **words)
    assert done.returncode == 4
    assert json.loads(done.stderr)["error"]["reason"] == "NO_KEY"


def test_keys_are_listed_without_secrets(place: Place) -> None:
    words = "key", "create", "--name", "listed", "--role", "read-only", "--json"
    made = json.loads(run(place.process, *words).stdout)
    assert place.reason(made["key"]) is None
    listed = run(place.process, "key", "list", "--json").stdout
    (row,) = [row for row in json.loads(listed)["keys"] if row["name"] == "listed"]
    assert (row["id"], row["role"], row["state"]) == (made["id"], "read-only", "good")
    assert made["key"].rpartition("_")[2] not in listed
    catalog = b"".join(
        path.read_bytes() for path in place.process.state.glob("catalog.db*") if path.is_file()
    )
    assert made["id"].encode() in catalog
    assert made["key"].rpartition("_")[2].encode() not in catalog
    again = run(place.process, "key", "create", "--name", "listed")
    assert again.returncode == 1
    assert "there is a key 'listed' already" in again.stderr
    assert run(place.process, "key", "revoke", "listed").returncode == 0
    assert "listed" not in run(place.process, "key", "list").stdout
    assert "listed" in run(place.process, "key", "list", "--all").stdout


def test_a_workspace_of_its_own_is_refused_not_ignored(place: Place) -> None:
    done = run(place.process, "key", "create", "--workspace", "team")
    assert done.returncode == 1
    assert "workspace 'team'" in done.stderr
    assert done.stdout == ""


def test_keys_never_go_over_a_network_in_the_clear(admin: str) -> None:
    with pytest.raises(InvalidAddressError, match="no TLS"):
        Client("http://192.0.2.1:7777", api_key=admin)
    with pytest.raises(UnauthenticatedError, match="begin with tk_") as caught:
        Client("http://127.0.0.1:7777", api_key="hunter2")
    assert "hunter2" not in str(caught.value)


# -- roles ----------------------------------------------------------------------------------------


def test_a_role_is_held_to(place: Place, admin: str) -> None:
    reader = place.client(key(place.process, "create", "--role", "read-only")["key"])
    user = place.client(key(place.process, "create")["key"])
    with reader, user, place.client(admin) as everything:
        assert reader.sandboxes.list() == user.sandboxes.list()
        with pytest.raises(ForbiddenError) as caught:
            reader.sandboxes.create(image="nothing")
        assert caught.value.metadata == {"role": "read-only", "least": "user"}
        with pytest.raises(ForbiddenError):
            reader.snapshots.delete("nothing")  # forbidden before it is looked for
        with pytest.raises(ImageNotFoundError):
            user.sandboxes.create(image="nothing")
        for limited in (reader, user):
            with pytest.raises(ForbiddenError):
                limited.host()
        assert everything.host().pid == place.process.pid


# -- revoking -------------------------------------------------------------------------------------


def test_revoking_ends_what_is_under_way(place: Place, admin: str, guest: Sandbox) -> None:
    """Streams and calls of that key alone; others hear of what happens then."""
    made = key(place.process, "create")
    with place.client(made["key"]) as doomed, place.client(admin) as other:
        ending, going_on = doomed.sandboxes.watch(), other.sandboxes.watch()
        next(ending), next(going_on)  # both are there
        key(place.process, "revoke", made["id"])
        with pytest.raises(UnauthenticatedError):
            list(ending)
        other.sandboxes.update(guest.id, metadata={"after": "revoking"})
        assert any(event.sandbox.metadata.get("after") == "revoking" for event in going_on)


def test_revoking_ends_a_command_under_way(place: Place, guest: Sandbox) -> None:
    made = key(place.process, "create")
    with place.client(made["key"]) as doomed:
        done: list[int] = []

        def revoke() -> None:
            done.append(run(place.process, "key", "revoke", made["id"]).returncode)

        thread = threading.Timer(1, revoke)
        thread.start()
        with pytest.raises(UnauthenticatedError):
            doomed.sandboxes.execute(guest.id, "sleep 1000", timeout=1000)
        thread.join()
        assert done == [0]
    assert guest.execute("echo here").stdout_text == "here\n"


# -- TLS ------------------------------------------------------------------------------------------


def test_a_new_certificate_is_served_and_no_stream_is_dropped(
    place: Place, admin: str, guest: Sandbox
) -> None:
    folder = place.process.folder
    before = place.serial()
    certificate, private, serial = place.authority.issue("second")
    with place.client(admin) as client:
        events = client.sandboxes.watch()
        next(events)
        # A pair that does not fit, as half-way through a renewal, changes nothing.
        (folder / "tls.pem").write_bytes(certificate.read_bytes())
        os.kill(place.process.pid, signal.SIGHUP)
        eventually(lambda: "is not the key of the certificate" in place.process.log.read_text())
        assert place.serial() == before
        (folder / "tls.key").write_bytes(private.read_bytes())
        os.kill(place.process.pid, signal.SIGHUP)
        eventually(lambda: "was read again" in place.process.log.read_text())
        assert place.serial() == serial != before
        client.sandboxes.update(guest.id, metadata={"after": "reload"})
        assert any(event.sandbox.metadata.get("after") == "reload" for event in events)
    assert place.reason(admin) is None


def test_the_port_speaks_tls_alone(place: Place, admin: str, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    with (
        Client(place.url, 60, api_key=admin, ca_file=stranger.file) as client,
        pytest.raises(DaemonUnavailableError),
    ):
        client.host()
    plain = place.url.replace("https", "http")
    with Client(plain, 60, api_key=admin) as client, pytest.raises(DaemonUnavailableError):
        client.host()


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Place]:
    """A daemon that wants clients' certificates, and allows little."""
    authority = Authority(tmp_path)
    certificate, private, _ = authority.issue("server")
    url = f"https://127.0.0.1:{free_port()}"
    environment = {
        "STRATABOX_LISTEN": url,
        "STRATABOX_TLS_CERTIFICATE": str(certificate),
        "STRATABOX_TLS_KEY": str(private),
        "STRATABOX_TLS_CLIENT_CA": str(authority.file),
        "STRATABOX_LIMITS_RATE": "2",
        "STRATABOX_LIMITS_BURST": "40",
        "STRATABOX_LIMITS_OPEN": "2",
    }
    with daemon(tmp_path, environment) as process:
        process.start().close()
        yield Place(process, authority, url)
        process.stop()


def test_client_certificates_and_limits(strict: Place) -> None:
    one, two = (key(strict.process, "create", "--name", name)["key"] for name in ("one", "two"))
    certificate, private, _ = strict.authority.issue("client")
    pair = certificate, private
    with strict.client(one) as client, pytest.raises(DaemonUnavailableError):
        client.sandboxes.list()
    with (
        strict.client(None, client_certificate=pair) as client,
        pytest.raises(UnauthenticatedError),
    ):
        client.sandboxes.list()
    with strict.client(one, client_certificate=pair) as client:
        # More than may be open: one call that comes between them must not keep the second out.
        streams = [client.sandboxes.watch() for _ in range(8)]
        assert refusal(client, "TOO_MANY_CALLS").retry_after == 1
        del streams
        limited = refusal(client, "RATE_LIMITED")  # the bucket has 40, and fills by two a second
        assert limited.retry_after is not None
        assert 0 < limited.retry_after <= 0.5
        with strict.client(two, client_certificate=pair) as other:
            other.sandboxes.list()  # each key has its own
    with Client(strict.process.address) as local:  # and the Unix socket none
        for _ in range(60):
            local.sandboxes.list()


def refusal(client: Client, reason: str) -> RateLimitedError:
    for _ in range(3000):
        try:
            client.sandboxes.list()
        except RateLimitedError as error:
            if error.reason == reason:
                return error
    raise AssertionError(f"never {reason}")


# -- what is refused at the start -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"LISTEN": "http://0.0.0.0:PORT"}, 2, "without TLS only loopback"),
        ({"LISTEN": "https://127.0.0.1:PORT"}, 1, "takes tls.certificate"),
        (
            {"LISTEN": "https://0.0.0.0:PORT", "TLS_CERTIFICATE": "PEM", "TLS_KEY": "KEY"},
            *(1, "stratabox key create"),
        ),
    ],
)
def test_what_is_not_safe_is_not_served(
    own_daemon: DaemonProcess, tmp_path: Path, environment: Words, code: int, words: str
) -> None:
    certificate, private, _ = Authority(tmp_path).issue("server")
    values = {"PORT": str(free_port()), "PEM": str(certificate), "KEY": str(private)}
    found = {
        f"STRATABOX_{name}": re.sub("PORT|PEM|KEY", lambda match: values[match[0]], value)
        for name, value in environment.items()
    }
    done = subprocess.run(
        [sys.executable, "-m", "stratabox.daemon"],
        env=own_daemon.environment | found,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (own_daemon.folder / "api.sock").exists()


def test_loopback_without_tls_takes_a_key_too(own_daemon: DaemonProcess) -> None:
    """Made before the daemon has ever run: that makes the state folder."""
    made = key(own_daemon, "create")
    url = f"http://127.0.0.1:{free_port()}"
    with own_daemon.start(environment={"STRATABOX_LISTEN": url}) as local:
        assert local.sandboxes.list() == []  # by the socket without
        with Client(url, 60) as client, pytest.raises(UnauthenticatedError):
            client.sandboxes.list()
        with Client(url, 60, api_key=made["key"]) as client:
            assert client.sandboxes.list() == []
            with pytest.raises(SandboxNotFoundError):
                client.sandboxes.get("nobody")
    own_daemon.stop()
    (row,) = json.loads(run(own_daemon, "key", "list", "--json").stdout)["keys"]
    assert row["last_used_at"], "written down at the end at the latest"


# -- the audit log --------------------------------------------------------------------------------


def test_the_audit_log_says_who_did_what_and_holds_no_secret(
    place: Place, admin: str, guest: Sandbox
) -> None:
    made = key(place.process, "create", "--name", "spy")
    secrets = ["hunter2-in-env", "hunter2-in-file", "hunter2-in-command"]
    with place.client(made["key"]) as client:
        client.sandboxes.execute(guest.id, f"echo {secrets[2]}", env={"PASSWORD": secrets[0]})
        client.files.write(guest.id, "/tmp/note", secrets[1].encode())
        with pytest.raises(SandboxNotFoundError):
            client.sandboxes.get(made["key"])  # whoever mistakes one for the other
        with pytest.raises(ForbiddenError):
            client.host()
    wrong = made["key"][:-3] + ("aaa" if made["key"][-3] != "a" else "baa")
    assert place.reason(wrong) == "INVALID_KEY"
    who = f"key:{made['id']}"
    folder = place.process.state / "audit"
    refusals, calls = folder / "refused.jsonl", folder / "calls.jsonl"
    eventually(lambda: refusals.exists() and f"wrong secret {who}" in refusals.read_text())
    eventually(  # the last of its calls that were let in
        lambda: any(who in line and "NOT_FOUND" in line for line in calls.read_text().splitlines())
    )
    text = "".join(path.read_text() for path in sorted(folder.iterdir()))
    for secret in (*secrets, made["key"], wrong, made["key"].rpartition("_")[2]):
        assert secret not in text
        assert secret not in place.process.log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    mine = [line for line in lines if line.get("who") == who]
    by = {(line["method"].partition("/")[2], line.get("result")): line for line in mine}
    assert by["ExecuteCommand", "OK"]["names"]["sandbox"] == guest.id
    assert by["ExecuteCommand", "OK"]["peer"].startswith("ipv4:127.0.0.1:")
    assert by["ExecuteCommand", "OK"]["seconds"] > 0
    assert by["WriteFile", "OK"]["names"]["path"] == "/tmp/note"
    assert by["GetSandbox", "NOT_FOUND"]["names"]["sandbox"] == f"tk_{made['id']}_..."
    assert by["GetHost", None]["reason"] == "FORBIDDEN"
    refused = [line for line in lines if line.get("why") == f"wrong secret {who}"]
    assert refused[0]["who"] == "nobody"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))
