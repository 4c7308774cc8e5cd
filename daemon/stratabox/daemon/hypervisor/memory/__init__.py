"""The memory engine: a running guest's RAM and devices, saved in milliseconds and mapped again.

| module | duty |
|---|---|
| `mapping` | where a QEMU has its guest's RAM |
| `pages` | which pages are its own, and which were written, from its page tables |
| `tracking` | who notes what was written: `written`, `soft_dirty` or nobody |
| `reader` | another process's pages into a buffer |
| `save` | a running domain → files |
| `copying` | one save's copy of RAM, in rounds |
| `control` | what QEMU itself is asked, over its monitor |
| `hot` | saved memories that are ready to be mapped |
| `headroom` | how much of the host's memory is left for what only makes things faster |
| `threads` | steps that must come to their end |
| `load` | has a QEMU that was started with saved memory take it |
| `fits` | pure: what keeps a saved machine from running here |

`dirtytrack.c` becomes a library that is preloaded into QEMU, where a compiler was there to build
it; `tracking` needs it for `written`.

A fresh guest's RAM is a private mapping of /dev/zero: anonymous memory (huge pages, and one page
for each that is touched, where an empty memfd would hold a second one) that can be told by its
device and inode. A restored guest's is a private mapping of a sealed memfd.
"""
