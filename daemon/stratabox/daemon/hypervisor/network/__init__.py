"""A guest's way out: a helper process for each sandbox with egress, and the walls in it.

```
 guest ── virtio-net ── QEMU ── net.sock ──▶ helper ───────────────────────▶ sockets of the host
                                             │ walls (policy, flows) ─▶ libslirp
                                             └ names (DNS) ─▶ the host's resolvers
 daemon ────────────── uplink.sock ─────────▶ control: policy, counters
```

| module | duty |
|---|---|
| `addresses`, `policy` | pure: what is special, and what a policy allows |
| `packets` | pure: frames read strictly, refusals written |
| `walls` | pure: what becomes of each frame, either way; which connections there are |
| `names` | what the guest asks of DNS, and which addresses it may reach by it |
| `routes` | asks the kernel whether an address is the host's own |
| `slirp` | libslirp, by ctypes |
| `confine`, `helper` | the process: its rights given up, its loop |
| `uplink` | the daemon's side: starts, finds, tells and ends a helper |

A helper runs as the sandbox's own uid (the daemon's, where that is not root). It outlives the
daemon like QEMU, and ends when QEMU does. With network `none` there is no helper and the card has
no link.
"""
