"""The use cases of workspaces: make, look at, limit, remove."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.daemon.lifecycle.world import World
from stratabox.storage.catalog import workspaces
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.workspaces import Quota, Usage, Workspace, check_name

LARGEST = 1 << 62
"""Of any number in a quota."""


@dataclass(frozen=True, kw_only=True)
class Workspaces:
    """What an admin does about tenants."""

    world: World
    guests: Guests

    async def create(self, name: str, quota: Quota) -> tuple[Workspace, Usage]:
        """Make one.

        :raise InvalidArgumentError: for its name or quota.
        :raise AlreadyExistsError: WORKSPACE_ALREADY_EXISTS.
        """
        check_name(name)
        _check(quota)

        def write(tx: Transaction) -> Workspace:
            made = Workspace(name=name, created_at=tx.now, quota=quota)
            workspaces.insert(tx, made)
            return made

        return await self.world.write(write), Usage()

    async def get(self, name: str) -> tuple[Workspace, Usage]:
        """One, and what it has. :raise NotFoundError: WORKSPACE_NOT_FOUND."""
        return await self.world.read(lambda tx: _with_usage(tx, workspaces.get(tx, name)))

    async def list(self) -> Sequence[tuple[Workspace, Usage]]:
        """All, by name, and what they have."""
        return await self.world.read(
            lambda tx: [_with_usage(tx, each) for each in workspaces.everything(tx)]
        )

    async def set_quota(self, name: str, quota: Quota) -> tuple[Workspace, Usage]:
        """Replace the quota of one.

        :raise NotFoundError: WORKSPACE_NOT_FOUND.
        :raise InvalidArgumentError: for a quota that cannot be.
        """
        _check(quota)
        return await self.world.write(
            lambda tx: _with_usage(tx, workspaces.set_quota(tx, name, quota))
        )

    async def delete(self, name: str) -> Sequence[str]:
        """Remove one that has nothing; returns the ids of its keys, which are revoked.

        :raise NotFoundError: WORKSPACE_NOT_FOUND.
        :raise DeniedError: WORKSPACE_NOT_EMPTY, WORKSPACE_STAYS.
        """
        gone = await self.world.write(lambda tx: workspaces.delete(tx, name))
        for sandbox in gone.sandboxes:
            self.guests.forget(sandbox)
        return gone.keys


def _with_usage(tx: Transaction, workspace: Workspace) -> tuple[Workspace, Usage]:
    return workspace, workspaces.usage(tx, workspace.name)


def _check(quota: Quota) -> None:
    for resource, limit in quota.limits().items():
        if not 0 <= limit <= LARGEST:
            raise InvalidArgumentError(
                f"a quota of {limit} {resource} cannot be: 0 or more, and none where there is none",
                field=resource,
            )
