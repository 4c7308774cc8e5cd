"""Guests as domains of the host's own libvirtd, as Debian installs and configures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from installed import outer
from installed.container import Container
from installed.guests import qemu, restored
from installed.host import DAEMON, Host
from installed.outer import Outer
from installed.package import Package
from installed.stages import SEED, Root
from stratabox.client import Client, SnapshotLevel, StrataboxError
from support import counting
from support.rig import eventually

_LIBVIRT = ("libvirt-daemon-system", "python3-libvirt")
_USE_IT = (
    f"echo 'launcher = \"libvirt\"' >>/etc/stratabox/config.toml && systemctl restart {DAEMON}"
)
_EXAMPLE = "/usr/share/doc/stratabox/examples/apparmor/libvirtd"
_PROFILE = "/etc/apparmor.d/usr.sbin.libvirtd"


def _domains(host: Host) -> list[str]:
    return host.sh("virsh --connect qemu:///system list --all --name").split()


@pytest.fixture(scope="module")
def libvirt_root(
    stocked: Root, tmp_path_factory: pytest.TempPathFactory, tell: Callable[[str], None]
) -> Root:
    """`stocked`, and libvirt beside the package."""
    tell("libvirt is installed in a container")
    folder = tmp_path_factory.mktemp("libvirt") / "host"
    with stocked.host(folder, network=True) as host:
        host.sh(
            "apt-get -q update && DEBIAN_FRONTEND=noninteractive"
            f" apt-get -q install --yes --no-install-recommends {' '.join(_LIBVIRT)}"
        )
        host.power_off()
    return stocked.on_top(host.written)


def test_it_says_what_it_lacks(lab: Container) -> None:
    """libvirt has no wheels: its module is Debian's, beside the package."""
    lab.sh("echo 'launcher = \"libvirt\"' >>/etc/stratabox/config.toml")
    assert lab.run(f"systemctl restart {DAEMON}")[0] != 0
    assert "apt install python3-libvirt" in lab.sh(f"journalctl --no-pager -o cat -u {DAEMON}")
    assert "apt install python3-libvirt" in lab.run("strataboxd doctor")[1]


def test_guests_are_domains_and_outlive_both_daemons(libvirt_root: Root, tmp_path: Path) -> None:
    with libvirt_root.host(tmp_path / "lab") as host:
        host.sh(_USE_IT)
        with host.client() as client:
            box = restored(client, "one")
            before, pid = counting.now(box), qemu(host, box.id)
            (domain,) = _domains(host)
            assert box.id in domain
            assert host.sh(f"virsh -c qemu:///system domstate {domain}").strip() == "running"
            assert host.sh(f"stat -c %u /proc/{pid}") not in ("0", "65534")
            for service in (DAEMON, "libvirtd.service"):
                host.sh(f"systemctl restart {service}")
                after = counting.wait_on(box)
                assert after[:2] == before[:2]
                assert qemu(host, box.id) == pid
                assert _domains(host) == [domain]
            saved = box.snapshot(name="later", level=SnapshotLevel.MEMORY)
            copy = client.snapshots.restore(saved.id, name="two")
            assert counting.wait_on(copy)[:2] == before[:2]
            assert len(_domains(host)) == 2
            for each in (box, copy):
                each.delete()
        eventually(lambda: _domains(host) == [], what="a domain outlives its sandbox")


@pytest.fixture
def enforcing(
    here: Client, folder: Path, package: Package, tell: Callable[[str], None]
) -> Iterator[Outer]:
    """A whole machine whose kernel enforces Debian's profile of libvirtd."""
    host = outer.boot(here, folder, tell, name="libvirt", more=["apparmor", *_LIBVIRT])
    tell("libvirt: the package is installed")
    try:
        host.sh(f"apt-get install --yes {host.put(package.file)} && {_USE_IT}")
        yield host
    finally:
        host.box.delete()


def test_apparmor_lets_libvirtd_run_it_with_the_example(enforcing: Outer, seed: Path) -> None:
    """The guests are not waited for: an emulated machine within an emulated one takes minutes."""
    assert enforcing.sh("cat /sys/module/apparmor/parameters/enabled") == "Y"
    profiles = enforcing.sh("cat /sys/kernel/security/apparmor/profiles").splitlines()
    assert "libvirtd (enforce)" in profiles
    with enforcing.client() as client:
        client.snapshots.import_file(seed)
        with pytest.raises(StrataboxError) as refused:
            client.snapshots.restore(SEED, name="one", wait_for_ready=False)
        print(f"{refused.value.reason}: {refused.value}")
        assert refused.value.reason == "LIBVIRT_REFUSED"
        denied = enforcing.sh("journalctl --no-pager -k -o cat --grep 'apparmor=.DENIED'")
        assert "/var/cache/stratabox/libvirt/" in denied
        assert "packaging/apparmor/libvirtd" in enforcing.run("strataboxd doctor")[1]

        enforcing.sh(
            f"install -m 0644 {_EXAMPLE} /etc/apparmor.d/local/usr.sbin.libvirtd"
            f" && apparmor_parser -r {_PROFILE}"
        )
        box = client.snapshots.restore(SEED, name="two", wait_for_ready=False)
        pid = qemu(enforcing, box.id)
        assert pid != 0
        assert enforcing.sh(f"cat /proc/{pid}/attr/current") == "unconfined"
        pidfile = "/run/libvirtd.pid"
        assert enforcing.sh(f"cat /proc/$(cat {pidfile})/attr/current") == "libvirtd (enforce)"
        assert [each for each in _domains(enforcing) if box.id in each]
        print(enforcing.run("strataboxd doctor")[1])
        box.delete()
        eventually(lambda: _domains(enforcing) == [], 60, what="a domain outlives its sandbox")
