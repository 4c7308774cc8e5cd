"""How much of the host's memory may be taken for what only makes things faster."""

from __future__ import annotations

import re
from pathlib import Path

_FIELD = re.compile(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", re.MULTILINE)
_RESERVE = 8
"""One part of so many of the host's memory is left to guests and everybody else."""


def spare_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What is available above an eighth of the host's memory; negative when it is short.

    Of a file without these fields: nothing.
    """
    found = {name: int(size) * 1024 for name, size in _FIELD.findall(meminfo.read_text())}
    return found.get("MemAvailable", 0) - found.get("MemTotal", 0) // _RESERVE
