"""Saved guest memory on the disk, and in the form that a QEMU maps.

| module | duty |
|---|---|
| `format` | one snapshot's own pages in one file: its layout, read without trust |
| `packing` | zstd: packs chunks of pages where that pays, unpacks them without trust |
| `writer` | makes such a file, in one pass |
| `chain` | files of one chain → which page comes from where; taking files out of it |
| `sealed` | the chain's RAM, and the devices' state, as sealed files in memory |

All functions block and belong in a thread. None knows the catalog: which file is whose parent is
told by the files' own headers.
"""
