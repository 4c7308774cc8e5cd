"""A libvirtd of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bench import libvirtd
from bench.libvirtd import Libvirtd

__all__ = ["Libvirtd", "private_libvirtd"]


@contextmanager
def private_libvirtd() -> Iterator[Libvirtd]:
    """One that runs, gone at the end; a test is skipped where there can be none."""
    if why := libvirtd.absent():
        pytest.skip(why)
    with libvirtd.running() as running:
        yield running
