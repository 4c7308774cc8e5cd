"""This host's git in a guest that has none: the program, what it loads, and what calls it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from support.data_plane import DataPlane

_FOLDER = "/opt/git"
_CALLS = {
    "git": f'exec {_FOLDER}/ld.so --library-path {_FOLDER} {_FOLDER}/git "$@"',
    "git-upload-pack": 'exec git upload-pack "$@"',
}


def put_git(plane: DataPlane) -> None:
    """Put it there."""
    program = shutil.which("git")
    assert program, "git is needed on this host"
    told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    loaded = re.findall(r"(?:=> |^\s*)(/\S+) \(", told, re.MULTILINE)
    for folder in (_FOLDER, "/usr/share/git-core/templates"):
        plane.file("Mkdir", path=folder, recursive=True)
    for path in (program, *loaded):
        name = "ld.so" if "ld-linux" in path else Path(path).name
        plane.file("WriteFile", path=f"{_FOLDER}/{name}", content=Path(path).read_bytes())
    for name, line in _CALLS.items():
        content = f"#!/bin/sh\n{line}\n".encode()
        plane.file("WriteFile", path=f"/usr/local/bin/{name}", content=content)
    plane.sh(f"chmod 755 {_FOLDER}/* /usr/local/bin/git*", privileged=True)
