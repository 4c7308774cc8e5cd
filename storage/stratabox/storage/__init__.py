"""What is kept: the words, the catalog, and the files behind them.

`model` holds the records, states, ids and errors; `catalog` (SQLite) is the one source of truth for
records; `qcow2` reads headers and is the only caller of qemu-img. Nothing in this package knows a
QEMU process, gRPC or the daemon.
"""
