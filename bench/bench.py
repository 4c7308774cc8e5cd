"""What every measurement is given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import product
from bench.floor import Floor
from bench.product import Product
from stratabox.daemon.hypervisor.qemu_host import QemuHost


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A folder, this host's QEMU, and how often to measure."""

    folder: Path
    host: QemuHost
    rounds: int
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def new_floor(self) -> Floor:
        """A floor in a folder of its own."""
        return Floor(self.host, self.folder / f"f{next(self._numbers)}")

    @contextmanager
    def new_product(self, settings: Mapping[str, str] | None = None) -> Iterator[Product]:
        """A daemon on a folder of its own, gone when the context ends."""
        with product.running(self.folder / f"p{next(self._numbers)}", settings) as made:
            yield made
