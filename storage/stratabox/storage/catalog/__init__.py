"""The catalog: records in one SQLite database, one module for each table.

``database`` opens and migrates it and hands out transactions; ``sandboxes``, ``snapshots``,
``images``, ``disks``, ``layers``, ``operations`` and ``idempotency`` turn rows into records and
back, inside a transaction that their caller opened; ``lookup`` resolves names and cuts pages;
``gc`` decides, purely, which layers nothing needs.
"""
