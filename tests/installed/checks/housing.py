"""Guests of an installed daemon: where systemd has them, and what they live through."""

from __future__ import annotations

import pytest

from installed.container import Container
from installed.guests import qemu, restored, scopes
from installed.host import DAEMON
from stratabox.client import SandboxState
from support import counting
from support.rig import eventually


def test_guests_have_scopes_and_users_of_their_own(lab: Container) -> None:
    with lab.client() as client:
        boxes = [restored(client, name) for name in ("one", "two")]
        users = set()
        for box in boxes:
            pid = qemu(lab, box.id)
            (scope,) = (each for each in scopes(lab) if box.id in each)
            assert lab.show(scope, "Slice") == "stratabox.slice"
            group = lab.show(scope, "ControlGroup")
            assert group.startswith("/stratabox.slice/")
            assert lab.sh(f"cat /sys/fs/cgroup{group}/cgroup.procs") == str(pid)
            lines = lab.sh(f"cat /proc/{pid}/status").splitlines()
            status = {
                key: value.split() for key, _, value in (each.partition(":") for each in lines)
            }
            (user,) = set(status["Uid"])
            users.add(user)
            assert status["Groups"] == []
            assert status["CapEff"] == status["CapPrm"] == ["0000000000000000"]
            assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
        assert len(users) == len(boxes)
        assert users.isdisjoint({"0", "65534"})
        group = lab.show(DAEMON, "ControlGroup")
        assert lab.sh(f"cat /sys/fs/cgroup{group}/cgroup.procs") == str(lab.daemon_pid())
        for box in boxes:
            box.delete()
    eventually(lambda: scopes(lab) == [], what="a scope outlives its guest")


@pytest.mark.parametrize("how", ["restart", "stop and start", "kill"])
def test_guests_live_through_another_daemon(lab: Container, how: str) -> None:
    with lab.client() as client:
        box = restored(client, "one")
        before, pid = counting.now(box), qemu(lab, box.id)
        daemon = lab.daemon_pid()
        match how:
            case "restart":
                lab.sh(f"systemctl restart {DAEMON}")
            case "stop and start":
                lab.sh(f"systemctl stop strataboxd.socket {DAEMON}")
                assert qemu(lab, box.id) == pid
                lab.sh("systemctl start strataboxd.socket")
            case "kill":
                lab.sh(f"systemctl kill --kill-whom=main --signal=KILL {DAEMON}")
                eventually(lambda: lab.daemon_pid() not in (0, daemon))
        after = counting.wait_on(box)
        assert lab.daemon_pid() not in (0, daemon)
        assert after[:2] == before[:2]
        assert after[2] > before[2]
        assert qemu(lab, box.id) == pid
        assert any(box.id in each for each in scopes(lab))
        # And all goes on with it.
        copy = box.clone().sandboxes[0]
        assert counting.wait_on(copy)[:2] == before[:2]


def test_a_slice_that_is_stopped(lab: Container) -> None:
    """What an administrator ends is ended; nothing of it is lost but what was in its memory."""
    with lab.client() as client:
        box = restored(client, "one")
        box.execute("echo kept >/kept && sync", timeout=60)
        kept = box.snapshot(name="kept")
        lab.sh("systemctl stop stratabox.slice")
        assert scopes(lab) == []
        eventually(lambda: client.sandboxes.get(box.id).state is SandboxState.FAILED)
        assert "signal" in str(client.sandboxes.get(box.id).state_reason)
        assert client.sandboxes.start(box.id).execute("cat /kept", timeout=60).stdout == b"kept\n"
        assert client.snapshots.restore(kept.id).execute("cat /kept").stdout == b"kept\n"
