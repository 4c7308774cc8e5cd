"""A daemon that serves REST, and what asks it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stratabox.client import Client
from support.daemon import DaemonProcess, daemon
from support.doors import free_port


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an error."""
        code: str = self.json["error"]["code"]
        return code


@dataclass(frozen=True)
class Rest:
    """A daemon's REST API on a port of loopback, a key for it, and its other API."""

    daemon: DaemonProcess
    client: Client
    url: str
    key: str

    def __call__(
        self,
        verb: str,
        path: str,
        body: object = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask; `body` is sent as JSON, or as it is when it is bytes."""
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)
        sent = {"x-api-key": self.key if key is None else key, **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        try:
            connection.request(verb, path, body, sent)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def sh(self, sandbox: str, command: str) -> str:
        """Run a line in a guest; it must succeed; its output without the last newline."""
        done = self("POST", f"/v1/sandboxes/{sandbox}/execute", {"command": command})
        assert done.status == 200, done
        assert done.json["exit_code"] == 0, done.json
        output: str = done.json["stdout"]
        return output.rstrip("\n")


def make_key(process: DaemonProcess, *options: str) -> str:
    """Have the command line make an API key."""
    command = [sys.executable, "-m", "stratabox.client.cli", "key", "create", "--json", *options]
    done = subprocess.run(
        command, env=process.environment, capture_output=True, text=True, check=True
    )
    key: str = json.loads(done.stdout)["key"]
    return key


@contextmanager
def rest_daemon(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Rest]:
    """A daemon of small guests that serves REST over TCP and by a socket, `rest.sock`."""
    url = f"http://127.0.0.1:{free_port()}"
    settings = {
        "STRATABOX_REST": f"{url}, unix://{folder}/rest.sock",
        "STRATABOX_DEFAULT_IMAGE": "tiny",
        "STRATABOX_DEFAULT_MEMORY": "192",
        **(environment or {}),
    }
    with daemon(folder, settings) as process, process.start() as client:
        client.images.build_tiny()
        yield Rest(process, client, url, make_key(process, "--name", "test"))
        for sandbox in client.sandboxes.list(include_terminated=True):
            sandbox.delete()
        for snapshot in client.snapshots.list():
            client.snapshots.delete(snapshot.id)
        process.check_consistent()
        process.stop()
        assert "Traceback" not in process.log.read_text()
