"""Where the processes of guests live: each in a control group of its own, or with the daemon.

`service.housing` finds out at the daemon's start what can be had here, and makes the one `Housing`
that there is; launchers and networks put into it what they start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from stratabox.daemon.hypervisor.host_room import look
from stratabox.daemon.hypervisor.limits import Allowance, Controller, GroupLimits
from stratabox.daemon.hypervisor.machine import DomainSpec
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId

log = logging.getLogger(__name__)


class HouseError(Exception):
    """A process cannot be put into a group of its own, and why."""


class House(Protocol):
    """Makes control groups."""

    async def put(
        self, kind: str, sandbox: SandboxId, pid: int, limits: GroupLimits | None
    ) -> None:
        """Have a process run in a group of its own, which goes with it.

        :param kind: what it is of its sandbox: "guest", "network".
        :raise HouseError: when it cannot be; then it stays where it is.
        """

    async def keep(self) -> None:
        """Remove what becomes empty, until cancelled; and `close`."""

    def close(self) -> None:
        """Let go of everything; what lives in there lives on."""


@dataclass(frozen=True, kw_only=True)
class Housing:
    """What there is for the guests of this daemon."""

    house: House | None = None
    by: str = ""
    """Whose groups: "systemd", or the folder that they are in; empty: there are none."""
    held: frozenset[Controller] = frozenset()
    """What they limit."""
    why: str = ""
    """Why not more; empty: there is all that the configuration asks for."""
    allowance: Allowance | None = None
    """None: no limits are wanted."""
    required: bool = False
    """A guest that cannot be put into a group does not start."""

    async def guest(self, spec: DomainSpec, pid: int) -> None:
        """Put a QEMU into its group. :raise FailedError: CGROUP_FAILED, where that must be."""
        limits = None
        if self.allowance is not None:
            limits = self.allowance.guest(
                cpus=spec.cpus,
                memory=spec.memory,
                accelerator=spec.machine.accelerator,
                host_memory=look().total,
            )
        await self._put("guest", spec.sandbox, pid, limits)

    async def network(self, sandbox: SandboxId, pid: int) -> None:
        """Put a network's helper into its group; where it cannot be is logged and no error."""
        limits = None if self.allowance is None else self.allowance.network()
        await self._put("network", sandbox, pid, limits)

    async def keep(self) -> None:
        """Look after the groups until cancelled."""
        if self.house is not None:
            await self.house.keep()

    async def _put(
        self, kind: str, sandbox: SandboxId, pid: int, limits: GroupLimits | None
    ) -> None:
        if self.house is None:
            return
        try:
            await self.house.put(kind, sandbox, pid, limits)
        except HouseError as error:
            if self.required and kind == "guest":
                raise FailedError(
                    f"QEMU cannot be put into a control group ({error}), which cgroups.limits ="
                    ' "required" asks for.',
                    reason="CGROUP_FAILED",
                ) from error
            log.warning("%s of %s (%d) stays with the daemon: %s", kind, sandbox, pid, error)


NOWHERE = Housing(why="nothing was asked for")
"""Everything stays with the daemon."""
