"""Who a copy is, and what time it is in it, before its first command is answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from stratabox.client import Client, Image, Sandbox, SandboxState, Snapshot
from stratabox.daemon.hypervisor.guest.wake import PROGRAM
from support.daemon import DaemonProcess
from support.stored import wait_until
from support.waiting import watching

Shell = Callable[[Sandbox, str], str]

_VMGENID = "/sys/bus/acpi/drivers/vmgenid"
_WHO = """
hostname; cat /etc/hostname /etc/hosts /etc/machine-id /var/lib/dbus/machine-id
cat /etc/ssh/*; cat /sys/class/net/eth0/address
"""
_BOOT = "cat /proc/sys/kernel/random/boot_id"
# As a guest with sshd has it, long ago: so that a clock that stands still is seen.
_PREPARE = """
mkdir -p /etc/ssh /var/lib/dbus
for kind in rsa ecdsa ed25519; do
    echo secret >/etc/ssh/ssh_host_${kind}_key
    echo public >/etc/ssh/ssh_host_${kind}_key.pub
done
echo "# none of ours" >/etc/ssh/sshd_config
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
cp /etc/machine-id /var/lib/dbus/machine-id
date -u -s @1000000000
sync
"""


@pytest.fixture(scope="module")
def source(client: Client, tiny: Image) -> Iterator[Sandbox]:
    """A guest with something to lose, whose clock is years behind."""
    with client.sandboxes.create(image=tiny.id, memory=256, cpus=1, name="source") as box:
        box.execute(_PREPARE).check()
        yield box


@pytest.fixture(scope="module")
def snapshot(client: Client, source: Sandbox) -> Iterator[Snapshot]:
    taken = source.snapshot(level="memory")
    yield taken
    client.snapshots.delete(taken.id)


def first_words(sandbox: Sandbox) -> bytes:
    """Random numbers of a first command, which must find the host's time, within a second."""
    before = time.time()
    first = sandbox.execute("date +%s; head -c 16 /dev/urandom | sha256sum; echo told >&2")
    seconds, random, _ = first.check().stdout.split()
    assert before - 2 < int(seconds) < time.time() + 1  # date cuts the fraction off
    assert first.stderr == b"told\n"  # nothing but the command's own
    return random


def is_now(sandbox: Sandbox) -> bool:
    """Whether a command that starts now finds the host's time, within a second."""
    return bool(first_words(sandbox))


def mac(sh: Shell, sandbox: Sandbox) -> str:
    return sh(sandbox, "cat /sys/class/net/eth0/address")


def check_new(copy: Sandbox, sh: Shell, who: str) -> None:
    """All of it is new in a copy named "Fête № 2!" of the source whose `_WHO` that is."""
    assert copy.ready
    assert copy.state_reason is None
    assert is_now(copy)
    assert sh(copy, "hostname") == sh(copy, "cat /etc/hostname") == "f-te-2"
    hosts = "127.0.0.1 localhost\n127.0.1.1 f-te-2\n::1 localhost"
    assert sh(copy, "cat /etc/hosts") == hosts
    machine_id = sh(copy, "cat /etc/machine-id")
    assert re.fullmatch(r"[0-9a-f]{32}", machine_id)
    assert machine_id not in who
    assert sh(copy, "cat /var/lib/dbus/machine-id") == machine_id
    files = "ssh_host_ed25519_key\nssh_host_ed25519_key.pub\nsshd_config"
    assert sh(copy, "ls /etc/ssh") == files
    modes = sh(copy, "stat -c %a /etc/ssh/ssh_host_ed25519_key*")
    assert modes.splitlines() == ["600", "644"]
    key = sh(copy, "cat /etc/ssh/ssh_host_ed25519_key") + "\n"
    assert key not in who
    public = load_ssh_private_key(key.encode(), None).public_key()
    text = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert sh(copy, "cat /etc/ssh/ssh_host_ed25519_key.pub") == f"{text} root@f-te-2"
    # Nothing of it lies about in the guest.
    assert sh(copy, "find / -xdev -name '*.new' -o -name '.stratabox*'") == ""
    assert mac(sh, copy) not in who


def test_a_copy_is_somebody_else(
    client: Client, source: Sandbox, snapshot: Snapshot, sh: Shell
) -> None:
    who = sh(source, _WHO)
    with client.snapshots.restore(snapshot.id, name="Fête № 2!") as copy:
        check_new(copy, sh, who)
        with client.snapshots.restore(snapshot.id, name="Fête № 2!") as other:
            check_new(other, sh, sh(copy, _WHO))
        # The card has that address too: it is there after a reboot.
        address, boot = mac(sh, copy), sh(copy, _BOOT)
        with watching(client, copy.id) as events:
            next(events)
            copy.execute("setsid sh -c 'sleep 0.3; reboot' >/dev/null 2>&1 &")
            next(event for event in events if not event.sandbox.ready)
        copy.wait_ready(timeout=120)
        assert sh(copy, _BOOT) != boot
        assert mac(sh, copy) == address
        assert sh(copy, "hostname") == "f-te-2"
    assert sh(source, _WHO) == who


def test_one_that_is_kept_knows_the_time_at_its_first_command(
    client: Client, source: Sandbox, snapshot: Snapshot, sh: Shell
) -> None:
    who = sh(source, _WHO)
    random = set()
    for _ in range(2):
        with client.snapshots.restore(snapshot.id, identity="keep") as same:
            random.add(first_words(same))
            assert sh(same, _WHO) == who
            assert same.refresh().state_reason is None
    assert len(random) == 2


def test_a_guest_without_commands_is_told_the_time_too(
    client: Client, shared_daemon: DaemonProcess, snapshot: Snapshot
) -> None:
    with client.snapshots.restore(snapshot.id, identity="keep") as same:
        due = f"SELECT identity_due FROM sandboxes WHERE id = '{same.id}'"
        wait_until(lambda: shared_daemon.rows(due) == [(None,)])
        # By now no command brings the time along any more.
        assert is_now(same)


@pytest.mark.parametrize("has_program", [True, False])
def test_random_numbers_where_the_kernel_has_no_driver_of_vmgenid(
    client: Client, source: Sandbox, sh: Shell, *, has_program: bool
) -> None:
    """Two copies would have the same for a minute. Without our program, its shell does it all."""
    who = sh(source, _WHO)
    device = sh(source, f"cd {_VMGENID}; echo *:*")
    sh(source, f"echo {device} >{_VMGENID}/unbind")
    if not has_program:
        sh(source, f"mv {PROGRAM} {PROGRAM}.away")
    taken = source.snapshot(level="memory")
    sh(source, f"echo {device} >{_VMGENID}/bind")
    if not has_program:
        sh(source, f"mv {PROGRAM}.away {PROGRAM}")
    random = set()
    for _ in range(3):
        with client.snapshots.restore(taken.id, identity="keep") as copy:
            random.add(first_words(copy))
            assert sh(copy, "dmesg | grep -c 'virtual machine fork' || :") == "0"
            assert copy.refresh().state_reason is None
    assert len(random) == 3
    if not has_program:
        with client.snapshots.restore(taken.id, name="Fête № 2!") as copy:
            check_new(copy, sh, who)
    client.snapshots.delete(taken.id)


def test_what_cannot_be_renewed_is_told(client: Client, source: Sandbox, sh: Shell) -> None:
    sh(source, "sync; mount -o remount,ro /")
    taken = source.snapshot(level="memory")
    sh(source, "mount -o remount,rw /")
    with client.snapshots.restore(taken.id, name="rigid") as copy:
        assert copy.ready
        assert copy.state_reason == (
            "its identity could not be renewed: host name, machine-id, SSH host keys"
        )
        assert mac(sh, copy) != mac(sh, source)
        assert is_now(copy)
    client.snapshots.delete(taken.id)


def test_clones_and_disks(client: Client, source: Sandbox, sh: Shell) -> None:
    clones = source.clone(count=2, name="worker")
    assert [sh(copy, "hostname") for copy in clones.sandboxes] == ["worker-1", "worker-2"]
    kept = source.clone(identity="keep")
    assert sh(kept.sandbox, "hostname") == sh(source, "hostname")
    for copy in (*clones.sandboxes, kept.sandbox):
        copy.delete()
    who = sh(source, _WHO)
    disk = source.snapshot(level="crash")
    with client.snapshots.restore(disk.id, name="booted") as copy:
        assert sh(copy, "hostname; cat /etc/hostname") == "booted\nbooted"
        assert sh(copy, "cat /etc/machine-id") not in who
        assert mac(sh, copy) not in who
        copy.stop()
        copy.start()
        assert sh(copy, "hostname") == "booted"
    with client.snapshots.restore(disk.id, identity="keep") as same:
        assert sh(same, _WHO) == who
    for each in (clones.snapshot, kept.snapshot, disk):
        client.snapshots.delete(each.id)


def test_revert_keeps_or_renews(client: Client, tiny: Image, sh: Shell) -> None:
    with client.sandboxes.create(image=tiny.id, memory=256, name="back") as box:
        before = mac(sh, box)
        instant = box.snapshot(level="memory")
        back = box.revert(instant.id).sandbox
        assert (sh(back, "hostname"), mac(sh, back)) == ("tiny", before)
        back = box.revert(instant.id, identity="renew").sandbox
        assert sh(back, "hostname") == "back"
        assert mac(sh, back) != before
    for each in client.snapshots.list():
        if each.source_sandbox_name == "back":
            client.snapshots.delete(each.id)


def test_the_clock_after_a_pause(client: Client, snapshot: Snapshot, sh: Shell) -> None:
    with client.snapshots.restore(snapshot.id) as box:
        sh(box, "date -u -s @1000000000")  # a pause of many years
        box.pause()
        box.resume()
        assert is_now(box)


def test_paused_at_its_first_instant(own_daemon: DaemonProcess, sh: Shell) -> None:
    client = own_daemon.start()
    client.images.build_tiny()
    box = client.sandboxes.create(image="tiny", memory=256)
    sh(box, "date -u -s @1000000000; echo here >/run/kept")
    instant = box.snapshot(level="memory")
    held = client.snapshots.restore(instant.id, name="held", paused=True)
    fresh = client.sandboxes.create(image="tiny", memory=256, name="fresh", paused=True)
    for each in (held, fresh):
        assert (each.state, each.ready) == (SandboxState.PAUSED, False)
        assert each.state_reason == "paused by request"
    client.close()
    own_daemon.kill()
    client = own_daemon.start()
    for name in ("held", "fresh"):
        again = client.sandboxes.get(name)
        assert (again.state, again.ready) == (SandboxState.PAUSED, False)
        again.resume()
        again = again.wait_ready(timeout=120)
        assert again.state is SandboxState.RUNNING
        assert is_now(again)
    assert sh(client.sandboxes.get("held"), "hostname; cat /run/kept") == "held\nhere"
    assert sh(client.sandboxes.get("fresh"), "hostname; test -e /run/kept || echo no") == "tiny\nno"
    kept = client.snapshots.restore(instant.id, paused=True, identity="keep")
    kept.resume()
    assert sh(kept.wait_ready(timeout=120), "hostname") == "tiny"
    own_daemon.stop()
    client.close()


def test_debian(client: Client, debian_box: Sandbox, sh: Shell) -> None:
    sh(debian_box, "ssh-keygen -q -t rsa -N '' -f /etc/ssh/ssh_host_rsa_key")
    who = sh(debian_box, "cat /etc/machine-id /etc/ssh/ssh_host_*; hostname")
    taken = debian_box.snapshot(level="memory")
    random = set()
    with client.snapshots.restore(taken.id, name="deb") as copy:
        assert copy.state_reason is None
        assert is_now(copy)
        assert sh(copy, "hostname; hostnamectl hostname; getent hosts deb | cut -c 1-9") == (
            "deb\ndeb\n127.0.1.1"
        )
        assert sh(copy, "cat /etc/machine-id") not in who
        assert sh(copy, "echo /etc/ssh/ssh_host_*_key") == "/etc/ssh/ssh_host_ed25519_key"
        derived = sh(copy, "ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key | cut -d ' ' -f 1,2")
        assert derived not in who
        assert sh(copy, "cat /etc/ssh/ssh_host_ed25519_key.pub").startswith(derived)
        assert sh(copy, "mkdir -p /run/sshd; sshd -t && echo fine") == "fine"
    for _ in range(2):
        with client.snapshots.restore(taken.id, identity="keep") as same:
            random.add(sh(same, "python3 -c 'import os; print(os.getrandom(16).hex())'"))
            assert sh(same, "cat /etc/machine-id /etc/ssh/ssh_host_*; hostname") == who
    assert len(random) == 2
    sh(debian_box, "rm /etc/ssh/ssh_host_rsa_key*")
    client.snapshots.delete(taken.id)
