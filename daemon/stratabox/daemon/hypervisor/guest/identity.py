"""What a guest that goes on from saved memory, or that is a copy, is told: the time, who it is.

It is told by one errand (`exec.Errand`) through its agent. A guest that keeps who it was needs only
the time and new random numbers; that is done at the head of its first command (`execute(first=…)`)
and so costs no round of its own. A guest that becomes somebody new is told by `tell`, before it
counts as ready.

A guest that has the program of `wake` is given orders, any other a script with the same effect: it
needs a POSIX shell, and `date`, `ip`, `mv`, `rm` only for what each is needed for.

*Random numbers.* A kernel with the driver of vmgenid reseeds itself when QEMU tells it of the new
id, before its agent can have run anything. For other kernels bytes written to /dev/urandom are
mixed in at once, but heard of only at the next reseeding, a minute later; so that is asked for by
ioctl, for which a program of 145 bytes comes along with the script. Two copies would give equal
numbers until then.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import struct
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from stratabox.daemon.hypervisor.guest import wake
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.exec import Errand, run_errand
from stratabox.storage.model.errors import FailedError

TELL_SECONDS = 60.0
CLOCK_SECONDS = 0.9
"""How far a guest's clock may be off. A script sets it in whole seconds."""
_SURE_SECONDS = 0.5
"""An errand that took no longer cannot have left the clock more than a second wrong."""

_HEAD_START = 0.2
_HOSTNAME_MAX = 63
_SSH = "/etc/ssh"

# ioctl(0, RNDRESEEDCRNG); exit with its error number.
_RESEED_CODE = bytes.fromhex(
    "b810000000"  # mov eax, 16 (ioctl)
    "31ff"  #       xor edi, edi
    "be07520000"  # mov esi, 0x5207 (RNDRESEEDCRNG)
    "0f05"  #       syscall
    "f7d8"  #       neg eax
    "89c7"  #       mov edi, eax
    "b8e7000000"  # mov eax, 231 (exit_group)
    "0f05"  #       syscall
)
_RESEED_BASE = 0x400000

# Builtins wherever there is one: a guest without KVM
# takes 30 ms for each program that it starts.
_BEGIN = """\
failed=
miss() { failed="$failed${failed:+, }$1"; }
"""

_WAKE = """\
# The kernel's driver of vmgenid, with its device.
reseeded() { for at in /sys/bus/acpi/drivers/vmgenid/*:*; do [ -e "$at" ] && return; done; false; }
reseed() (
    umask 077
    set -C
    for at in /run /dev/shm /root /tmp; do
        file=$at/.stratabox-$$
        printf "$program" >"$file" || continue
        chmod 700 "$file" && "$file" </dev/urandom
        code=$?
        rm -f "$file"
        [ "$code" != 0 ] || exit 0
    done
    exit 1
)
# The time as it was sent, or the hardware's, which QEMU keeps by the host's: a guest with little of
# a CPU may start this seconds later.
late() {
    read -r now </sys/class/rtc/rtc0/since_epoch && [ "$now" -gt "$time" ] &&
        [ "$now" -lt $((time + 300)) ]
}
{
    if late; then time=$now; fi
    date -u -s "@$time" >/dev/null || miss clock
    printf "$seed" >/dev/urandom
    reseeded || reseed || miss 'random numbers'
} 2>/dev/null
"""

# Beside all else, on another CPU where there is one. The card is where the command line has it.
_RENEW_FIRST = """\
set_mac() {
    for at in /sys/bus/pci/devices/0000:00:04.0/virtio*/net/*; do
        [ -e "$at" ] || exit 0
        read -r now <"$at/address"
        [ "$now" != "$mac" ] || exit 0
        exec ip link set dev "${at##*/}" address "$mac"
    done
}
set_mac 2>/dev/null & setting=$!
"""

