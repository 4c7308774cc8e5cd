"""Changing what callers may change of a sandbox. Of what runs, only its network is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from stratabox.daemon.lifecycle import keeping, policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.keeping import Rhythm
from stratabox.daemon.lifecycle.running import probing, wiring
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.snapshots import Never
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import sandboxes
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.network import Network
from stratabox.storage.model.probes import Probe, chosen
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import TimeoutAction


async def update(
    world: World,
    guests: Guests,
    reference: str,
    *,
    name: str | None = None,
    env: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    tags: Sequence[str] | None = None,
    expires_at: datetime | Never | None = None,
    on_timeout: TimeoutAction | None = None,
    keep_last: int | None = None,
    rhythm: Rhythm | Never | None = None,
    probe: Probe | None = None,
    network: Network | None = None,
) -> Sandbox:
    """Change what the caller may change; None leaves a field alone.

    :raise NotFoundError: SANDBOX_NOT_FOUND.
    :raise InvalidArgumentError: INVALID_ARGUMENT, also for an expiry in the past.
    :raise DeniedError: NETWORK_UNAVAILABLE or NETWORK_UNSUPPORTED.
    :raise FailedError: NETWORK_FAILED; the record says what is wanted, and nothing gets through.
    """
    changes: dict[str, object] = {}
    if name is not None:
        changes["name"] = policy.check_name(name)
    if env is not None:
        policy.check_env(env)
        changes["env"] = dict(env)
    if metadata is not None:
        policy.check_metadata(metadata)
        changes["metadata"] = dict(metadata)
    if tags is not None:
        changes["tags"] = policy.check_tags(tags)
    if on_timeout is not None:
        changes["on_timeout"] = on_timeout
    if probe is not None:
        changes["probe"] = chosen(probing.check(probe), None)
    if keep_last is not None:
        changes["keep_last"] = keeping.check_keep_last(keep_last)
    if isinstance(rhythm, Rhythm):
        keeping.check_rhythm(rhythm)
    if network is not None:
        changes["network"] = network
    guest, record = await guests.find(reference)

    def write(tx: Transaction) -> Sandbox:
        if isinstance(expires_at, Never):
            changes["expires_at"] = None
        elif expires_at is not None:
            policy.check_expiry(expires_at, tx.now)
            changes["expires_at"] = expires_at
        if isinstance(rhythm, Never):
            changes["schedule"] = None
        elif rhythm is not None:
            changes["schedule"] = keeping.begin(rhythm, tx.now)
        return sandboxes.change(tx, guest.id, **changes) if changes else record

    if network is None:
        after = await world.write(write)
        if changes:
            world.bus.publish(Happening.UPDATED, after)
        return after
    async with guest.lock:
        record = await guest.record()
        goes_on = record.has_process or record.ram_parked is not None
        # The next start, from the disks, gives it a machine that can.
        wiring.require(record.machine if goes_on else replace(record.machine, uplink=True), network)
        after = await world.write(write)
        world.bus.publish(Happening.UPDATED, after)
        if guest.domain is not None:
            await guest.wiring.change(network)
    return after
