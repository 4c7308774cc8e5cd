"""The libvirt launcher: QEMU as a transient libvirt domain.

```
 launcher ──XML──▶ libvirtd ──runs──▶ emulator ──"-stratabox NAME"──▶ handover, in the daemon
                                         │ ◀── command line, environment, descriptors ──┘
                                         └─ becomes QEMU, with libvirt's monitor beside ours
```

libvirt is told what it shows and accounts for: name, uuid, size, title, our ids. The hardware, the
files and our own sockets are those of the plain launcher, in the same words (`command_line`,
`launch_files`), so that a guest sees one machine under both and goes over from one to the other.

| module | duty |
|---|---|
| `launcher` | starts and stops a domain; implements `machine.Launcher` |
| `connection` | libvirtd: calls in threads, its errors in our words, lost and found again |
| `domain_xml` | pure: spec → XML |
| `emulator`, `emulator.c` | the program that libvirt runs as QEMU, where QEMU's users can enter |
| `walls` | what that program is to be confined by, and was |
| `handover` | what that program asks for: given to it alone |

Only `connection` imports libvirt, and only when it is used.
"""
