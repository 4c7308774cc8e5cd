"""A catalog and a store of one's own, and records to put into them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratabox.storage import failpoints
from stratabox.storage.catalog.database import Catalog
from stratabox.storage.files.layout import Layout
from stratabox.storage.files.store import Store
from support.records import Maker


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Layout(tmp_path / "state"))


@pytest.fixture
def catalog(store: Store) -> Iterator[Catalog]:
    catalog = Catalog(store.layout.catalog)
    yield catalog
    catalog.close()


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Set failpoints; none is left when the test has ended."""
    yield failpoints.arm
    failpoints.arm("")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was fsynced, in order; the fsyncs are done all the same."""
    names: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount an empty file system with that many KiB; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / f"small-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("cannot mount a small file system here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
