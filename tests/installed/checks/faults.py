"""What ends the daemon without being asked to: systemd starts it anew."""

from __future__ import annotations

from installed.host import DAEMON
from installed.outer import Outer
from support.rig import eventually

_WATCHDOG_SECONDS = 60


def _is_started_anew(host: Outer, daemon: int) -> None:
    """Another daemon answers, of systemd's own accord."""
    eventually(
        lambda: (
            host.daemon_pid() not in (0, daemon) and host.show(DAEMON, "ActiveState") == "active"
        ),
        300,
        what="no other daemon is ready",
    )
    with host.client() as client:
        assert client.host().pid == host.daemon_pid()
    assert host.show(DAEMON, "NRestarts") == "1"


def test_a_daemon_that_is_killed(fresh: Outer) -> None:
    daemon = fresh.daemon_pid()
    fresh.sh(f"systemctl kill --kill-whom=main --signal=KILL {DAEMON}")
    _is_started_anew(fresh, daemon)


def test_a_daemon_that_stands_still(fresh: Outer) -> None:
    """By the watchdog."""
    assert fresh.show(DAEMON, "WatchdogUSec") == "1min"
    daemon = fresh.daemon_pid()
    fresh.sh(f"kill -STOP {daemon}")
    eventually(lambda: fresh.daemon_pid() != daemon, 3 * _WATCHDOG_SECONDS, what="no watchdog came")
    _is_started_anew(fresh, daemon)
    said = fresh.sh(f"journalctl --no-pager -o cat -u {DAEMON}")
    assert "Watchdog timeout" in said
    assert "Failed with result 'watchdog'" in said
