"""The REST edge without guests: map of errors, words, document, the server's patience."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from stratabox.daemon.access.gate import Gate
from stratabox.daemon.access.roles import LEAST
from stratabox.daemon.config import Config
from stratabox.daemon.config.kinds import UnixAddress
from stratabox.daemon.config.rest_kind import RestAddresses
from stratabox.daemon.hypervisor.guest.exec import ExecResult
from stratabox.daemon.lifecycle import policy
from stratabox.daemon.rest import errors, models, server
from stratabox.daemon.rest.app import CALLS, Application
from stratabox.daemon.rest.guard import Guard
from stratabox.daemon.rest.output import of_command
from stratabox.daemon.rest.sandboxes import SandboxCalls
from stratabox.daemon.rest.snapshots import SnapshotCalls
from stratabox.storage.model import errors as ours
from stratabox.storage.model.errors import StrataboxError

ROOT = Path(__file__).resolve().parents[2]


def kinds(kind: type[StrataboxError]) -> list[type[StrataboxError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in kinds(child))]


def application() -> Application:
    nothing = cast(Any, None)
    return Application(
        SandboxCalls(
            world=nothing, guests=nothing, sandboxes=nothing, snapshots=nothing, clones=nothing
        ),
        SnapshotCalls(world=nothing, sandboxes=nothing, snapshots=nothing),
    )


def test_every_kind_of_error_has_a_status() -> None:
    direct = set(StrataboxError.__subclasses__())
    mine = {each for each in direct if each.__module__ == ours.__name__}
    assert mine == set(errors.STATUSES)
    documented = set(errors.MEANINGS)
    assert set(errors.STATUSES.values()) <= documented


def test_an_error_of_our_own_says_nothing_of_itself() -> None:
    for error in (ours.InternalError("the secret is 7", secret="7"), RuntimeError("secret 7")):
        answer = errors.reply_to_any(error)
        assert answer.status_code == 500
        assert json.loads(bytes(answer.body)) == {
            "error": {"code": "INTERNAL", "message": "internal error", "details": {}}
        }


def test_an_error_of_the_hosts_is_named() -> None:
    answer = errors.reply_to_any(OSError(28, "No space left on device"))
    assert answer.status_code == 429
    assert json.loads(bytes(answer.body))["error"]["code"] == "NO_SPACE"


def test_who_is_too_quick_is_told_when_to_come_back() -> None:
    answer = errors.reply(ours.RateLimitedError("slowly", retry_after=1.2))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")


def test_errors_hold_any_text() -> None:
    answer = errors.reply(ours.NotFoundError("no \ud800 here" + "x" * 100_000))
    assert len(bytes(answer.body)) < 10_000
    assert json.loads(bytes(answer.body))["error"]["message"].startswith("no \ud800 here")


def test_every_call_takes_the_role_of_its_grpc_method() -> None:
    for call in CALLS:
        service, _, method = call.rpc.partition("/")
        assert method in LEAST[service], call


def test_the_table_of_endpoints_is_in_step() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(GET|POST|DELETE) (/v1/[^`]*)` \|", page, re.MULTILINE)
    assert rows == [(call.verb, call.path) for call in CALLS]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", page):
        assert f"def {name}(" in tests, name


def test_the_document_has_each_endpoint_and_its_limits() -> None:
    document = application().asgi.openapi()
    found = [(verb.upper(), path) for path, verbs in document["paths"].items() for verb in verbs]
    assert sorted(found) == sorted((call.verb, call.path) for call in CALLS)
    cpus = document["components"]["schemas"]["Resources"]["properties"]["cpus"]["anyOf"][0]
    assert (cpus["minimum"], cpus["maximum"]) == (policy.CPUS[0], policy.CPUS[-1])
    memory = document["components"]["schemas"]["Resources"]["properties"]["memory"]["anyOf"][0]
    assert (memory["minimum"], memory["maximum"]) == (policy.MEMORY[0], policy.MEMORY[-1])
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "ValidationError" not in json.dumps(operation)
    assert "ValidationError" not in json.dumps(document)


def test_numbers_are_jsons() -> None:
    assert models.Resources.model_validate({"cpus": 2.0}).cpus == 2
    for wrong in (2.5, "2", True, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            models.Resources.model_validate({"cpus": wrong})


def test_what_a_name_may_be_is_what_the_policy_says() -> None:
    for name in ("a", "A b", "ünï", "x" * 255, "a" + "\u3000", "-", "\U0001f980" * 63):
        assert models.SnapshotRequest(name=name).name == policy.check_name(name)
    for name in (" ", "\t", "/", "a\\", "a\x00", "a\x7f", "a\x85", "a\u2028", "x" * 256, ""):
        with pytest.raises(ValidationError):
            models.SnapshotRequest(name=name)


async def test_output_in_pieces_reads_as_the_whole() -> None:
    text = 'a"\\\n\x00ö€\U0001f980' * 40_000
    for data, expected in (
        (text.encode(), text),
        (text.encode()[1:-1], text[1:-1] + "\ufffd"),
        (b"\xff" * 200_000, "\ufffd" * 200_000),
        (b"", ""),
    ):
        result = ExecResult(
            exit_code=None, signal=9, stdout=data, stderr=b"e", stdout_truncated=True,
            stderr_truncated=False, timed_out=False, duration=1.5,
        )  # fmt: skip
        pieces = [piece async for piece in of_command(result)]
        body = models.Executed.model_validate_json(b"".join(pieces))
        assert (body.stdout, body.stderr, body.signal, body.exit_code) == (expected, "e", 9, None)
        assert (body.stdout_truncated, body.duration_ms) == (True, 1500)
        assert max(map(len, pieces)) < 1 << 20


def test_addresses_of_the_configuration() -> None:
    kind = RestAddresses()
    found = kind.parse("http://127.0.0.1:1, unix:///run/x.sock,https://0.0.0.0:2")
    assert [str(each) for each in found] == [
        "http://127.0.0.1:1", "unix:///run/x.sock", "https://0.0.0.0:2",
    ]  # fmt: skip
    assert kind.parse(json.loads(kind.toml(found))) == found
    assert kind.parse("") == ()
    for wrong in (1, "127.0.0.1:80", "http://0.0.0.0:80", "http://[::1]:80, x"):
        with pytest.raises(ValueError):  # noqa: PT011 - its text may be empty: `allowed` says it
            kind.parse(wrong)


@pytest.mark.parametrize("sent", [b"", b"GET /v1/openapi.json HTTP/1.1\r\nhost: x\r\nslow"])
async def test_who_does_not_say_what_they_want_is_let_go(
    sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_HEAD_SECONDS", 0.2)
    path = tmp_path / "rest.sock"
    config = cast(Config, _Settings(path))
    made = application()
    rest = server.HttpServer(
        "REST",
        config,
        config.rest,
        lambda address: Guard(made, cast(Gate, None), local=isinstance(address, UnixAddress)),
        certificates=None,
    )
    await rest.start()
    try:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(sent)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        # One that does is answered, and let go afterwards. Its words lie there before it is
        # taken, so that no pause of this process can make it one that says nothing.
        browser = socket.socket(socket.AF_UNIX)
        browser.connect(str(path))
        browser.sendall(b"GET /v1/openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
        reader, writer = await asyncio.open_unix_connection(sock=browser)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()
        await writer.wait_closed()
    finally:
        await rest.stop()
    assert not path.exists()


class _Settings:
    """As much of a configuration as the server looks at."""

    def __init__(self, path: Path) -> None:
        self.rest = RestAddresses().parse(f"unix://{path}")
        self.socket_mode = 0o600
        self.socket_group = None
