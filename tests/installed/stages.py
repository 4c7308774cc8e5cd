"""From what the checks start: instants of outer hosts, and containers' root folders."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from installed import outer
from installed.container import Container
from installed.outer import Outer
from stratabox.client import Client, Snapshot

SEED = "seed"
"""The snapshot that stocked containers have."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where outer hosts of their own start from."""

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


@dataclass(frozen=True)
class Root:
    """What containers' root folders consist of, the uppermost layer first."""

    layers: tuple[Path, ...]

    @contextlib.contextmanager
    def host(self, folder: Path, *, network: bool = False) -> Iterator[Container]:
        """Boot a container that begins with that.

        :param folder: for what it writes. It is left there.
        :param network: as for `Container`.
        """
        folder.mkdir()
        made = Container(self.layers, folder, network=network)
        try:
            made.boot()
            yield made
        finally:
            made.cut_power()

    def on_top(self, layer: Path) -> Root:
        """The same with what was written in a container that has ended."""
        return Root((layer, *self.layers))
