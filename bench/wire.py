"""QEMU's monitor and the guest's agent, spoken to by hand: blocking sockets and lines of JSON.

Nothing here waits longer than it must: what QEMU will be asked first can be sent before it runs,
since its sockets listen already and keep what comes.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

_SECONDS = 120.0
_CHUNK = 1 << 16
POLL_SECONDS = 0.005
"""The quickest that was found: each question is answered by the guest, and where that is emulated
a first command takes 20 ms longer when it is asked for every 1.5 ms."""


class _Lines:
    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_SECONDS)
        self._socket.connect(path)
        self._buffer = b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def line(self) -> bytes:
        while (end := self._buffer.find(b"\n")) < 0:
            data = self._socket.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("QEMU hung up")
            self._buffer += data
        line, self._buffer = self._buffer[:end], self._buffer[end + 1 :]
        return line

    def close(self) -> None:
        self._socket.close()


class Monitor:
    """QMP. The first commands may be sent before QEMU has greeted."""

    def __init__(self, path: str) -> None:
        self._lines = _Lines(path)

    def begin(self, *commands: str) -> None:
        """Send the first commands."""
        self._lines.send(b"".join(_encode(each) for each in ("qmp_capabilities", *commands)))

    def greeted(self) -> None:
        """Wait until QEMU has greeted and answered ``qmp_capabilities``."""
        if "QMP" not in json.loads(self._lines.line()):
            raise ConnectionResetError("QEMU did not greet")
        self.answer()

    def answer(self) -> Any:
        """The next answer; events before it are passed over."""
        while True:
            message = json.loads(self._lines.line())
            if "error" in message:
                raise RuntimeError(f"QEMU refused: {message['error']}")
            if "return" in message:
                return message["return"]

    def wait_event(self, name: str) -> None:
        """Wait for an event; what comes before it is passed over."""
        while json.loads(self._lines.line()).get("event") != name:
            pass

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return what it returns."""
        self._lines.send(_encode(command, {k.replace("_", "-"): v for k, v in arguments.items()}))
        return self.answer()

    def close(self) -> None:
        """Hang up."""
        self._lines.close()


class Agent:
    """qemu-ga in the guest."""

    def __init__(self, path: str) -> None:
        self._lines = _Lines(path)
        self._number = 0
        self.poll_seconds = POLL_SECONDS

    def begin(self, line: str | None = None) -> None:
        """Send a sync, and behind it at once a first command for the guest's shell."""
        self._number += 1
        sync = b"\xff" + _encode("guest-sync-delimited", {"id": self._number})
        self._lines.send(sync + (_exec(line) if line is not None else b""))

    def synced(self) -> None:
        """Wait until the agent has answered the sync."""
        while True:
            _, mark, reply = self._lines.line().rpartition(b"\xff")
            if mark and json.loads(reply).get("return") == self._number:
                return

    def ended(self) -> None:
        """Wait until the command that was sent last has ended, well."""
        pid = self._reply()["pid"]
        while True:
            self._lines.send(_encode("guest-exec-status", {"pid": pid}))
            status = self._reply()
            if status["exited"]:
                if status.get("exitcode") != 0:
                    raise RuntimeError(f"a command failed in the guest: {status}")
                return
            time.sleep(self.poll_seconds)

    def sh(self, line: str) -> None:
        """Run a line in the guest's shell, and wait for its end."""
        self._lines.send(_exec(line))
        self.ended()

    def close(self) -> None:
        """Hang up."""
        self._lines.close()

    def _reply(self) -> Any:
        message = json.loads(self._lines.line())
        if "return" not in message:
            raise RuntimeError(f"the guest's agent refused: {message}")
        return message["return"]


def _exec(line: str) -> bytes:
    return _encode("guest-exec", {"path": "/bin/sh", "arg": ["-c", line], "capture-output": True})


def _encode(command: str, arguments: dict[str, object] | None = None) -> bytes:
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message).encode() + b"\n"
