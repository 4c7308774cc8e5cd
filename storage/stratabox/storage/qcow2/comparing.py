"""Compare a rewritten layer with what it was made of: by qemu-img, which knows nothing of us.

What is compared holds on any base: both are read without the one that they stand on, so all that
they hold is the same, and they let the base through at the same places (``qemu-img map`` tells a
hole from zeros). Only the layers' own data is read, not what is below.

All is opened by descriptors that are handed over, and chains are spelled out: no name in a header
is followed, and a file that is unlinked meanwhile is compared to its end.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stratabox.storage.model.errors import CorruptError
from stratabox.storage.qcow2 import qemu_img

_LOOK_SECONDS = 0.2
"""How often a comparison under way is asked whether it is to go on."""
_DIFFERENT = 1


def compare(new: Path, old: Sequence[Path], go_on: Callable[[], bool], *, on_base: bool) -> bool:
    """Make sure that `new` is a sound file that holds what the `old` ones do together.

    :param old: the topmost first.
    :param go_on: asked before each step and again and again in it; once it says no, the
        comparison is given up.
    :param on_base: they stand on something, so that holes and zeros differ.
    :return: False when it was given up.
    :raise CorruptError: LAYER_CORRUPT, when they differ or `new` is not sound.
    :raise FailedError: QEMU_IMG_FAILED.
    :raise DeniedError: TOOL_MISSING.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(path)) for path in (new, *old)]
        mine, theirs = _spelled(opened[:1]), _spelled(opened[1:])
        for arguments in (
            ["check", "-q", mine],
            ["compare", "-q", mine, theirs],
        ):
            done = _run(arguments, opened, go_on)
            if done is None:
                return False
            if done.returncode:
                _refuse(done, new, arguments[0])
        if not on_base:
            return True
        maps = []
        for spelled in (mine, theirs):
            done = _run(["map", "--output=json", spelled], opened, go_on)
            if done is None:
                return False
            if done.returncode:
                raise qemu_img.failure(done, what="map")
            maps.append(list(_holes(json.loads(done.stdout))))
        if maps[0] != maps[1]:
            raise CorruptError(
                f"{new.name} lets its base through where what it was made of does not",
                reason="LAYER_CORRUPT",
            )
        return True


def _refuse(done: subprocess.CompletedProcess[bytes], new: Path, what: str) -> None:
    """:raise CorruptError: LAYER_CORRUPT; FailedError: QEMU_IMG_FAILED."""
    if what == "check" or done.returncode == _DIFFERENT:
        words = (done.stdout + done.stderr).decode(errors="replace").strip()[-500:]
        raise CorruptError(
            f"{new.name} is not what it was made of ({what}: {words or 'they differ'})",
            reason="LAYER_CORRUPT",
        )
    raise qemu_img.failure(done, what=what)


def _holes(extents: Sequence[dict[str, object]]) -> Iterator[tuple[object, object]]:
    """Where the base shows through: (begin, end), joined."""
    begin: object = None
    for extent in extents:
        if extent["present"]:
            if begin is not None:
                yield begin, extent["start"]
            begin = None
        elif begin is None:
            begin = extent["start"]
    if begin is not None:
        yield begin, None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _spelled(descriptors: Sequence[int]) -> str:
    """A chain as qemu-img takes it instead of a file's name; on nothing."""
    node: dict[str, object] | None = None
    for descriptor in reversed(descriptors):
        file = {
            "driver": "file",
            "filename": f"/proc/self/fd/{descriptor}",
            "locking": "off",
        }
        node = {"driver": "qcow2", "file": file, "backing": node}
    return "json:" + json.dumps(node)


def _run(
    arguments: Sequence[str], descriptors: Sequence[int], go_on: Callable[[], bool]
) -> subprocess.CompletedProcess[bytes] | None:
    if not go_on():
        return None
    try:
        process = subprocess.Popen(
            [qemu_img.TOOL, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise qemu_img.missing_tool() from None
    with process:
        while True:
            try:
                output, errors = process.communicate(timeout=_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                if go_on():
                    continue
                process.kill()
                return None
            return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
