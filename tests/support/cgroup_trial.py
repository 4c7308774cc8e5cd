"""Run as root in a guest with systemd: tries what limits there are there, and holds processes to.

    python3 cgroup_trial.py KEY=VALUE...    the configuration

Prints what was found and what became of each process, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stratabox.daemon.config import load
from stratabox.daemon.hypervisor import cgroup
from stratabox.daemon.hypervisor.housing import House, Housing
from stratabox.daemon.hypervisor.limits import GroupLimits, IoLimits
from stratabox.daemon.service import housing
from stratabox.storage.model.ids import SandboxId, mint

LIMITS = GroupLimits(memory=64 << 20, cpu=20, pids=8, io=IoLimits(write_bandwidth=7 << 20))
HOG = "input(); b'x' * (400 << 20); print('lives')"
SPIN = "import select, sys; input()\nwhile not select.select([sys.stdin], [], [], 0)[0]: pass"
SWARM = """
import threading
input()
done = threading.Event()
count = 0
try:
    for count in range(100):
        threading.Thread(target=done.wait).start()
except RuntimeError:
    pass
done.set()
print(count)
"""


async def put(house: House, code: str) -> tuple[Process, Path]:
    """A process in a group of its own, which begins when it is told."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdin=PIPE, stdout=PIPE
    )
    await house.put("guest", SandboxId(mint()), child.pid, LIMITS)
    group = cgroup.group_of(child.pid)
    assert group is not None
    assert child.stdin is not None
    child.stdin.write(b"\n")
    return child, group


def wait_for(fact: Callable[[], bool]) -> bool:
    """What the kernel does not tell of."""
    for _ in range(3000):
        if fact():
            return True
        time.sleep(0.02)
    return False


def throttled(group: Path) -> bool:
    rows = dict(row.split() for row in (group / "cpu.stat").read_text().splitlines())
    return int(rows["nr_throttled"]) >= 3


async def trials(found: Housing) -> dict[str, object]:
    assert found.house is not None
    keeping = asyncio.create_task(found.keep())
    hog, first = await put(found.house, HOG)
    swarm, second = await put(found.house, SWARM)
    spin, third = await put(found.house, SPIN)
    names = ("memory.max", "cpu.max", "pids.max", "io.max")
    told = {name: (third / name).read_text().split() for name in names}
    said, _ = await hog.communicate()
    count, _ = await swarm.communicate()
    slowed = await asyncio.to_thread(wait_for, partial(throttled, third))
    await spin.communicate(b"\n")
    groups = (first, second, third)
    gone = await asyncio.to_thread(wait_for, lambda: not any(each.exists() for each in groups))
    keeping.cancel()
    await asyncio.wait((keeping,))
    return {
        "told": told,
        "hog": [hog.returncode, said.decode()],
        "threads": int(count),
        "throttled": slowed,
        "gone": gone,
        "place": str(third.parent),
    }


async def main() -> None:
    found = await housing.choose(load(sys.argv[1:], {"HOME": "/root"}), os.environ, "store")
    answer: dict[str, object] = {
        "by": found.by,
        "held": sorted(found.held),
        "why": found.why,
    }
    if found.house is not None:
        answer |= await trials(found)
    print(json.dumps(answer))


asyncio.run(main())
