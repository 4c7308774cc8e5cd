"""What a guest was short of, read from what it says of itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stratabox.daemon.hypervisor.guest import wants


def test_a_kill_counts_that_fell_into_the_commands_time_and_hit_it_or_its_own() -> None:
    log = b"100.50 77\n120.25 80\n"
    assert wants.read(b"125.00\n" + log, 10.0, 80) == (True, False)
    assert wants.read(b"125.00\n" + log, 10.0, 81) == (False, False), "somebody older was killed"
    assert wants.read(b"125.00\n" + log, 3.0, 80) == (False, False), "before it began"
    assert wants.read(b"125.00\n", 10.0, 80) == (False, False)


def test_full_disks() -> None:
    assert wants.read(b"125.00\nfull\nfull\n", 1.0, 1) == (False, True)
    assert wants.read(b"125.00\n124.90 9\nfull\n", 1.0, 9) == (True, True)


@given(st.binary(max_size=100))
def test_nonsense_says_nothing_or_little(answer: bytes) -> None:
    memory, disk = wants.read(answer, 1.0, 1)
    assert {memory, disk} <= {True, False}
