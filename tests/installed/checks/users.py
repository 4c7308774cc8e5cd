"""A plain user's own daemon, under that user's own service manager."""

from __future__ import annotations

from pathlib import Path

from installed.container import Container
from installed.guests import qemu, scopes
from support import counting
from support.rig import eventually


def test_a_user_has_a_daemon_of_their_own(lab: Container, seed: Path) -> None:
    lab.sh("useradd --create-home member && loginctl enable-linger member")
    user = lab.sh("id -u member")
    runtime = f"/run/user/{user}"
    eventually(lambda: lab.run(f"test -S {runtime}/systemd/private")[0] == 0)

    def manager(line: str) -> str:
        return lab.sh(f"runuser -u member -- env XDG_RUNTIME_DIR={runtime} systemctl --user {line}")

    manager("enable --now strataboxd.socket")
    assert lab.sh(f"stat -c '%a %U' {runtime}/stratabox/api.sock") == "600 member"
    with lab.client(f"{runtime}/stratabox/api.sock") as client:
        # The first call starts it.
        assert manager("is-active strataboxd.service || true") == "inactive"
        client.snapshots.import_file(seed, trust=True)
        box = client.snapshots.restore("seed", name="one")
        before, pid = counting.now(box), qemu(lab, box.id)
        assert lab.sh(f"stat -c %U /proc/{pid}") == "member"
        group = lab.sh(f"cat /proc/{pid}/cgroup")
        assert f"/user@{user}.service/stratabox.slice/stratabox-guest-{box.id}" in group
        assert scopes(lab) == []  # none of the system's
        daemon = manager("show --value -p MainPID strataboxd.service")
        manager("restart strataboxd.service")
        assert manager("show --value -p MainPID strataboxd.service") != daemon
        after = counting.wait_on(box)
        assert after[:2] == before[:2]
        assert qemu(lab, box.id) == pid
        assert lab.sh("ls -A /var/lib/stratabox/sandboxes") == ""
    code, said = lab.run(
        f"useradd other && runuser -u other -- stratabox --address"
        f" unix://{runtime}/stratabox/api.sock sandbox list"
    )
    assert code != 0, said
    lab.sh("loginctl disable-linger member && loginctl terminate-user member")
    eventually(lambda: qemu(lab, box.id) == 0, what="a guest outlives its user's session")
