"""From what the checks start: instants of outer hosts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from installed import outer
from installed.outer import Outer
from stratabox.client import Client, Snapshot


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where hosts of their own start from."""

    client: Client
    snapshot: Snapshot
    folder: Path

    @contextlib.contextmanager
    def host(self) -> Iterator[Outer]:
        made = outer.again(self.client, self.snapshot, self.folder)
        try:
            yield made
        finally:
            made.box.delete()
