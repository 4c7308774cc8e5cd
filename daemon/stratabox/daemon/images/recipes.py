"""The images that can be built, through the cache: what the rest of the daemon calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stratabox.daemon.images.artifact import BuiltImage, Progress
from stratabox.daemon.images.bootstrap import check_packages, check_release
from stratabox.daemon.images.cache import cached
from stratabox.daemon.images.debian import build_debian
from stratabox.daemon.images.tiny import build_tiny


async def debian(
    work: Path,
    *,
    cache_dir: Path | None,
    release: str = "bookworm",
    include: Sequence[str] = (),
    progress: Progress,
) -> BuiltImage:
    """Build or copy a Debian guest. Raises as `build_debian`."""
    check_release(release)
    packages = sorted(check_packages(include))

    async def build() -> BuiltImage:
        return await build_debian(work, release=release, include=packages, progress=progress)

    return await cached(
        cache_dir,
        work,
        recipe="debian",
        arguments={"release": release, "include": packages},
        build=build,
        progress=progress,
    )


async def tiny(work: Path, *, cache_dir: Path | None, progress: Progress) -> BuiltImage:
    """Build or copy the tiny guest. Raises as `build_tiny`."""

    async def build() -> BuiltImage:
        return await build_tiny(work, progress=progress)

    return await cached(
        cache_dir, work, recipe="tiny", arguments={}, build=build, progress=progress
    )
