"""Which tests are run on KVM: each thing that the memory engine does, once.

By itself: `test_memory_engine.py`, all of it but what is there twice for the sake of small buffers.
Through the daemon: an instant that goes on, in a second generation too, and its reboot; clones; a
daemon that was killed.
"""

from __future__ import annotations

_ENGINE = "tests/integration/test_memory_engine.py"
_DAEMON = "tests/integration/test_memory.py"

TESTS = (
    "tests/kvm/inside/accelerator.py",
    "tests/kvm/inside/generation.py",
    _ENGINE,
    f"--deselect={_ENGINE}::test_all_of_ram_is_as_it_was[True-2097152]",
    f"--deselect={_ENGINE}::test_all_of_ram_is_as_it_was[False-2097152]",
    f"{_DAEMON}::test_a_restore_continues_the_instant",
    f"{_DAEMON}::test_clones_of_a_running_guest_go_on",
    f"{_DAEMON}::test_a_daemon_that_was_killed_goes_on_with_it",
)
"""Arguments of pytest."""
