"""Imported by every Python in the outer guest: no guest may be started on TCG there unnoticed.

Where the probe of KVM fails the product goes on with TCG, as it should; a test of it would pass,
and show nothing.
"""

from __future__ import annotations

import os
import sys


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event == "subprocess.Popen":
        _, words, *_ = arguments
        assert isinstance(words, list)
        if "tcg" in map(os.fsdecode, words):
            raise RuntimeError("QEMU was to be started with TCG, where all must run on KVM")


sys.addaudithook(_refuse)
