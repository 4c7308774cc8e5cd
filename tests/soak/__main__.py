"""The program behind `make soak`: faults at random, for as long as it is told, by one seed.

At least 200 kills of the daemon under load, cuts of the host's power, 200 snapshots one a second
with deletes at random; then more of all, with other seeds, until the time is over. The seed of each
part is printed before it runs, and what came of it at the end, as the rows of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART_SECONDS = 4 * 3600


@dataclass(frozen=True, kw_only=True)
class Part:
    """One test, as often as is said."""

    what: str
    test: str
    variables: Mapping[str, str]

    def run(self, seed: int) -> bool:
        """Run it; whether nothing was lost."""
        command = [
            sys.executable, "-m", "pytest", self.test, "-q", "-s", "-x", "-p", "no:cacheprovider",
            f"--timeout={PART_SECONDS}",
        ]  # fmt: skip
        environment = os.environ | self.variables | {"STRATABOX_SOAK_SEED": str(seed)}
        return subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode == 0


KILLS = "tests/integration/test_random_kills.py"
CUTS = "tests/integration/test_power_cut.py"
FIRST = (
    Part(what="200 kills of the daemon", test=KILLS, variables={"STRATABOX_SOAK_KILLS": "200"}),
    Part(what="30 cuts of power", test=CUTS, variables={"STRATABOX_SOAK_CUTS": "30"}),
    Part(
        what="200 snapshots, one a second",
        test="tests/soak/test_depth.py",
        variables={"STRATABOX_SOAK_SNAPSHOTS": "200"},
    ),
    Part(
        what="1 GB into a guest and out of it",
        test="tests/integration/test_guest_files.py::test_a_hundred_megabytes_and_flat_memory",
        variables={"STRATABOX_SOAK_FILE_BYTES": "1000000000"},
    ),
    Part(
        what="guests whose agents and sshds lie",
        test="tests/integration/test_hostile_guest.py",
        variables={"STRATABOX_SOAK_LIES": "all"},
    ),
    Part(
        what="no room at any write",
        test="tests/integration/test_full_disk.py",
        variables={},
    ),
)
MORE = (
    Part(what="20 kills of the daemon", test=KILLS, variables={"STRATABOX_SOAK_KILLS": "20"}),
    Part(what="5 cuts of power", test=CUTS, variables={"STRATABOX_SOAK_CUTS": "5"}),
)


def parts(chance: random.Random, until: float) -> Iterator[Part]:
    """Those that must be, and others until it is time."""
    yield from FIRST
    while time.monotonic() < until:
        yield chance.choice(MORE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="at least so long")
    minutes: float = parser.parse_args().minutes
    seed = int(os.environ.get("STRATABOX_SOAK_SEED") or random.randrange(1 << 32))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    ).stdout.strip()  # fmt: skip
    chance = random.Random(seed)
    rows, failed = [], 0
    for number, part in enumerate(parts(chance, time.monotonic() + minutes * 60)):
        print(f"{part.what}: STRATABOX_SOAK_SEED={seed + number}", flush=True)
        begun = time.monotonic()
        good = part.run(seed + number)
        failed += not good
        took = time.monotonic() - begun
        rows.append(
            f"| {part.what} | {'none' if good else 'FAILED'} | {took:.0f} s | {seed + number} |"
        )
    print(f"\ncommit {commit}, seed {seed}\n| faults | losses | took | seed |\n|---|---|---|---|")
    print("\n".join(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
