"""A user of its own in each guest, with a home: found there, or made where it is not.

Some callers' commands run as a user that their guests are known to have. Images come from anywhere,
so that user is made when it is first needed, and stays in the guest as any other.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import asyncssh

from stratabox.daemon.hypervisor.guest.pipe import LOST, line, running
from stratabox.daemon.lifecycle.policy import require_state
from stratabox.daemon.lifecycle.running.guests import Guests
from stratabox.storage.model.errors import FailedError, UnavailableError
from stratabox.storage.model.ids import SandboxId
from stratabox.storage.model.states import SandboxState

_SECONDS = 60.0
_OWNER = re.compile(rb"(\d{1,10}) (\d{1,10})")
_WORDS = 300

# $1 name, $2 home. Without useradd the lines are written as it would; the password is none that can
# be typed, but not locked: sshd would let nobody in who is. Who has sudo may use it.
_MAKE = """
LC_ALL=C
export LC_ALL
umask 022
name=$1 home=$2
fail() { printf '%s\\n' "$1" >&2; exit 1; }
look() {
  while IFS=: read -r found password uid gid rest; do
    if [ "$found" = "$name" ]; then return 0; fi
  done </etc/passwd
  return 1
}
if ! look; then
  shell=/bin/sh
  [ ! -x /bin/bash ] || shell=/bin/bash
  if command -v useradd >/dev/null 2>&1; then
    useradd -M -U -d "$home" -s "$shell" -p '*' "$name" || exit 1
  else
    number=1000
    while grep -q "^[^:]*:[^:]*:$number:" /etc/passwd /etc/group; do number=$((number + 1)); done
    printf '%s:x:%s:\\n' "$name" "$number" >>/etc/group || exit 1
    [ ! -e /etc/shadow ] || printf '%s:*:19000:0:99999:7:::\\n' "$name" >>/etc/shadow || exit 1
    printf '%s:x:%s:%s::%s:%s\\n' "$name" "$number" "$number" "$home" "$shell" >>/etc/passwd ||
      exit 1
  fi
  look || fail 'the user that was made is not there'
  if [ -d /etc/sudoers.d ]; then
    rights=/etc/sudoers.d/90-$name
    [ -e "$rights" ] ||
      (umask 226 && printf '%s ALL=(ALL:ALL) NOPASSWD:ALL\\n' "$name" >"$rights") || exit 1
  fi
fi
if [ ! -d "$home" ]; then
  mkdir -p -- "$home" || exit 1
  [ ! -d /etc/skel ] || cp -R /etc/skel/. "$home/" || exit 1
  chown -R "$uid:$gid" "$home" || exit 1
fi
echo "$uid $gid"
"""

# $1 owner, $2... folders.
_GIVE = """
owner=$1
shift
for folder; do
  if [ -O "$folder" ]; then chown "$owner" -- "$folder" || exit 1; fi
done
"""


@dataclass(frozen=True)
class Owner:
    """Who a user is to the guest's kernel."""

    uid: int
    gid: int

    def __str__(self) -> str:
        """As chown takes it."""
        return f"{self.uid}:{self.gid}"


class Accounts:
    """Sees to one user in all guests."""

    def __init__(self, guests: Guests, name: str, home: str) -> None:
        self.name = name
        self.home = home
        self._guests = guests
        self._known: WeakKeyDictionary[asyncssh.SSHClientConnection, Owner] = WeakKeyDictionary()
        self._turns: WeakKeyDictionary[asyncssh.SSHClientConnection, asyncio.Lock] = (
            WeakKeyDictionary()
        )

    async def ensure(self, sandbox: str, *, anew: bool = False) -> Owner:
        """The user in a sandbox's guest, who has a home when this returns.

        :param anew: look even where it was there before: something in the guest misses it.
        :raise NotFoundError: SANDBOX_NOT_FOUND.
        :raise DeniedError: INVALID_STATE, NO_SSHD, NO_CHANNEL.
        :raise FailedError: USER_NOT_MADE, with the guest's words.
        :raise UnavailableError: CHANNEL_UNAVAILABLE.
        """
        guest, record = await self._guests.find(sandbox)
        require_state(record, SandboxState.RUNNING, action="use")
        connection = await guest.connection()
        if not anew and (known := self._known.get(connection)):
            return known
        async with self._turns.setdefault(connection, asyncio.Lock()):
            if anew or connection not in self._known:
                self._known[connection] = await self._make(connection)
            return self._known[connection]

    async def give(self, sandbox: str, folders: Sequence[str]) -> None:
        """Have folders of root's be the user's; what is in them stays whose it is.

        :raise FailedError: NOT_GIVEN, with the guest's words; and all that `ensure` raises.
        """
        owner = await self.ensure(sandbox)
        connection = await self._guests.of(SandboxId(sandbox)).connection()
        command = line(_GIVE, str(owner).encode(), *(each.encode() for each in folders))
        try:
            async with asyncio.timeout(_SECONDS), running(connection, command) as pipe:
                pipe.end_input()
                ended = await pipe.ended()
        except TimeoutError:
            raise UnavailableError(
                f"the guest did not change an owner within {_SECONDS:g} s", reason=LOST
            ) from None
        if ended.status != 0:
            words = ended.words.decode(errors="replace").strip()[:_WORDS]
            raise FailedError(
                f"a folder could not be given to {self.name}: {words or 'the guest says no why'}",
                reason="NOT_GIVEN",
            )

    async def _make(self, connection: asyncssh.SSHClientConnection) -> Owner:
        command = line(_MAKE, self.name.encode(), self.home.encode())
        try:
            async with asyncio.timeout(_SECONDS), running(connection, command) as pipe:
                pipe.end_input()
                found = _OWNER.fullmatch(await pipe.read_line(_WORDS))
                ended = await pipe.ended()
        except TimeoutError:
            raise UnavailableError(
                f"the guest did not make its user {self.name} within {_SECONDS:g} s", reason=LOST
            ) from None
        if found is None or ended.status != 0:
            words = ended.words.decode(errors="replace").strip()[:_WORDS]
            raise FailedError(
                f"the guest has no user {self.name} with a home at {self.home}, and none could be"
                f" made: {words or 'it does not say why'}",
                reason="USER_NOT_MADE",
            )
        return Owner(int(found[1]), int(found[2]))
