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
| `libvirt`, `domain_xml` | launcher: QEMU as a libvirt domain; pure: spec → XML |
| `qmp` | one QMP connection; the only importer of qemu.qmp |
| `monitor`, `events` | a connection that comes back; what QEMU tells by itself |
| `block`, `domain` | overlays and the block graph; control of one running domain |
| `memory` | RAM and devices of a running domain saved, and mapped again |
| `agent_channel`, `agent` | the wire to the guest's agent; what it is asked |
| `exec` | commands in the guest, run through the agent |

Nothing here imports gRPC, the catalog, lifecycle or api; only `libvirt` imports libvirt.
"""
