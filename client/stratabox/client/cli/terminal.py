"""The user's own terminal, given to a guest for a while and always given back."""

from __future__ import annotations

import os
import shutil
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def raw(descriptor: int) -> Iterator[bool]:
    """Hand every key over as it is typed, ^C too, and give the terminal back as it was.

    Yields whether there is a terminal; where there is none nothing is done.
    """
    if descriptor < 0 or not os.isatty(descriptor):
        yield False
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield True
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def size() -> tuple[int, int]:
    """Return columns and rows, as they are now.

    COLUMNS and LINES count only where there is no terminal: whoever has set them, such as a shell
    or readline in a parent, has set them to what was then.
    """
    for descriptor in range(3):
        with suppress(OSError):
            found = os.get_terminal_size(descriptor)
            if found.columns and found.lines:
                return found.columns, found.lines
    found = shutil.get_terminal_size()
    return found.columns, found.lines


def write(data: bytes) -> None:
    """Print bytes as they are, now."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
