"""Archives: snapshots and images as one stream of bytes that can go to another store.

| module | duty |
|---|---|
| `archive` | the layout: preamble, blocks, trailer; packing and opening blocks without trust |
| `manifest` | what an archive says that it holds |
| `strict`, `fields` | read that, written by anybody |
| `sources` | what an export reads: layers, saved memory, whole files |
| `parsing` | what an import does with the bytes: a parser that asks for them |
| `targets` | what an import writes: clean files of ours, in a folder of its own |

All functions block and belong in a thread. None knows the catalog. docs/transfers.md has the layout
byte by byte.
"""
