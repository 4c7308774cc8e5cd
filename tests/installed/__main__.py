"""The program behind `make test-systemd`: builds the package, and runs the checks on it.

Its exit code is pytest's; all arguments are pytest's: names of files, or -k WORDS.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

import pytest

from installed import package

_CHECKS = Path(__file__).with_name("checks")
ORDER = (
    *("housing", "reboots", "removing", "upgrades", "users", "building"),
    *("installing", "faults", "exposure", "limits", "launcher"),
)
"""The checks' files."""
_TEST_SECONDS = 3600
"""For one check, with all that stands before it; on two cores none takes five minutes."""


def main() -> int:
    signal.signal(signal.SIGTERM, _end)
    if os.geteuid() != 0:
        print("test-systemd: containers are root's: run it as root", file=sys.stderr)
        return 1
    if shutil.which("systemd-nspawn") is None:
        print("test-systemd: apt install systemd-container", file=sys.stderr)
        return 1
    folder = os.environ.get("TMPDIR", "/var/tmp")  # /tmp may be memory
    with tempfile.TemporaryDirectory(prefix="sbx-installed-", dir=folder) as name:
        print("the package", flush=True)
        try:
            built = package.build(Path(name))
        except subprocess.CalledProcessError as error:
            print(f"test-systemd: {error}", file=sys.stderr)
            return 1
        arguments = sys.argv[1:]
        if not any(each.partition("::")[0].endswith(".py") for each in arguments):
            arguments = [*(str(_CHECKS / f"{each}.py") for each in ORDER), *arguments]
        os.environ["STRATABOX_INSTALLED"] = f"{built.file}:{built.version}"
        return pytest.main(
            [
                *("-v", "-rA", "--tb=short", "-p", "no:cacheprovider"),
                *(f"--timeout={_TEST_SECONDS}", "--durations=0", "--durations-min=1"),
                f"--basetemp={name}/pytest",
                *arguments,
            ]
        )


def _end(number: int, frame: FrameType | None) -> None:
    """Leave as by Ctrl-C, so that all is tidied up."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
