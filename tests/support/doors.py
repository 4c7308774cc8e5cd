"""A daemon that listens on TCP, its keys, and its certificate as a stranger sees it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
from typing import Any

from cryptography import x509

from stratabox.client import Client, UnauthenticatedError
from support.certificates import Authority
from support.daemon import DaemonProcess

Words = dict[str, Any]


_held: list[socket.socket] = []


def free_port() -> int:
    """A port of loopback that nobody has, nor gets by chance until this process ends.

    It stays bound here, and nobody listens: who asks for this very port can, as a daemon does, and
    the kernel gives it to nobody who asks for any.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return int(holder.getsockname()[1])


def run(
    process: DaemonProcess, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stratabox.client.cli", *words],
        env=process.environment | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def key(process: DaemonProcess, *words: str) -> Words:
    done = subprocess.run(
        [sys.executable, "-m", "stratabox.daemon", "key", *words, "--json"],
        env=process.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Words = json.loads(done.stdout)
    return found


class Place:
    """A daemon that listens with TLS, and who signed its certificate."""

    def __init__(self, process: DaemonProcess, authority: Authority, url: str) -> None:
        self.process = process
        self.authority = authority
        self.url = url

    def client(self, api_key: str | None, **more: Any) -> Client:
        return Client(self.url, 60, api_key=api_key, ca_file=self.authority.file, **more)

    def reason(self, api_key: str | None) -> str | None:
        """Why a call with this key is refused; None: it is not."""
        with self.client(api_key) as client:
            try:
                client.sandboxes.list()
            except UnauthenticatedError as error:
                return error.reason
            return None

    def serial(self) -> int:
        """Of the certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=str(self.authority.file))
        context.set_alpn_protocols(["h2"])
        host, port = self.url.removeprefix("https://").split(":")
        with (
            socket.create_connection((host, int(port)), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname=host) as connection,
        ):
            found = connection.getpeercert(binary_form=True)
        assert found
        return x509.load_der_x509_certificate(found).serial_number
