"""The OpenAPI document is true: what it allows is taken, what it does not is refused, and every
answer is as it says. schemathesis tries, against a daemon and a guest of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support.rest import rest_daemon

HERE = Path(__file__).parent


def test_schemathesis_finds_no_violation(tmp_path: Path) -> None:
    # One guest has room, so that most creations end as 429; all else is tried on that one.
    limits = {"STRATABOX_ADMISSION_MEMORY": "200MiB", "STRATABOX_LIMITS_RATE": "0"}
    with rest_daemon(tmp_path, limits) as rest:
        box = rest("POST", "/v1/sandboxes", {"name": "0", "wait_for_ready": True})
        assert box.status == 201
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli",
                "--config-file", str(HERE / "schemathesis.toml"),
                "run", f"{rest.url}/v1/openapi.json",
                "--header", f"x-api-key: {rest.key}",
                "--checks", "all",
                # Not "fuzzing": for as many cases as it makes, it takes ten times as long.
                "--phases", "examples,coverage,stateful",
                "--seed", "6",
                "--continue-on-failure",
                "--generation-database", ":memory:",
                "--request-timeout", "300",
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
        tried = re.search(r"(\d+) generated", done.stdout)
        assert tried, done.stdout
        assert int(tried[1]) > 500
        assert re.search(r"Tested: 13\b", done.stdout), done.stdout
        assert rest("GET", "/v1/sandboxes/list").status == 200
