"""The host goes down with guests on it, and comes back."""

from __future__ import annotations

import pytest

from installed.container import Container
from installed.guests import restored, scopes
from stratabox.client import SandboxState
from support import counting

_REASONS = ("the host was restarted", "its QEMU ended while the daemon was away")
"""The second one in a container: its boot id is mounted over the kernel's, and the unit's procfs is
another. `tests/integration/test_pause_to_disk.py` has the first."""


@pytest.mark.parametrize("how", ["rebooted", "power cut"])
def test_the_host_goes_down(lab: Container, how: str) -> None:
    """What ran has stopped, with its disks; what was on the disk goes on at the very instant."""
    with lab.client() as client:
        running, paused, parked = (
            restored(client, name) for name in ("running", "paused", "parked")
        )
        assert running.execute("echo kept >/kept && sync", timeout=60).exit_code == 0
        memory = running.snapshot(name="memory", level="memory")
        there = counting.now(parked)
        taken = counting.now(running)
        paused.pause()
        parked.pause(to_disk=True)
    if how == "rebooted":
        lab.reboot()
    else:
        lab.cut_power()
        lab.boot()
    with lab.client() as client:
        for box in (running, paused):
            found = client.sandboxes.get(box.id)
            assert found.state is SandboxState.STOPPED
            assert found.state_reason in _REASONS
        assert scopes(lab) == []
        found = client.sandboxes.get(parked.id)
        assert (found.state, found.paused_to_disk) == (SandboxState.PAUSED, True)
        gone_on = client.sandboxes.resume(parked.id)
        after = counting.wait_on(gone_on)
        assert after[:2] == there[:2]
        assert after[2] >= there[2]
        again = client.snapshots.restore(memory.id)
        assert counting.wait_on(again)[:2] == taken[:2]
        booted = client.sandboxes.start(running.id)
        assert booted.execute("cat /kept", timeout=60).stdout == b"kept\n"
        assert counting.is_gone(booted)
