"""Runs that alternate, so that what disturbs the host disturbs both sides alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Samples = dict[str, list[float]]


def alternate(
    count: int, sides: Mapping[str, Callable[[], Mapping[str, float]]], *, warm_up: int = 1
) -> Samples:
    """Run every side in turn, `count` times: what each told, by ``side.figure``.

    :param warm_up: so many rounds beforehand are not counted.
    """
    samples: Samples = {}
    for number in range(-warm_up, count):
        for side, run in sides.items():
            told = run()
            if number >= 0:
                for key, value in told.items():
                    samples.setdefault(f"{side}.{key}", []).append(value)
    return samples


def medians(samples: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {key: statistics.median(values) for key, values in samples.items()}


class Stopwatch:
    """Milliseconds since it was made."""

    def __init__(self) -> None:
        self._begun = time.monotonic()

    @property
    def ms(self) -> float:
        """So many by now."""
        return (time.monotonic() - self._begun) * 1e3


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say on stderr what is being measured, and how long that took."""
    begun = time.monotonic()
    print(f"… {what}", file=sys.stderr, flush=True)
    yield
    print(f"  {what}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
