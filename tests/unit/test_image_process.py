"""What is told of a tool that has failed: a real one, whose words come by the hundred."""

from __future__ import annotations

import pytest

from stratabox.daemon.images import process
from stratabox.storage.model.errors import FailedError, NoSpaceError

DPKG = "dpkg: error processing package some (--configure):"


async def failure(script: str) -> FailedError | NoSpaceError:
    with pytest.raises((FailedError, NoSpaceError)) as raised:
        await process.run(["sh", "-c", f"{script}; exit 25"], what="installing")
    assert isinstance(raised.value, FailedError | NoSpaceError)
    return raised.value


async def test_the_first_trouble_is_told_and_what_stood_before_it() -> None:
    many = "seq -f 'Setting up lib%g ...' 100"
    error = await failure(f"{many}; echo the cause; echo '{DPKG}'; echo status 1; {many}")
    lines = error.message.splitlines()
    assert lines[0] == "installing: sh failed (exit code 25)."
    at = lines.index(DPKG)
    assert lines[at - 1 : at + 2] == ["the cause", DPKG, "status 1"]
    assert lines[-1] == "Setting up lib100 ..."
    assert len(lines) < 50


async def test_trouble_among_the_last_words_is_told_once() -> None:
    error = await failure(f"echo the cause; echo '{DPKG}'; seq 5")
    assert error.message.splitlines()[1:] == ["the cause", DPKG, "1", "2", "3", "4", "5"]


async def test_without_trouble_the_last_words_are_told() -> None:
    error = await failure("seq 100")
    assert error.message.splitlines()[1:] == [str(number) for number in range(71, 101)]


async def test_a_full_disk_is_heard_of_wherever_it_is_told() -> None:
    error = await failure("echo 'cp: error writing x: No space left on device'; seq 100")
    assert error.reason == "NO_SPACE"
