"""An empty qcow2 of ours is what qemu-img makes of the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stratabox.storage.qcow2 import empty, header, qemu_img

GIB = 1 << 30


def told(*command: str | Path) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout) if done.stdout.startswith(("{", "[")) else done.stdout


def info(path: Path) -> dict[str, Any]:
    found = told("qemu-img", "info", "-U", "--output=json", path)
    for key in ("filename", "actual-size", "children"):
        found.pop(key, None)
    return dict(found)


@pytest.mark.parametrize("size", [512, GIB, GIB + 512, 3 * GIB - 1, 1 << 40, 64 << 40])
@pytest.mark.parametrize("backing", [None, "base.qcow2"])
def test_it_is_what_qemu_img_would_make(tmp_path: Path, size: int, backing: str | None) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    empty.create(tmp_path / "base.qcow2", 512, None)  # the check looks for it
    empty.create(ours, size, backing)
    options = ["-u", "-F", "qcow2", "-b", backing] if backing else []
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", *options, theirs, str(size)], check=True
    )
    assert info(ours) == info(theirs)
    mine = header.parse(ours.read_bytes()[: header.HEAD_BYTES])
    other = header.parse(theirs.read_bytes()[: header.HEAD_BYTES])
    assert (mine.l1_entries, mine.l1_offset) == (other.l1_entries, other.l1_offset)
    assert mine.backing_file == (backing.encode() if backing else None)
    found = qemu_img.check(ours)
    assert (found.clean, found.leaked_clusters) == (True, 0)
    assert qemu_img.virtual_size(ours) == -(-size // 512) * 512
    assert ours.stat().st_mode & 0o777 == 0o600
    assert ours.stat().st_blocks * 512 <= 64 << 10


def test_it_takes_writes_and_reads_through(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    empty.create(base, GIB, None)
    told("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", base)
    empty.create(overlay, 2 * GIB, "base.qcow2")
    last = 2 * GIB - 4096
    told("qemu-io", "-f", "qcow2", "-c", f"write -P 9 {last} 4096", overlay)
    for command in ("read -P 7 0 1M", "read -P 0 1M 1M", f"read -P 9 {last} 4096"):
        assert "failed" not in told("qemu-io", "-f", "qcow2", "-c", command, overlay)
    assert qemu_img.check(overlay).clean


def test_nothing_is_overwritten_and_no_name_leads_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "layer.qcow2"
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        empty.create(path, GIB, None)
    assert path.read_text() == "precious"
    for name in ("/etc/shadow", "nbd:localhost"):
        with pytest.raises(ValueError, match="plain relative name"):
            empty.create(tmp_path / "other.qcow2", GIB, name)
