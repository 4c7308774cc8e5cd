"""What systemd itself says of the units."""

from __future__ import annotations

import json

from installed.host import DAEMON
from installed.outer import Outer

_MOST = 3.0


def test_units_are_verified(fresh: Outer) -> None:
    units = f"{DAEMON} strataboxd.socket stratabox.slice"
    said = fresh.sh(f"systemd-analyze verify --man=no {units}")
    assert [line for line in said.splitlines() if "stratabox" in line] == []
    fresh.sh("mkdir /run/for-verify")
    said = fresh.sh(
        f"XDG_RUNTIME_DIR=/run/for-verify systemd-analyze verify --user --man=no {units}"
    )
    assert [line for line in said.splitlines() if "stratabox" in line] == []


def test_the_exposure_of_the_loaded_unit(fresh: Outer) -> None:
    said = fresh.sh(f"systemd-analyze security --no-pager {DAEMON}")
    overall = next(line for line in said.splitlines() if "Overall exposure level" in line)
    level = float(overall.split(":")[1].split()[0])
    print(overall.strip())
    assert level <= _MOST
    rows = json.loads(fresh.sh(f"systemd-analyze security --no-pager --json=short {DAEMON}"))
    assert len(rows) > 50
