"""Guests in a host, and what the host knows of them."""

from __future__ import annotations

from installed.host import Host
from installed.stages import SEED
from stratabox.client import Client, Sandbox


def restored(client: Client, name: str) -> Sandbox:
    """A guest in which a process counts on, `support.counting`."""
    return client.snapshots.restore(SEED, name=name)


def qemu(host: Host, sandbox: str) -> int:
    """The QEMU of a sandbox, as the host numbers it; 0: there is none."""
    name = f"guest=stratabox-[^ ]*-{sandbox}"
    code, said = host.run(f"pgrep -f '^/usr/bin/qemu-system-x86_64 -name {name}'")
    return int(said) if code == 0 else 0


def scopes(host: Host) -> list[str]:
    """The scopes of guests and their helpers."""
    line = "systemctl list-units --plain --no-legend --all 'stratabox-*.scope'"
    return [each.split()[0] for each in host.sh(line).splitlines()]
