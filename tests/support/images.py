"""The tiny image in a build cache of one's own."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from stratabox.daemon.images.artifact import no_progress
from stratabox.daemon.images.cache import cached, key_of
from stratabox.daemon.images.tiny import build_tiny
from support.daemon import CACHE


async def add_tiny(cache: Path) -> None:
    """Copy the tiny image that this source builds into the folder `cache`; build it if need be.

    Raises as `stratabox.daemon.images.tiny.build_tiny`.
    """
    with tempfile.TemporaryDirectory(prefix="stratabox-") as work:
        await cached(
            CACHE,
            Path(work),
            recipe="tiny",
            arguments={},
            build=lambda: build_tiny(Path(work), progress=no_progress),
            progress=no_progress,
        )
    key = key_of("tiny", {})
    shutil.copytree(CACHE / key, cache / key)
