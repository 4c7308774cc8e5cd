"""Commands begin by a program of ours where the guest has it, and by its shell where it has not."""

from __future__ import annotations

from collections.abc import Callable

from stratabox.client import Client, Sandbox
from stratabox.daemon.hypervisor.guest.wake import PROGRAM

Shell = Callable[[Sandbox, str], str]

# In its place, something that becomes it and notes that.
_NOTE = f"""
mv {PROGRAM} {PROGRAM}.real
printf '%s\\n' '#!/bin/sh' 'echo $# >>/run/used' 'exec {PROGRAM}.real "$@"' >/run/new
chmod 755 /run/new
mv /run/new {PROGRAM}
"""


def contract(sandbox: Sandbox) -> None:
    """What a command may expect, whatever it begins by."""
    words = ["a b", "$HOME", "'\"\\", "line\nline", "--", "-n"]
    result = sandbox.execute(["printf", "%s|", *words], cwd="/tmp")
    assert (result.exit_code, result.stdout.decode()) == (0, "".join(f"{each}|" for each in words))
    sandbox.execute("ln -sfn /tmp /run/link").check()
    assert sandbox.execute("pwd", cwd="/run/link").stdout == b"/run/link\n"
    assert sandbox.execute(["cat"]).stdout == b""
    line = 'read -r pid name state parent group session rest </proc/$$/stat; echo "$pid $session"'
    pid, session = sandbox.execute(line).stdout_text.split()
    assert pid == session
    for command, code in ((["no-such-program"], 127), (["/etc/hostname"], 126)):
        result = sandbox.execute(command)
        assert (result.exit_code, result.stdout) == (code, b"")
        assert command[0] in result.stderr_text
    result = sandbox.execute("echo ran", cwd="/nowhere")
    assert (result.exit_code, result.stdout) == (126, b"")
    assert "/nowhere" in result.stderr_text
    # Longer than the guest takes to begin: where the host is busy, longer than usual.
    takes = 1 + 10 * result.duration.total_seconds()
    result = sandbox.execute("echo so far; (env -i sleep 54321 &); sleep 54321", timeout=takes)
    assert (result.timed_out, result.stdout) == (True, b"so far\n")
    assert sandbox.execute("pidof sleep").stdout == b""


def test_every_command_begins_by_it(box: Sandbox, sh: Shell) -> None:
    contract(box)
    sh(box, _NOTE)
    for count in (1, 2, 3):
        assert sh(box, "wc -l </run/used") == str(count)


def test_a_guest_without_it(client: Client, box: Sandbox, sh: Shell) -> None:
    """As in an image that never had it; test_identity.py has what such a guest is told."""
    box.execute(["rm", PROGRAM]).check()
    contract(box)
    taken = box.snapshot(level="memory")
    with client.snapshots.restore(taken.id, identity="keep") as same:
        contract(same)
    client.snapshots.delete(taken.id)


def test_debian(debian_box: Sandbox, sh: Shell) -> None:
    contract(debian_box)
    sh(debian_box, f"mv {PROGRAM} {PROGRAM}.away")
    contract(debian_box)
    sh(debian_box, f"mv {PROGRAM}.away {PROGRAM}")
