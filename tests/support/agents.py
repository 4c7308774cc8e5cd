"""Guests whose agent is gone for good, or for a while; agents that are asked without a daemon."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from io import BufferedRWPair
from pathlib import Path
from typing import Any

from stratabox.client import AgentUnavailableError, Sandbox
from support import disks
from support.daemon import DaemonProcess
from support.stored import wait_until


def kill_agent(process: DaemonProcess, sandbox: Sandbox) -> None:
    """End the agent of a tiny guest; nothing starts it again before the guest's next boot."""
    sandbox.execute("mount -o bind /bin/false /usr/libexec/stratabox/guest-agent").check()
    with contextlib.suppress(AgentUnavailableError):
        sandbox.execute("setsid /bin/sh -c 'kill -9 $(pidof qemu-ga)' >/dev/null 2>&1 </dev/null &")
    folder = process.state / "sandboxes" / sandbox.id
    wait_until(lambda: not _port_is_open(folder))


def soon(sandbox: Sandbox, line: str) -> None:
    """Have a guest do in a moment what takes its agent away: end, boot again, panic.

    Whether the command that sees to it is heard to end before is chance.
    """
    with contextlib.suppress(AgentUnavailableError):
        sandbox.execute(f"(usleep 200000; {line}) >/dev/null 2>&1 </dev/null &").check()


def _port_is_open(folder: Path) -> bool:
    devices = disks.ask_qemu(folder, "query-chardev")
    assert isinstance(devices, list)
    return any(each["label"] == "agent" and each["frontend-open"] for each in devices)


class AgentAlone:
    """A guest's agent, for as long as no daemon asks it."""

    def __init__(self, stream: BufferedRWPair[Any, Any]) -> None:
        self._stream = stream
        # A daemon that was killed may have left a question, whose answer is none of ours.
        self._stream.write(b"\xff")
        self.send("guest-sync-delimited", id=os.getpid())
        while self._heard().get("return") != os.getpid():
            pass

    def send(self, command: str, **arguments: object) -> None:
        """Tell it something, and wait for no answer."""
        question = {"execute": command, "arguments": arguments}
        self._stream.write(json.dumps(question).encode() + b"\n")
        self._stream.flush()

    def ask(self, command: str, **arguments: object) -> object:
        """What it answers."""
        self.send(command, **arguments)
        reply = self._heard()
        assert "return" in reply, reply
        return reply["return"]

    def run(self, line: str) -> None:
        """Run a line of shell in the guest; it has ended, and well, when this returns."""
        started = self.ask("guest-exec", path="/bin/sh", arg=["-c", line])
        assert isinstance(started, dict)
        status: object = None
        while not isinstance(status, dict) or not status["exited"]:
            status = self.ask("guest-exec-status", pid=started["pid"])
        assert status["exitcode"] == 0, status

    def _heard(self) -> dict[str, object]:
        line = self._stream.readline()
        assert line, "QEMU has hung up"
        try:
            found = json.loads(line.rpartition(b"\xff")[2])
        except ValueError:  # the rest of what was on its way when a daemon was killed
            return {}
        return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def agent_alone(folder: Path) -> Iterator[AgentAlone]:
    """The agent of the guest of that folder, while no daemon runs."""
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(60)
            agent.connect(f"/proc/self/fd/{directory}/agent.sock")
            with agent.makefile("rwb") as stream:
                yield AgentAlone(stream)
    finally:
        os.close(directory)
