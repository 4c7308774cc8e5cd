"""A host that slept: its clock has jumped, and the guests' clocks are set."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from stratabox.client import AsyncClient, AsyncSandbox
from stratabox.daemon import config
from stratabox.daemon.app import running
from stratabox.daemon.lifecycle.upkeep import clockwatch
from support.daemon import CACHE

HOUR = 3600


async def behind(sandbox: AsyncSandbox) -> float:
    """Seconds that a guest's clock is behind the host's, at least; negative: ahead."""
    before = time.time()
    result = await sandbox.execute("date +%s", timeout=60)
    told, after = float(result.stdout), time.time()
    # It was asked some time in between.
    return max(before - told, 0.0) if told <= after else after - told


async def test_a_jump_sets_the_clocks_of_the_guests_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = 0.0
    monkeypatch.setattr(clockwatch, "real_over_monotonic", lambda: offset)
    address = f"unix://{tmp_path}/api.sock"
    settings = config.load(
        [],
        {
            "STRATABOX_STATE_DIR": str(tmp_path / "state"),
            "STRATABOX_ADDRESS": address,
            "STRATABOX_BUILD_CACHE": str(CACHE),
        },
    )
    async with running(settings), AsyncClient(address) as client:
        await client.images.build_tiny()
        async with await client.sandboxes.create(image="tiny", memory=128) as sandbox:
            # What the sleep of a host looks like from inside: an hour is missing.
            await sandbox.execute(f"date -s @$(( $(date +%s) - {HOUR} ))", timeout=60)
            assert await behind(sandbox) > HOUR - 60
            offset += HOUR
            deadline = time.monotonic() + 120
            while await behind(sandbox) > 60:
                assert time.monotonic() < deadline
            assert abs(await behind(sandbox)) < 2  # its date has no fractions
