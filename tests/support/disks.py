"""What stands in a store's layers and what its QEMUs do, seen from outside, without any daemon."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def chain(layer: Path) -> list[Path]:
    """The files of a layer's chain, the top first: as the catalog has it, where there is one.

    A header names what its layer stood on at first, which may have been replaced and be gone. So
    may the layer itself, by a job in the background: then it is the one that took its place.
    """
    catalog = layer.parent.parent / "catalog.db"
    if not catalog.exists():
        return [layer]
    with contextlib.closing(sqlite3.connect(catalog, timeout=60)) as opened:
        rows = opened.execute(
            """
            WITH RECURSIVE
            became (id, depth) AS (
                SELECT ?, 0
                UNION ALL
                SELECT jobs.target, depth + 1 FROM jobs JOIN became ON jobs.layer = became.id
            ),
            top (id) AS (
                SELECT id FROM became JOIN layers USING (id)
                WHERE state != 'garbage' ORDER BY depth LIMIT 1
            ),
            chain (id, depth) AS (
                SELECT id, 0 FROM top
                UNION ALL
                SELECT layers.parent, depth + 1 FROM layers JOIN chain USING (id)
                WHERE layers.parent IS NOT NULL
            )
            SELECT id FROM chain ORDER BY depth
            """,
            (layer.stem,),
        ).fetchall()
    return [layer.with_name(f"{row[0]}.qcow2") for row in rows] or [layer]


def through(layer: Path, tool: Callable[[str], T]) -> T:
    """What a tool makes of a layer's chain, which it opens at its beginning.

    A job in the background may replace one of its files just then: so again, with those of now.

    :param tool: gets the chain as qemu-img takes it instead of a file's name.
    """
    while True:
        files = chain(layer)
        try:
            return tool(_spelled(files))
        except (subprocess.CalledProcessError, AssertionError):
            if chain(layer) == files:
                raise


def _spelled(files: list[Path]) -> str:
    if len(files) == 1:
        return str(files[0])
    node: dict[str, object] | None = None
    for path in reversed(files):
        file = {"driver": "file", "filename": str(path)}
        node = {"driver": "qcow2", "file": file, "backing": node}
    return "json:" + json.dumps(node)


def read(layer: Path, *, offset: int = 0, size: int = 512) -> bytes:
    """Bytes of the disk that `layer` and the chain below it are; all multiples of 512."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "bytes"

        def copy(source: str) -> None:
            subprocess.run(
                [
                    "qemu-img", "dd", "-U", "-f", "qcow2", "-O", "raw", "bs=512",
                    f"skip={offset // 512}", f"count={(offset + size) // 512}",
                    f"if={source}", f"of={target}",
                ],
                check=True, capture_output=True,
            )  # fmt: skip

        through(layer, copy)
        return target.read_bytes()


def marker(layer: Path) -> str:
    """The line that a guest wrote at the very beginning of a disk without a file system."""
    return read(layer).partition(b"\n")[0].rstrip(b"\0").decode()


def marker_of(find: Callable[[], Path]) -> str:
    """The same of a record's layer.

    :param find: where the record's layer is now.
    """
    return marker(find())


def needs_recovery(layer: Path) -> bool:
    """Whether the ext4 on a whole disk would replay its journal when it is mounted."""
    superblock = read(layer, offset=1024, size=512)
    assert superblock[0x38:0x3A] == b"\x53\xef"
    return bool(superblock[0x60] & 0x04)


def digest(file: Path) -> str:
    """SHA-256 of a file's own bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def ask_qemu(folder: Path, command: str, **arguments: object) -> object:
    """Ask a QEMU over its second monitor, which the daemon uses in need only.

    :param folder: the sandbox's folder in the state folder.
    """
    directory = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(60)
            monitor.connect(f"/proc/self/fd/{directory}/rescue.sock")
            with monitor.makefile("rwb") as stream:
                assert b"QMP" in stream.readline()
                answer: object = None
                for execute, given in (("qmp_capabilities", {}), (command, arguments)):
                    stream.write(json.dumps({"execute": execute, "arguments": given}).encode())
                    stream.flush()
                    while "return" not in (reply := json.loads(stream.readline())):
                        assert "event" in reply, reply
                    answer = reply["return"]
                return answer
    finally:
        os.close(directory)


def status(folder: Path) -> str:
    """QEMU's own word for what its guest does."""
    answer = ask_qemu(folder, "query-status")
    assert isinstance(answer, dict)
    return str(answer["status"])
