"""Turn Debian's kernel into one that starts at once.

A bzImage unpacks itself in the guest: 2.4 s of a 4 s boot without KVM. So it is unpacked here, and
the ELF file within is what QEMU loads, by the PVH entry that Debian's kernels have. Price: no
address randomisation of the guest's kernel (the unpacker does that).
"""

from __future__ import annotations

import lzma
import struct
import zlib

_BOOT_FLAG = 0x1FE
_HEADER_MAGIC = 0x202
_PAYLOAD_OFFSET = 0x248
_MAX_KERNEL = 256 << 20
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_PHYS32_ENTRY = 18


def unpack(kernel: bytes) -> bytes:
    """The ELF kernel in a bzImage, or `kernel` itself where QEMU could not start what is in it."""
    elf = _payload(kernel)
    if elf is None or not _has_pvh_entry(elf):
        return kernel
    return _trim(elf)


def _payload(kernel: bytes) -> bytes | None:
    if len(kernel) < 0x260 or kernel[_HEADER_MAGIC : _HEADER_MAGIC + 4] != b"HdrS":
        return None
    offset, length = struct.unpack_from("<II", kernel, _PAYLOAD_OFFSET)
    start = ((kernel[0x1F1] or 4) + 1) * 512 + offset
    packed = kernel[start : start + length]
    try:
        if packed.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor().decompress(packed, _MAX_KERNEL)
        if packed.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(wbits=31).decompress(packed, _MAX_KERNEL)
    except (lzma.LZMAError, zlib.error):
        return None
    return None


def _segments(elf: bytes) -> list[tuple[int, int, int, int]]:
    """Of each program header: its own offset, its type, and its content's offset and length."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    found = []
    for at in range(table, table + size * count, size):
        (kind,) = struct.unpack_from("<I", elf, at)
        (offset,) = struct.unpack_from("<Q", elf, at + 8)
        (length,) = struct.unpack_from("<Q", elf, at + 32)
        found.append((at, kind, offset, length))
    return found


def _has_pvh_entry(elf: bytes) -> bool:
    if elf[:5] != b"\x7fELF\x02":
        return False
    for _, kind, offset, length in _segments(elf):
        if kind != _PT_NOTE:
            continue
        while length >= 12:
            name, content, number = struct.unpack_from("<III", elf, offset)
            if number == _XEN_PHYS32_ENTRY and elf[offset + 12 : offset + 16] == b"Xen\0":
                return True
            step = 12 + (name + 3) // 4 * 4 + (content + 3) // 4 * 4
            offset, length = offset + step, length - step
    return False


def _trim(elf: bytes) -> bytes:
    """Drop what QEMU does not load: section headers, and the zeros that end the last segment."""
    at, _, offset, length = max(
        (segment for segment in _segments(elf) if segment[1] == _PT_LOAD),
        key=lambda segment: segment[2],
    )
    content = elf[offset : offset + length].rstrip(b"\0")
    trimmed = bytearray(elf[:offset] + content)
    struct.pack_into("<Q", trimmed, at + 32, len(content))
    struct.pack_into("<Q", trimmed, 40, 0)  # no section headers
    struct.pack_into("<HHH", trimmed, 58, 0, 0, 0)
    return bytes(trimmed)
