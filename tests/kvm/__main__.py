"""The program behind `make test-kvm`: its exit code is pytest's in the outer guest."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from kvm.image import PYTHONS, outer_image
from kvm.outer import OuterGuestError, run
from kvm.payload import make_payload
from kvm.selection import TESTS
from stratabox.storage.model.errors import StrataboxError

_SECONDS = 3600.0
_TEST_SECONDS = 900
"""For one test; on a quick machine none takes a minute."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-kvm", description=__doc__)
    parser.add_argument("--release", choices=sorted(PYTHONS), default="trixie")
    parser.epilog = "All other arguments are pytest's, for other tests than ours."
    chosen, tests = parser.parse_known_args()
    signal.signal(signal.SIGTERM, _end)
    folder = os.environ.get("TMPDIR", "/var/tmp")  # /tmp may be memory
    with tempfile.TemporaryDirectory(prefix="stratabox-kvm-", dir=folder) as name:
        try:
            return _run(chosen.release, tests, Path(name))
        except (StrataboxError, OuterGuestError) as error:
            print(f"test-kvm: {error}", file=sys.stderr)
            return 1


def _run(release: str, tests: list[str], work: Path) -> int:
    begun = time.monotonic()

    def tell(step: str, fraction: float | None = None) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {step}", flush=True)

    folders = [work / name for name in ("image", "payload", "guest")]
    for folder in folders:
        folder.mkdir()
    image = asyncio.run(outer_image(release, folders[0], tell))
    arguments = [
        *("-v", "-p", "no:cacheprovider", "--durations=0", "--durations-min=1"),
        *(f"--timeout={_TEST_SECONDS}", "--basetemp=/var/tmp/pytest"),
        *(tests or TESTS),
    ]
    payload = asyncio.run(make_payload(folders[1], arguments))
    tell("Starting the outer guest")
    code = run(image, payload, folders[2], _SECONDS, _show)
    tell("Passed" if code == 0 else f"Failed: pytest ended with {code}")
    return code


def _show(piece: bytes) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _end(number: int, frame: FrameType | None) -> None:
    """Leave as by an exception, so that all is tidied up."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
