"""A package that was just installed: its units, its socket, who may call."""

from __future__ import annotations

import json

from installed.host import DAEMON, SYSTEM_API
from installed.outer import Outer
from installed.package import Package

_SLOW_START = 25
"""Seconds."""


def test_all_of_it_is_installed_and_runs(fresh: Outer, package: Package) -> None:
    for unit in (DAEMON, "strataboxd.socket"):
        assert fresh.sh(f"systemctl is-enabled {unit}") == "enabled"
        assert fresh.show(unit, "ActiveState") == "active"
    assert fresh.show(DAEMON, "Type") == "notify"
    assert fresh.show(DAEMON, "NRestarts") == "0"
    assert fresh.run("systemctl is-system-running")[1] == "running"
    assert fresh.sh("dpkg --audit; dpkg --verify stratabox") == ""
    with fresh.client() as client:
        told = client.host()
        assert told.version == package.version
        assert told.pid == fresh.daemon_pid()
    assert fresh.sh("strataboxd --version") == f"strataboxd {package.version}"


def test_it_is_ready_only_when_it_answers(fresh: Outer) -> None:
    """`Type=notify`: systemctl start returns, and there is an answer; before, there is no READY."""
    fresh.sh(f"systemctl stop {DAEMON}")
    # The gRPC server's own socket is there by then.
    fresh.sh(f"systemctl start {DAEMON} && test -S /run/stratabox/.api.sock")
    assert fresh.show(DAEMON, "ActiveState") == "active"
    notified = int(fresh.show(DAEMON, "ActiveEnterTimestampMonotonic"))
    started = int(fresh.show(DAEMON, "ExecMainStartTimestampMonotonic"))
    # A program that is merely forked is there after milliseconds.
    assert notified - started > 100_000
    print(f"ready {(notified - started) / 1e6:.1f} s after its start")


def test_folders_and_sockets_are_whose_they_should_be(fresh: Outer) -> None:
    said = fresh.sh(
        "stat -c '%a %U %G %n' /run/stratabox /run/stratabox/api.sock /run/stratabox/.api.sock"
        " /var/lib/stratabox /etc/stratabox /etc/stratabox/config.toml"
    )
    assert said.splitlines() == [
        "755 root root /run/stratabox",
        "660 root stratabox /run/stratabox/api.sock",
        "600 root root /run/stratabox/.api.sock",
        "700 root root /var/lib/stratabox",
        "755 root root /etc/stratabox",
        "644 root root /etc/stratabox/config.toml",
    ]


def test_the_first_call_starts_a_stopped_daemon(fresh: Outer) -> None:
    """And waits for it, however long it takes: by itself gRPC gives up after 20 s."""
    before = fresh.daemon_pid()
    fresh.sh(f"systemctl stop {DAEMON}")
    assert fresh.daemon_pid() == 0
    fresh.sh(
        f"mkdir /run/systemd/system/{DAEMON}.d"
        f" && printf '[Service]\nExecStartPre=/bin/sleep {_SLOW_START}\n'"
        f" >/run/systemd/system/{DAEMON}.d/slow.conf && systemctl daemon-reload"
    )
    with fresh.client() as client:
        assert client.host().pid == fresh.daemon_pid() != before


def test_members_of_the_group_may_call_and_nobody_else(fresh: Outer) -> None:
    fresh.sh("useradd --create-home --groups stratabox member; useradd --create-home outsider")
    line = f"stratabox --address unix://{SYSTEM_API} sandbox list --json"
    assert json.loads(fresh.sh(f"runuser -u member -- {line}"))["sandboxes"] == []
    code, said = fresh.run(f"runuser -u outsider -- {line}")
    assert code != 0
    assert SYSTEM_API in said
    # Not by the socket behind it either, not even for the group.
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    for user in ("member", "outsider"):
        code, said = fresh.run(
            f"runuser -u {user} -- python3 -c '{connect}' /run/stratabox/.api.sock"
        )
        assert code != 0
        assert "PermissionError" in said
