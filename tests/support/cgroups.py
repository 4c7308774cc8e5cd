"""A folder in a hierarchy of control groups of version 2, for tests of groups that are real."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor import cgroup
from stratabox.storage.model.ids import mint


@contextmanager
def a_folder() -> Iterator[Path]:
    """One of this test's own, removed with what is left in it; the test is skipped without.

    Controllers may all be in hierarchies of version 1.
    """
    points = cgroup.hierarchies()
    if not points or not os.access(points[0], os.W_OK):
        pytest.skip("no hierarchy of control groups of version 2 that may be written to")
    made = points[0] / f"stratabox-test-{mint()}"  # a pid can be another container's, too
    made.mkdir()
    try:
        yield made
    finally:
        for each in (*made.glob("*/*/"), *made.glob("*/"), made):
            with contextlib.suppress(FileNotFoundError):
                each.rmdir()
