"""Readiness probes: what must pass before a sandbox counts as ready."""

from __future__ import annotations

from dataclasses import dataclass

INTERVAL = 1.0
TIMEOUT = 10.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One check, and its times in seconds. Of `argv` and `port` at most one is given.

    Without either it checks nothing: in requests that stands for "none, whatever was before".
    """

    argv: tuple[str, ...] = ()
    """A command in the guest that must exit with 0."""
    port: int = 0
    """A TCP port in the guest that something must listen on; 0: none."""
    path: str = ""
    """What a server on that port is asked for by GET, and must answer with 200 to 399; "": it is
    not asked."""
    interval: float = INTERVAL
    """From one try to the next."""
    timeout: float = TIMEOUT
    """For one try."""
    start_period: float | None = None
    """How long it may fail, from the agent's first answer, until whoever waits is told; None: as
    long as they wait."""

    @property
    def checks(self) -> bool:
        """It checks something."""
        return bool(self.argv or self.port)

    def __str__(self) -> str:
        """What it checks, for people."""
        if self.argv:
            return f"command {' '.join(self.argv)[:100]!r}"
        return f"HTTP GET :{self.port}{self.path}" if self.path else f"TCP port {self.port}"


def chosen(wanted: Probe | None, inherited: Probe | None) -> Probe | None:
    """The probe that rules: the wanted one, or none by its wish, or else the inherited one."""
    if wanted is None:
        return inherited
    return wanted if wanted.checks else None
