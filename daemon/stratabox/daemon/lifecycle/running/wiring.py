"""One guest's way out: the link of its card, and the helper behind it, as its record wants them.

```
 begin ─▶ plug ─▶ up ─────▶ wired ◀──▶ change
 (helper  (link,  (helper      │  the helper's end: one more is started, unless it lived too short
  starts)  wire)   answers)    ▼
                    adopt ─▶ wired ─▶ end (with the guest), or let_go (it outlives the daemon)
```

With network `none` there is no helper, and no link. Who changes anything here holds the guest's
lock.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from stratabox.daemon.hypervisor import process
from stratabox.daemon.hypervisor.domain import Domain
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.daemon.hypervisor.network.uplink import Uplink, require_library
from stratabox.daemon.hypervisor.network.walls import Counters
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.model.errors import (
    DeniedError,
    FailedError,
    StrataboxError,
    UnavailableError,
)
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.network import NO_NETWORK, OWN_NETWORK, Network, NetworkMode
from stratabox.storage.model.records import Machine, Sandbox

log = logging.getLogger(__name__)

SHORT_LIFE = 10.0
"""Seconds: a helper that ends sooner is not started again, as the next would end as well."""
ADDRESS_SECONDS = 30.0
"""For a guest that boots to take an address in; then it is ready without."""
_LOOK_SECONDS = 0.1
_OWN_PREFIX = str(OWN_NETWORK.network_address).removesuffix("0")
_QEMU_ENDS_SECONDS = 2.0
"""For QEMU's end to be seen after its helper's, which follows from it."""


def require(machine: Machine, network: Network) -> None:
    """That a machine can have a network, on this host.

    :raise DeniedError: NETWORK_UNSUPPORTED or NETWORK_UNAVAILABLE.
    """
    if network.mode is NetworkMode.NONE:
        return
    if not machine.uplink:
        raise DeniedError(
            "this machine goes on from memory of before there was a network: stop and start the"
            " sandbox, or restore its snapshot cold (--cold)",
            reason="NETWORK_UNSUPPORTED",
        )
    require_library()


class Wiring:
    """The way out of one guest."""

    def __init__(self, world: World, sandbox: SandboxId) -> None:
        self._world = world
        self._id = sandbox
        self._network = NO_NETWORK
        self._uid: int | None = None
        self._exists = False
        """The machine has a card that can be connected."""
        self._uplink: Uplink | None = None
        self._domain: Domain | None = None
        self._watcher: asyncio.Task[None] | None = None

    # As the guest comes and goes

    def begin(self, sandbox: Sandbox) -> None:
        """Start what will be needed; QEMU's start need not wait for it.

        :raise DeniedError: NETWORK_UNSUPPORTED, NETWORK_UNAVAILABLE.
        :raise FailedError: NETWORK_FAILED.
        """
        require(sandbox.machine, sandbox.network)
        self._note(sandbox)
        if self._network.mode is NetworkMode.EGRESS:
            self._start()

    async def plug(self, domain: Domain) -> None:
        """Connect a domain whose vCPUs stand still.

        :raise FailedError: NETWORK_FAILED.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        self._domain = domain
        if self._exists:
            if self._uplink is not None:
                self._uplink.connect(self._network)
                await domain.wired()
            # What saved memory says of the link is what its source had.
            await domain.set_link(up=self._uplink is not None)

    async def up(self) -> None:
        """Wait until what `plug` has connected works. :raise FailedError: NETWORK_FAILED."""
        if self._uplink is not None:
            await self._uplink.up()
            self._watch(self._uplink)

    async def adopt(self, domain: Domain, sandbox: Sandbox) -> None:
        """Make it what the record says, for a domain that an earlier daemon started.

        What cannot be done is logged: the guest goes on without a network.
        """
        self._note(sandbox)
        self._domain = domain
        if not self._exists:
            return
        try:
            self._uplink = await Uplink.find(self._name, self._folder)
            if self._uplink is not None and self._network.mode is NetworkMode.EGRESS:
                await self._uplink.change(self._network)
                self._watch(self._uplink)
            else:
                await self.change(self._network)
        except StrataboxError as error:
            log.error("sandbox %s has no network: %s", self._id, error.message)
            await self.end()

    async def configured(self, agent: GuestAgent) -> None:
        """Wait until a guest that boots has given its card an address, so that the first command
        in it finds a network. Not for ever: it may want another address, or none.
        """
        if self._uplink is None:
            return
        try:
            async with asyncio.timeout(ADDRESS_SECONDS):
                while True:
                    # Only the guest knows, and its agent tells nothing by itself.
                    if _has_address(await agent.execute("guest-network-get-interfaces")):
                        return
                    await asyncio.sleep(_LOOK_SECONDS)
        except TimeoutError:
            log.warning("sandbox %s: its guest takes no address on its network", self._id)
        except (FailedError, UnavailableError) as error:
            log.info("sandbox %s: its agent does not say its addresses: %s", self._id, error)

    async def end(self) -> None:
        """End the helper, after QEMU or before it. Idempotent."""
        self._forget_watcher()
        uplink, self._uplink = self._uplink, None
        if uplink is not None:
            await uplink.end()

    def let_go(self) -> None:
        """Leave all as it is, for the next daemon to find."""
        self._forget_watcher()
        uplink, self._uplink = self._uplink, None
        if uplink is not None:
            uplink.let_go()

    # While it runs

    async def change(self, network: Network) -> None:
        """Hold to another policy from now on; connections that it does not allow have ended.

        When this fails, nothing gets through at all.

        :raise DeniedError: NETWORK_UNAVAILABLE.
        :raise FailedError: NETWORK_FAILED.
        :raise UnavailableError: MONITOR_UNAVAILABLE.
        """
        self._network = network
        domain = self._domain
        if not self._exists or domain is None:
            return
        try:
            if network.mode is NetworkMode.NONE:
                await domain.set_link(up=False)
                await self.end()
            elif self._uplink is not None:
                await self._uplink.change(network)
            else:
                require_library()
                uplink = self._start()
                uplink.connect(network)
                await uplink.up()
                await domain.wired()
                await domain.set_link(up=True)
                self._watch(uplink)
        except BaseException:
            await self.end()
            raise

    async def counters(self) -> Counters | None:
        """What has gone through since the helper was started; None: there is no helper.

        :raise FailedError: NETWORK_FAILED.
        """
        return await self._uplink.look() if self._uplink is not None else None

    # Inside

    @property
    def _name(self) -> str:
        return process.guest_name(self._world.catalog.store_id, self._id)

    @property
    def _folder(self) -> Path:
        return self._world.store.layout.sandbox(self._id)

    def _note(self, sandbox: Sandbox) -> None:
        self._network = sandbox.network
        self._uid = sandbox.uid
        self._exists = sandbox.machine.uplink

    def _start(self) -> Uplink:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._uplink = Uplink.start(self._name, self._folder, self._uid)
        log.info("network of sandbox %s: helper %d", self._id, self._uplink.pid)
        housing = self._world.housing.network(self._id, self._uplink.pid)
        self._world.tasks.spawn(housing, f"housing of {self._id}")
        return self._uplink

    def _watch(self, uplink: Uplink) -> None:
        self._forget_watcher()
        self._watcher = asyncio.create_task(self._see_end(uplink), name=f"network of {self._id}")
        self._watcher.add_done_callback(_log_end)

    def _forget_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()

    async def _see_end(self, uplink: Uplink) -> None:
        """Start another helper when one has ended under a guest that goes on."""
        while True:
            await uplink.gone()
            domain = self._domain
            if self._uplink is not uplink or domain is None:
                return
            await asyncio.wait({domain.exited}, timeout=_QEMU_ENDS_SECONDS)
            if domain.exited.done():
                return
            log.error("network of sandbox %s: its helper ended: %s", self._id, uplink.last_words())
            uplink.let_go()
            self._uplink = None
            if uplink.age() < SHORT_LIFE:
                log.error("sandbox %s has no network until it is started again", self._id)
                await domain.set_link(up=False)
                return
            uplink = self._start()
            uplink.connect(self._network)
            await uplink.up()


def _has_address(interfaces: object) -> bool:
    """Whether one of them has an address of the network between guest and gateway."""
    for interface in interfaces if isinstance(interfaces, list) else ():
        found = interface.get("ip-addresses") if isinstance(interface, dict) else None
        for each in found if isinstance(found, list) else ():
            text = each.get("ip-address") if isinstance(each, dict) else None
            if isinstance(text, str) and text.startswith(_OWN_PREFIX):
                return True
    return False


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        level = logging.WARNING if isinstance(error, FailedError) else logging.ERROR
        log.log(level, "%s: %s", task.get_name(), error, exc_info=error)
