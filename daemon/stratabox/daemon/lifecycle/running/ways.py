"""The ways into one guest, beside its agent: its channel, and what a first command goes by.

Made by its `Guest` with each start of its domain, and gone with that.
"""

from __future__ import annotations

from dataclasses import replace

from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.guest.channel import Channel
from stratabox.daemon.hypervisor.guest.exec_port import ExecPort
from stratabox.daemon.hypervisor.machine import DomainHandle
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.records import Machine


class Ways:
    """The ways into the guest of a domain that runs.

    :param goes_on: it goes on from saved memory just now: somebody waits at its exec port.
    """

    def __init__(
        self,
        world: World,
        domain: DomainHandle,
        agent: GuestAgent,
        machine: Machine,
        *,
        goes_on: bool,
    ) -> None:
        self._world = world
        self._id = domain.sandbox
        self.channel = Channel(
            domain.folder,
            world.store.layout.channel_keys,
            agent,
            exists=machine.channel,
            by_port=machine.exec_port,
            first=machine.channel_port,
            moved=self._moved,
        )
        self.exec_port: ExecPort | None = None
        """What a command can go by while there is no channel; None: by the channel alone."""
        if goes_on and machine.exec_port:
            self.exec_port = ExecPort(domain.folder, self.channel)

    def was_reset(self) -> None:
        """The guest starts over."""
        self.channel.was_reset()
        if self.exec_port is not None:
            self.exec_port.was_reset()

    async def close(self) -> None:
        """Hang up, for good. What runs over them ends with errors of its own."""
        if self.exec_port is not None:
            self.exec_port.close()
        await self.channel.close()

    def _moved(self, port: int) -> None:
        """It goes by its other port: copies of its memory are to be spoken to through this one."""

        def write(tx: Transaction) -> None:
            machine = sandboxes.get(tx, self._id).machine
            sandboxes.change(tx, self._id, machine=replace(machine, channel_port=port))

        what = f"channel of {self._id}"
        self._world.tasks.spawn(self._world.surely(lambda: self._world.write(write), what), what)
