"""Real virtual machines: starting, finding, controlling and talking to them. Knows QEMU.

What belongs where:

| module | duty |
|---|---|
| `machine` | the contract with the rest of the daemon: specs, handles, the `Launcher` protocol |
| `accelerator`, `kvm_probe` | KVM or TCG, decided by looking |
| `qemu_host` | the QEMU of this host: version, machine type, firmware; makes `Machine` records |
| `command_line` | pure: spec → QEMU's arguments |
| `launch_files` | opens what a domain is started with, and numbers the descriptors |
| `process`, `sockets` | processes found again and watched; Unix sockets in deep folders |
| `qemu` | launcher: QEMU as a child process |
| `launching` | what both launchers share: domains found as processes, and their first greeting |
| `libvirt` | launcher: QEMU as a libvirt domain |
| `qmp` | one QMP connection; the only importer of qemu.qmp |
| `monitor`, `events` | a connection that comes back; what QEMU tells by itself |
| `block`, `domain` | overlays and the block graph; control of one running domain |
| `volumes` | volumes plugged into a running domain, grown and unplugged |
| `memory` | RAM and devices of a running domain saved, and mapped again |
| `guest` | what goes on inside a guest, through its agent |

Nothing here imports gRPC, the catalog, lifecycle or api; only `libvirt` imports libvirt.
"""
