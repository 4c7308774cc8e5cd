"""Keys by which people log in to sessions as the user that commands run as.

The daemon keeps them, for its own way into the guest; and they lie where an sshd in the guest
looks, whoever runs one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from stratabox.daemon.lifecycle.inside.accounts import Accounts
from stratabox.daemon.lifecycle.inside.callers import Callers
from stratabox.daemon.lifecycle.inside.file_records import WriteMode
from stratabox.daemon.lifecycle.inside.files import Files
from stratabox.storage.model.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class SshKeys:
    """Replaces the keys of a session's user."""

    callers: Callers
    files: Files
    accounts: Accounts

    async def update(self, session: str, lines: Sequence[str]) -> None:
        """Let in who has one of these keys, and nobody else.

        :raise InvalidArgumentError: when there is none, or one is no key.
        :raise StrataboxError: as `Accounts.ensure` and `Files.write`.
        """
        if not lines:
            raise InvalidArgumentError("give at least one key", field="ssh_authorized_keys")
        owner = await self.accounts.ensure(session)
        kept = await self.callers.set_keys(session, self.accounts.name, lines)
        folder = f"{self.accounts.home}/.ssh".encode()
        await self.files.make_directory(
            session, folder, user="", parents=True, mode=0o700, owner=str(owner)
        )
        file = folder + b"/authorized_keys"
        text = "".join(f"{each.key}\n" for each in kept)
        await self.files.write(
            session, file, _once(text.encode()),
            user="", how=WriteMode.REPLACE, mode=0o600, modified=None, parents=False,
        )  # fmt: skip
        await self.files.change(
            session, folder, user="", mode=None,
            owner=str(owner.uid), group=str(owner.gid), recursive=True,
        )  # fmt: skip


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
