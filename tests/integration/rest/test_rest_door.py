"""Who may ask, and what happens to what they began when they go, or their key does."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from stratabox.client import EventType
from support.boot_disks import boot_disk, say
from support.certificates import Authority
from support.daemon import daemon
from support.doors import free_port
from support.rest import Answer, Rest, make_key
from support.rig import eventually
from support.waiting import watching

CALLS_LOG = "audit/calls.jsonl"


def key_command(rest: Rest, *words: str) -> None:
    command = [sys.executable, "-m", "stratabox.client.cli", "key", *words]
    subprocess.run(command, env=rest.daemon.environment, capture_output=True, check=True)


@contextmanager
def asking(rest: Rest, path: str, body: object) -> Iterator[socket.socket]:
    """A request that was sent, and whose answer nobody reads."""
    parts = urlsplit(rest.url)
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nx-api-key: {rest.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection((parts.hostname or "", parts.port or 0)) as connection:
        connection.sendall(head.encode() + payload)
        yield connection


def test_only_a_good_key_opens_anything(rest: Rest, box: str) -> None:
    revoked = make_key(rest.daemon, "--name", "revoked")
    assert rest("GET", f"/v1/sandboxes/{box}", key=revoked).status == 200
    key_command(rest, "revoke", revoked.split("_")[1])
    wrong = rest.key[:-4] + ("aaaa" if not rest.key.endswith("aaaa") else "bbbb")
    answers = []
    for path in (f"/v1/sandboxes/{box}", "/v1/sandboxes/none", "/v1/none"):
        for key in (revoked, wrong, "tk_x", "\xff", rest.key + "x"):
            answer = rest("GET", path, key=key)
            assert answer.status == 401
            assert answer.headers["www-authenticate"]
            answers.append(answer.body)
        assert rest("GET", path, key="").code == "NO_KEY"
    assert len(set(answers)) == 1  # nothing tells them apart, nor what is there
    bearer = {"authorization": f"Bearer {rest.key}"}
    assert rest("GET", f"/v1/sandboxes/{box}", key="", headers=bearer).status == 401  # two keys
    large = rest("POST", "/v1/sandboxes", b"x" * 900_000, key=wrong)
    assert large.status == 401


def test_a_role_is_held_to(rest: Rest, box: str) -> None:
    reader = make_key(rest.daemon, "--name", "reader", "--role", "read-only")
    assert rest("GET", "/v1/sandboxes/list", key=reader).status == 200
    assert rest("GET", f"/v1/sandboxes/{box}", key=reader).status == 200
    for verb, path in (
        ("POST", "/v1/sandboxes"),
        ("DELETE", f"/v1/sandboxes/{box}"),
        ("POST", f"/v1/sandboxes/{box}/execute"),
        ("POST", f"/v1/sandboxes/{box}/snapshot"),
        ("POST", f"/v1/sandboxes/{box}/clone"),
        ("POST", f"/v1/sandboxes/{box}/pause"),
        ("POST", f"/v1/sandboxes/{box}/resume"),
        ("POST", "/v1/snapshots/none/restore"),
        ("DELETE", "/v1/snapshots/none"),
    ):
        answer = rest(verb, path, key=reader)
        assert (answer.status, answer.code) == (403, "FORBIDDEN"), path


def test_by_the_socket_the_files_mode_is_the_key(rest: Rest, box: str) -> None:
    path = rest.daemon.folder / "rest.sock"
    assert path.stat().st_mode & 0o777 == 0o660
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(f"GET /v1/sandboxes/{box} HTTP/1.0\r\n\r\n".encode())
        with connection.makefile("rb") as reply:
            assert b" 200 " in reply.readline()


def test_who_goes_before_a_sandbox_is_made_leaves_nothing(
    rest: Rest, box: str, tmp_path: Path
) -> None:
    # However quick the host is, it is not ready when its caller goes.
    boot_disk(tmp_path / "mute.raw", say("no agent in here"))
    rest.client.images.import_file(tmp_path / "mute.raw", name="mute")
    with watching(rest.client) as events:
        next(events)  # the shared box: the watch has begun
        body = {"name": "abandoned", "image": "mute", "wait_for_ready": True}
        with asking(rest, "/v1/sandboxes", body):
            made = next(each for each in events if each.sandbox.name == "abandoned")
        gone = next(each for each in events if each.type is EventType.DELETED)
    assert gone.sandbox.id == made.sandbox.id
    assert made.sandbox.id not in rest.daemon.guests()
    rest.client.images.delete("mute")


def test_who_goes_ends_their_command(rest: Rest, box: str) -> None:
    command = "echo $$ >/root/pid; exec sleep 4321"
    with asking(rest, f"/v1/sandboxes/{box}/execute", {"command": command}):
        rest.sh(box, "until [ -s /root/pid ]; do sleep 0.1; done")
        rest.sh(box, "kill -0 $(cat /root/pid)")
    rest.sh(box, "while kill -0 $(cat /root/pid) 2>/dev/null; do sleep 0.1; done; rm /root/pid")


def test_a_revoked_key_ends_what_is_under_way(rest: Rest, box: str) -> None:
    key = make_key(rest.daemon, "--name", "short")
    answers: list[Answer] = []

    def ask() -> None:
        body = {"command": "echo $$ >/root/pid; exec sleep 4321"}
        answers.append(rest("POST", f"/v1/sandboxes/{box}/execute", body, key=key))

    asker = threading.Thread(target=ask)
    asker.start()
    rest.sh(box, "until [ -s /root/pid ]; do sleep 0.1; done")
    key_command(rest, "revoke", key.split("_")[1])
    asker.join(300)
    assert (answers[0].status, answers[0].code) == (401, "INVALID_KEY")
    rest.sh(box, "while kill -0 $(cat /root/pid) 2>/dev/null; do sleep 0.1; done; rm /root/pid")


def test_the_audit_log_has_rest_too_and_no_secret(rest: Rest, box: str) -> None:
    rest("POST", f"/v1/sandboxes/{box}/execute", {"command": "true", "env": {"A": "s3cret-value"}})
    rest("GET", "/v1/sandboxes/of-the-audit")
    # Written by a thread, after the answer.
    calls = rest.daemon.state / CALLS_LOG
    eventually(lambda: '"of-the-audit"' in calls.read_text())
    text = calls.read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    sought = next(each for each in entries if each.get("names") == {"sandbox": "of-the-audit"})
    assert sought["method"] == "stratabox.v1.SandboxesService/GetSandbox"
    assert sought["result"] == "NOT_FOUND"
    assert sought["who"] == f"key:{rest.key.split('_')[1]}"
    assert "s3cret-value" not in text
    log = rest.daemon.log.read_text()
    for secret in ("s3cret-value", rest.key.split("_")[2]):
        assert secret not in text
        assert secret not in log


def served_serial(port: int, authority: Authority) -> int:
    context = ssl.create_default_context(cafile=str(authority.file))
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
    ):
        found = wrapped.getpeercert() or {}
        return int(str(found["serialNumber"]), 16)


def test_tls_and_a_new_certificate(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    folder.mkdir()
    authority = Authority(folder)
    certificate, key, serial = authority.issue("first")
    port = free_port()
    settings = {
        "STRATABOX_REST": f"https://127.0.0.1:{port}",
        "STRATABOX_TLS_CERTIFICATE": str(certificate),
        "STRATABOX_TLS_KEY": str(key),
    }
    with daemon(tmp_path, settings) as process, process.start():
        token = make_key(process, "--name", "tls")
        url = f"https://127.0.0.1:{port}/v1/sandboxes/list"
        command = ["curl", "-s", "--cacert", str(authority.file), "-H", f"x-api-key: {token}", url]
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"[]"
        assert served_serial(port, authority) == serial
        newer, its_key, new_serial = authority.issue("second")
        newer.replace(certificate)
        its_key.replace(key)
        os.kill(process.pid, signal.SIGHUP)
        eventually(lambda: "was read again" in process.log.read_text())
        assert served_serial(port, authority) == new_serial
        assert subprocess.run(command, capture_output=True, check=True).stdout == b"[]"
        process.stop()
