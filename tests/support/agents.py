"""Guests whose agent is gone for good, or for a while."""

from __future__ import annotations

import contextlib
from pathlib import Path

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
