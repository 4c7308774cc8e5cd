"""The outer guest's second disk: what changes from one run to the next.

```
run  arguments            the program, and pytest's arguments, one in each line
site/stratabox/…          this tree's storage, daemon, client and proto, as installed
site/sitecustomize.py     sees to it that nothing runs on TCG
tests/  pyproject.toml    the tests
bench/                    which has what starts their libvirtd
cache/stratabox/tiny-…/   the tiny image, so that nothing needs to be built in there
```
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from stratabox.daemon.images import process
from stratabox.daemon.images.disk import EXT4
from support.images import add_tiny

_ROOT = Path(__file__).resolve().parents[2]
_INSIDE = Path(__file__).with_name("inside")
_SIZE = "1G"


async def make_payload(work: Path, arguments: Sequence[str]) -> Path:
    """Make the disk in the empty folder `work`.

    Raises as `stratabox.daemon.images.tiny.build_tiny`.
    """
    tree, disk = work / "payload", work / "payload.raw"
    for root in ("storage", "daemon", "client", "proto"):
        _copy(_ROOT / root / "stratabox", tree / "site" / "stratabox")
    for root in ("tests", "bench"):
        _copy(_ROOT / root, tree / root)
    shutil.copy2(_ROOT / "pyproject.toml", tree)
    shutil.copy2(_INSIDE / "run", tree)
    shutil.copy2(_INSIDE / "sitecustomize.py", tree / "site")
    # Only that: the version is asked for.
    installed = metadata.distribution("stratabox")
    info = tree / "site" / f"stratabox-{installed.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(installed.read_text("METADATA") or "", encoding="utf-8")
    (tree / "arguments").write_text("".join(f"{each}\n" for each in arguments))
    await add_tiny(tree / "cache" / "stratabox")
    await process.run(
        ["mke2fs", *EXT4, "-d", str(tree), str(disk), _SIZE], what="Making the payload's disk"
    )
    return disk


def _copy(source: Path, target: Path) -> None:
    """Copy a tree, with its times: Python compares them; what is there already stays."""
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)
