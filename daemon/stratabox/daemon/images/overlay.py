"""The files that we put into a guest, as one tar archive owned by root.

They lie under ``guest/`` as they lie in the guest. Scripts and programs become executable.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def pack(
    target: Path,
    trees: Sequence[Path],
    *,
    links: Mapping[str, str] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the archive.

    :param trees: Folders whose content goes to the guest's root.
    :param links: Symbolic links: path in the guest → what it points to.
    :param files: More files: path in the guest → content.
    """
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for tree in trees:
            for path in sorted(tree.rglob("*")):
                if path.is_file():
                    _add(archive, str(path.relative_to(tree)), path.read_bytes())
        for name, content in (files or {}).items():
            _add(archive, name, content)
        for name, points_to in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, points_to
            archive.addfile(entry)


def mode_of(content: bytes) -> int:
    """The mode of a file of ours in a guest."""
    return 0o755 if content.startswith((b"#!", b"\x7fELF")) else 0o644


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    entry.mode = mode_of(content)
    archive.addfile(entry, io.BytesIO(content))