_RENEW = """\
# In place, which also keeps owner, mode and mounts; ext4 flushes what is replaced so.
put() { printf '%s\\n' "$2" >"$1"; }
set_hosts() {
    text= found=
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in
        127.0.1.1[[:blank:]]*) line="127.0.1.1 $hostname" found=yes ;;
        esac
        text="$text$line
"
    done </etc/hosts
    [ -z "$found" ] || printf '%s' "$text" >/etc/hosts
}
set_hostname() {
    put /proc/sys/kernel/hostname "$hostname" && put /etc/hostname "$hostname" || return
    [ ! -e /etc/hosts ] || set_hosts
}
set_machine_id() {
    [ ! -e /etc/machine-id ] || put /etc/machine-id "$machine_id" || return
    at=/var/lib/dbus/machine-id
    [ ! -f $at ] || [ -L $at ] || put $at "$machine_id"
}
set_host_key() {
    [ -d /etc/ssh ] || return 0
    at=/etc/ssh/ssh_host_ed25519_key old=
    (umask 077 && rm -f $at.new && set -C && put $at.new "$host_key") && mv -f $at.new $at || return
    (umask 022 && put $at.pub "$public_key") || return
    for file in /etc/ssh/ssh_host_*_key /etc/ssh/ssh_host_*_key.pub; do
        case $file in $at | $at.pub | *'*'*) ;; *) old="$old $file" ;; esac
    done
    [ -z "$old" ] || rm -f $old || return
    if read -r pid </run/sshd.pid && read -r name <"/proc/$pid/comm" && [ "$name" = sshd ]; then
        kill -HUP "$pid"
    fi
    return 0
}
{
    set_hostname || miss 'host name'
    set_machine_id || miss machine-id
    set_host_key || miss 'SSH host keys'
    wait "$setting" || miss 'MAC address'
} 2>/dev/null
"""

_END = """\
printf '%s %s\\n' "$STRATABOX_EXEC" "$failed" >&2
"""


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """Who a copy is from now on."""

    hostname: str
    machine_id: str
    """32 hexadecimal digits."""
    host_key: str
    """SSH's ed25519 host key, in OpenSSH's format; secret."""
    public_key: str
    mac: str

    @classmethod
    def mint(cls, name: str, sandbox: str, mac: str) -> Renewal:
        """Somebody new.

        :param name: the sandbox's name; its host name is made of it, or of the id.
        :param mac: as its network card has it.
        """
        key = Ed25519PrivateKey.generate()
        hostname = hostname_of(name, sandbox)
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        return cls(
            hostname=hostname,
            machine_id=secrets.token_hex(16),
            host_key=secret.decode().rstrip("\n"),
            public_key=f"{public.decode()} root@{hostname}",
            mac=mac,
        )


def hostname_of(name: str, sandbox: str) -> str:
    """The host name of a sandbox: its name as DNS allows it, or else the start of its id."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())[:_HOSTNAME_MAX].strip("-")
    return plain or f"sandbox-{sandbox[:8]}"


def errand(renewal: Renewal | None = None) -> Errand:
    """What is to be done in the guest; the time in it is that of its sending.

    :param renewal: None: it stays who it was.
    """
    return Errand(
        script=functools.partial(script, renewal), orders=functools.partial(orders, renewal)
    )


def orders(renewal: Renewal | None = None) -> bytes:
    """What the guest's program is to do, now: the time is in it."""
    told = [
        wake.set_clock("clock", time.time_ns()),
        wake.seed("random numbers", secrets.token_bytes(wake.SEED_BYTES)),
    ]
    if renewal is not None:
        told += _renewing(renewal)
    return b"".join(told)


