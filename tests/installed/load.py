"""Clients at work on a host, and what became of each of their calls."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from stratabox.client import Client, Sandbox, StrataboxError
from support.rig import eventually


@dataclass
class Calls:
    """What has been answered, by kind of call; whoever is asked is asked on and on."""

    answered: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, StrataboxError]] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    """Ids of those that the daemon has said are taken."""

    def wait_more(self, each: int) -> None:
        """Wait until so many more calls of every kind have been answered."""
        before = Counter(self.answered)
        assert before
        eventually(
            lambda: all(self.answered[kind] >= before[kind] + each for kind in before),
            120,
            what=f"{before} became {self.answered}",
        )


@contextlib.contextmanager
def at_work(client: Client, boxes: tuple[Sandbox, Sandbox]) -> Iterator[Calls]:
    """Four threads call, until the context ends; the first error that is not typed is raised."""
    calls, over = Calls(), threading.Event()
    numbers = itertools.count()
    first, second = boxes

    def again(kind: str, call: Callable[[], object]) -> None:
        while not over.is_set():
            try:
                call()
            except StrataboxError as error:
                calls.broken.append((kind, error))
            else:
                calls.answered[kind] += 1

    def snapshot() -> None:
        calls.snapshots.append(first.snapshot(name=f"load-{next(numbers)}", quick=True).id)
        over.wait(0.5)

    def clone() -> None:
        second.clone(name=f"copy-{next(numbers)}").sandbox.delete()

    kinds: dict[str, Callable[[], object]] = {
        "list": lambda: client.sandboxes.list(),
        "exec": lambda: first.execute("true", timeout=60),
        "snapshot": snapshot,
        "clone": clone,
    }
    with ThreadPoolExecutor(len(kinds)) as pool:
        working = [pool.submit(again, kind, call) for kind, call in kinds.items()]
        try:
            eventually(lambda: all(calls.answered[kind] for kind in kinds), 60)
            yield calls
        finally:
            over.set()
        for each in working:
            each.result()
