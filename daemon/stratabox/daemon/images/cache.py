"""Keep what was built, so that it need not be built again.

```
CACHE/KEY/disk.qcow2  kernel  initrd  image.json     complete, never changed
CACHE/KEY.lock                                       held by whoever builds that key
CACHE/.KEY.XXXXXXXX/                                 being written; renamed to KEY when it is whole
```
KEY is a hash of the recipe, its arguments, and the source of this package with the files that it
puts into guests: a changed builder never finds what an older one made. What is kept stays until
somebody removes it; Debian's updates are not looked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from stratabox.daemon.images.artifact import BuiltImage, Progress

_PACKAGE = Path(__file__).parent
_META = "image.json"
_POLL_S = 0.2
_FICLONE = 0x40049409
"""The ioctl that shares one file's blocks with another."""


async def cached(
    cache: Path | None,
    work: Path,
    *,
    recipe: str,
    arguments: Mapping[str, object],
    build: Callable[[], Awaitable[BuiltImage]],
    progress: Progress,
) -> BuiltImage:
    """Copy a kept image into `work`, or build it there and keep a copy.

    Only one builder of a key builds at a time, also among several processes; the others wait and
    then find it. A cache that cannot be written to is no error: the image is built all the same.

    :param cache: Folder; None: build without one.
    :param arguments: All that the image depends on, as JSON can tell it.
    :param build: Builds into `work`; its errors pass through.
    """
    if cache is None:
        return await build()
    key = await asyncio.to_thread(key_of, recipe, arguments)
    lock = await asyncio.to_thread(_open_lock, cache, key)
    if lock is None:
        return await build()
    async with _held(lock):
        kept = cache / key
        if await asyncio.to_thread((kept / _META).exists):
            progress("Copying the image from the cache", None)
            return await asyncio.to_thread(_take, kept, work)
        built = await build()
        with contextlib.suppress(OSError):
            await asyncio.to_thread(_keep, built, kept)
        return built


def key_of(recipe: str, arguments: Mapping[str, object]) -> str:
    """Name of the folder that holds this image in a cache."""
    digest = hashlib.sha256(json.dumps([recipe, dict(arguments)], sort_keys=True).encode())
    for path in sorted(_PACKAGE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(_PACKAGE)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return f"{recipe}-{digest.hexdigest()[:24]}"


def _open_lock(cache: Path, key: str) -> int | None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return os.open(cache / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


@contextlib.asynccontextmanager
async def _held(lock: int) -> AsyncIterator[None]:
    """Hold a lock file; closes it in any case."""
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_POLL_S)
        yield
    finally:
        os.close(lock)


def _keep(built: BuiltImage, kept: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{kept.name}.", dir=kept.parent))
    try:
        meta: dict[str, str | None] = {
            "command_line": built.command_line,
            "origin": built.origin,
        }
        for part, path in _files(built).items():
            meta[part] = path.name if path else None
            if path:
                _copy(path, temporary / path.name)
        with (temporary / _META).open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(kept)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take(kept: Path, work: Path) -> BuiltImage:
    meta = json.loads((kept / _META).read_text())
    files: dict[str, Path | None] = {}
    for part in ("disk", "kernel", "initrd"):
        name = meta[part]
        files[part] = work / name if name else None
        if name:
            _copy(kept / name, work / name, durable=False)
    disk = files["disk"]
    assert disk is not None
    return BuiltImage(
        disk=disk,
        kernel=files["kernel"],
        initrd=files["initrd"],
        command_line=meta["command_line"],
        origin=meta["origin"],
    )


def _files(built: BuiltImage) -> dict[str, Path | None]:
    return {"disk": built.disk, "kernel": built.kernel, "initrd": built.initrd}


def _copy_bytes(read: BinaryIO, write: BinaryIO) -> None:
    left = os.fstat(read.fileno()).st_size
    try:
        while left > 0:
            copied = os.copy_file_range(read.fileno(), write.fileno(), min(left, 1 << 28))
            if copied == 0:
                break
            left -= copied
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # Not between these two file systems. Nothing was copied, or the first call had not failed.
        shutil.copyfileobj(read, write, 1 << 20)


def _copy(source: Path, target: Path, *, durable: bool = True) -> None:
    """Copy by reflink where the file system can, else within the kernel, else by hand."""
    with source.open("rb") as read, target.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            _copy_bytes(read, write)
        if durable:
            os.fsync(write.fileno())