def _renewing(new: Renewal) -> list[bytes]:
    host, key = f"{new.hostname}\n", f"{_SSH}/ssh_host_ed25519_key"
    anew = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return [
        wake.set_host_name("host name", new.hostname),
        wake.write("host name", "/etc/hostname", host, flags=os.O_CREAT),
        wake.set_line("host name", "/etc/hosts", f"127.0.1.1 {new.hostname}"),
        wake.write("machine-id", "/etc/machine-id", f"{new.machine_id}\n"),
        wake.write(
            "machine-id", "/var/lib/dbus/machine-id", f"{new.machine_id}\n", flags=os.O_NOFOLLOW
        ),
        # First: no instant with an old key, and none after a daemon that was killed in between.
        wake.delete("SSH host keys", _SSH, "ssh_host_", "_key"),
        wake.delete("SSH host keys", _SSH, "ssh_host_", "_key.pub"),
        wake.delete("SSH host keys", _SSH, "ssh_host_ed25519_key.new"),
        wake.write("SSH host keys", f"{key}.new", f"{new.host_key}\n", mode=0o600, flags=anew),
        wake.move("SSH host keys", f"{key}.new", key),
        wake.write("SSH host keys", f"{key}.pub", f"{new.public_key}\n", flags=os.O_CREAT),
        wake.hang_up("SSH host keys", "/run/sshd.pid", "sshd"),
        wake.set_mac("MAC address", "/sys/bus/pci/devices/0000:00:04.0", new.mac),
    ]


def script(renewal: Renewal | None = None) -> bytes:
    """What the guest's shell is to run, now: the time is in it."""
    given = {
        "time": str(round(time.time() + _HEAD_START)),
        "seed": _octal(secrets.token_bytes(wake.SEED_BYTES)),
        "program": _octal(_reseed_program()),
    }
    if renewal is not None:
        given |= vars(renewal)
    # No value can hold a quote: digits, octal escapes, base64, a host name, a MAC address.
    head = "".join(f"{name}='{value}'\n" for name, value in given.items())
    first, last = (_RENEW_FIRST, _RENEW) if renewal else ("", "")
    return "".join([head, _BEGIN, first, _WAKE, last, _END]).encode()


async def tell(
    agent: GuestAgent, renewal: Renewal | None = None, seconds: float = TELL_SECONDS
) -> str:
    """Tell the guest, and return what could not be done, in words; "": nothing.

    Where the agent may run nothing, the clock is set all the same.

    :raise UnavailableError: AGENT_UNAVAILABLE, when the agent stops answering.
    """
    started = time.monotonic()
    try:
        failed = await run_errand(agent, errand(renewal), seconds)
    except FailedError as error:
        failed = error.message
    except TimeoutError:
        failed = f"the guest did not take it within {seconds:g} s"
    return await check_clock(agent, failed, time.monotonic() - started)


async def check_clock(agent: GuestAgent, failed: str, seconds: float) -> str:
    """Set the guest's clock by its agent where an errand has not, or not in time.

    Not first of all: the agent sets the hardware's clock too, which can take it a second.

    :param failed: what the errand could not do.
    :param seconds: how long it took, with the command that followed it.
    :return: what is still not done.
    :raise UnavailableError: AGENT_UNAVAILABLE.
    """
    if not failed and seconds < _SURE_SECONDS:
        return ""
    missed = [each for each in failed.split(", ") if each not in ("", "clock")]
    try:
        if abs(await agent.get_time() / 1e9 - time.time()) > CLOCK_SECONDS:
            await agent.set_time(time.time_ns())
    except FailedError as error:
        missed.append(f"clock ({error.message})")
    return ", ".join(missed)


def _octal(data: bytes) -> str:
    return "".join(f"\\{byte:03o}" for byte in data)


def _reseed_program() -> bytes:
    """An ELF program for x86-64, of one segment."""
    header_size, segment_size = 64, 56
    size = header_size + segment_size + len(_RESEED_CODE)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, _RESEED_BASE + header_size + segment_size, header_size,
        0, 0, header_size, segment_size, 1, 0, 0, 0,
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _RESEED_BASE, _RESEED_BASE, size, size, 0x1000)
    return header + segment + _RESEED_CODE
