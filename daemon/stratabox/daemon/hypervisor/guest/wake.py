"""What the program that begins commands in guests (wake.c) can be told: orders, as bytes.

Each function gives one order, to be put one behind the other on the program's standard input. Its
first argument, `name`, is what the program calls it where it fails; it then leaves out those that
follow under the same name. What an order would change and is not there is no failure.
"""

from __future__ import annotations

import os
import struct

PROGRAM = "/usr/libexec/stratabox/wake.1"
"""Where images that are built here have it, unless there was no C compiler when the package was
built. The number changes with what it understands: a guest may be older than its daemon."""
SEED_BYTES = 64

HARDWARE_CLOCK = "/sys/class/rtc/rtc0/since_epoch"
LARGEST = 32 << 10
"""Bytes that the program takes, of all orders together."""


def set_clock(name: str, nanoseconds: int) -> bytes:
    """Set the clock, to ns since 1970 UTC, or to the hardware's where that is later."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return _order(b"c", name, struct.pack("<qq", seconds, rest), HARDWARE_CLOCK)


def seed(name: str, data: bytes) -> bytes:
    """Mix bytes into the kernel's random numbers, and have them reseeded at once."""
    return _order(b"r", name, data)


def set_host_name(name: str, host: str) -> bytes:
    """Set the kernel's host name."""
    return _order(b"h", name, host)


def write(name: str, path: str, content: str, *, mode: int = 0o644, flags: int = 0) -> bytes:
    """Write a file in place, which keeps the owner, mode and mounts of one that is there.

    :param flags: open's, as O_CREAT; without that a file that is not there is none to change.
    """
    how = struct.pack("<ii", os.O_TRUNC | flags, mode)
    return _order(b"w", name, path, how, content)


def move(name: str, source: str, target: str) -> bytes:
    """Rename a file, over the target where there is one."""
    return _order(b"m", name, source, target)


def delete(name: str, folder: str, prefix: str, suffix: str = "") -> bytes:
    """Delete the files of a folder whose names begin and end so."""
    return _order(b"d", name, folder, prefix, suffix)


def set_line(name: str, path: str, line: str) -> bytes:
    """Put a line in place of all lines of a file with the same first word, where there are any."""
    return _order(b"l", name, path, line.split()[0], f"{line}\n")


def hang_up(name: str, pid_file: str, process: str) -> bytes:
    """Send SIGHUP to the process whose number is in a file, if it is called so."""
    return _order(b"k", name, pid_file, process)


def set_mac(name: str, device: str, mac: str) -> bytes:
    """Set the MAC address of a virtio network card, given by its device's folder in sysfs."""
    return _order(b"a", name, device, bytes.fromhex(mac.replace(":", "")))


def _order(what: bytes, name: str, *operands: str | bytes) -> bytes:
    fields = [each.encode() if isinstance(each, str) else each for each in (name, *operands)]
    fields += [b""] * (4 - len(fields))
    return what + b"".join(struct.pack("<H", len(each)) + each + b"\0" for each in fields)
