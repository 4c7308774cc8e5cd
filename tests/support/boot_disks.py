"""Disks that boot by themselves, made by hand: a boot sector is all that is on them."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20

POWER_OFF = bytes.fromhex(
    "ba0406"  # mov dx, 0x604   the power management of q35, where SeaBIOS puts it
    "b80020"  # mov ax, 0x2000  sleep, type "off"
    "ef"  #     out dx, ax
    "f4ebfd"  # hlt, for ever
)
"""A program that powers the machine off."""


def say(text: str) -> bytes:
    """A program that writes a text to the serial console, and halts for ever."""
    code = bytes.fromhex(
        "fc31c08ed8"  # cld; xor ax, ax; mov ds, ax
        "be167c"  #     mov si, 0x7c16
        "ac84c07406"  # lodsb; test al, al; jz the end
        "baf803ee"  #   mov dx, 0x3f8; out dx, al
        "ebf5"  #       jmp lodsb
        "f4ebfd"  #     hlt, for ever
    )
    return code + text.encode("ascii") + b"\0"


def boot_disk(path: Path, program: bytes = POWER_OFF) -> None:
    """Write a raw disk of 1 MiB that runs a 16-bit program of at most 440 bytes."""
    assert len(program) <= 440
    path.write_bytes(program.ljust(510, b"\0") + b"\x55\xaa" + bytes(MIB - 512))
