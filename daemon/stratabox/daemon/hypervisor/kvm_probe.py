"""Run one instruction in a virtual machine of /dev/kvm: the only proof that KVM works here.

A program of its own (``python -I kvm_probe.py``), standard library only, because on a host whose
/dev/kvm only seems to work the attempt can hang, and then this process is killed. Exit code 0:
the guest halted as it should. Otherwise one line on stdout says what went wrong.

The guest is one page of memory with a HLT in real mode; it needs no interrupt controller, no
firmware and no paging.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import sys

_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84

_EXIT_HLT = 5
_GUEST_ADDRESS = 0x1000
_TSS_ADDRESS = 0x10000  # three pages anywhere that the guest does not use
_HLT = b"\xf4"


def probe() -> str:
    """Run the guest; an empty string when it halted, else what happened instead.

    :raise OSError: when the kernel refuses one of the steps.
    """
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, _GET_API_VERSION, 0)
    if version != 12:
        return f"/dev/kvm speaks API version {version}, not 12"
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    # Intel CPUs without "unrestricted guest" need a place for a task state segment.
    fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS_ADDRESS)

    page = mmap.mmap(-1, mmap.PAGESIZE)
    page[: len(_HLT)] = _HLT
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    region = struct.pack("=IIQQQ", 0, 0, _GUEST_ADDRESS, mmap.PAGESIZE, address)
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)

    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    system = bytearray(312)
    fcntl.ioctl(vcpu, _GET_SREGS, system)
    struct.pack_into("=Q", system, 0, 0)  # cs.base
    struct.pack_into("=H", system, 12, 0)  # cs.selector
    fcntl.ioctl(vcpu, _SET_SREGS, bytes(system))
    registers = struct.pack("=18Q", *([0] * 16), _GUEST_ADDRESS, 2)  # …, rip, rflags
    fcntl.ioctl(vcpu, _SET_REGS, registers)

    fcntl.ioctl(vcpu, _RUN, 0)
    (reason,) = struct.unpack_from("=I", run, 8)
    return "" if reason == _EXIT_HLT else f"a test guest ended with KVM exit reason {reason}"


def main() -> int:
    """Say what happened, as this module's docstring promises."""
    try:
        trouble = probe()
    except OSError as error:
        trouble = f"a test guest could not be run ({error.strerror})"
    if trouble:
        print(trouble)
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
