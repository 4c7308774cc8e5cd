"""The package goes, and comes back, and goes for good."""

from __future__ import annotations

from pathlib import Path

from installed.container import Container
from installed.guests import qemu, restored, scopes
from installed.package import Package
from installed.stages import SEED
from stratabox.client import SandboxState
from support.rig import eventually

_FILES = (
    "find / -xdev -not -path '/proc*' -not -path '/tmp*' -not -path '/root*'"
    # dpkg's, apt's, journald's and systemd's own notes of what was done.
    " -not -path '/var/lib/dpkg/*' -not -path '/var/log/*' -not -path '/var/cache/debconf/*'"
    " -not -path '/var/cache/apt/*' -not -path '/var/lib/apt/*' -not -path '/var/lib/systemd/*'"
    " -not -path '*/__pycache__*' -not -name '*-' | sort"
)


def test_removed_and_installed_again(lab: Container, package: Package) -> None:
    """All that runs ends; the state stays, and all of it is there again."""
    with lab.client() as client:
        box = restored(client, "one")
        box.execute("echo kept >/kept && sync", timeout=60)
    lab.sh("apt-get remove --yes stratabox")
    assert scopes(lab) == []
    assert qemu(lab, box.id) == 0
    assert lab.run("pgrep -f '[s]tratabox'")[1] == ""
    assert lab.run("systemctl is-active stratabox.slice")[1] == "inactive"
    assert lab.sh("ls /usr/lib | grep stratabox; ls /run/stratabox; true") == ""
    assert lab.sh("stat -c '%a %U' /var/lib/stratabox") == "700 root"
    lab.sh(f"apt-get install --yes {lab.put(package.file)}")
    with lab.client() as client:
        found = client.sandboxes.get(box.id)
        assert found.state in (SandboxState.STOPPED, SandboxState.FAILED)
        assert [each.name for each in client.snapshots.list()] == [SEED]
        booted = client.sandboxes.start(box.id)
        assert booted.execute("cat /kept", timeout=60).stdout == b"kept\n"


def test_purged(bare_lab: Container, package: Package, seed: Path) -> None:
    """Nothing is left: no process, no file, no unit, no user, no group."""
    host = bare_lab
    before = host.sh(_FILES).splitlines()
    groups = host.sh("cut -d: -f1 /etc/passwd /etc/group")
    host.sh(f"apt-get install --yes {host.put(package.file)}")
    with host.client() as client:
        client.snapshots.import_file(seed, trust=True)
        box = restored(client, "one")
        assert qemu(host, box.id) != 0
    host.sh("apt-get purge --yes stratabox")
    assert qemu(host, box.id) == 0
    assert host.run("pgrep -f '[s]tratabox'")[1] == ""
    assert host.sh("systemctl list-units --all --plain --no-legend 'stratabox*'") == ""
    assert host.sh("systemctl list-unit-files --no-legend 'stratabox*'; true") == ""
    assert host.sh("cut -d: -f1 /etc/passwd /etc/group") == groups
    eventually(
        lambda: (
            host.run("ls -A /run/stratabox")[1] == "" or host.run("test -e /run/stratabox")[0] != 0
        )
    )
    assert [path for path in host.sh(_FILES).splitlines() if path not in set(before)] == []
