"""The gate that every door of the API uses: who calls, whether they may, how often, written down.

A door (gRPC's is ``api.door``) does for each call, in this order:

```
principal = gate.authenticate(token, peer, workspace)
gate.admit(principal, method)                     each may refuse: answer, and gate.refuse(…)
with gate.call(principal, method, peer) as call:  counted, and in the audit log when it has ended;
                                                  in it, all is done in the principal's workspace
    call.names |= {"sandbox": "debugbox"}         what it is about, as far as it is known
    …
    note_failure("SANDBOX_NOT_FOUND")             by whoever turns an error into an answer
    call.result = "NOT_FOUND"                     where it is not "OK"
```

A door says first which request it is about (``request_ids``).

A key that is revoked, or whose time is up, while its calls are under way ends them within about a
second: `call.tell` answers with why, and the task is cancelled, which may then take its time to
undo what it had begun. So are those that are not over when the daemon has to end.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from stratabox.daemon.access import request_ids, roles
from stratabox.daemon.access.audit import AuditLog
from stratabox.daemon.access.credentials import Credentials, invalid
from stratabox.daemon.access.ending import broken_off
from stratabox.daemon.access.keyring import Keyring
from stratabox.daemon.access.keys import parse_token
from stratabox.daemon.access.limits import Bucket, Limiter
from stratabox.storage.model.access import ApiKey, Role
from stratabox.storage.model.errors import (
    ForbiddenError,
    StrataboxError,
    UnauthenticatedError,
    UnavailableError,
)
from stratabox.storage.model.workspaces import DEFAULT_WORKSPACE, acting, not_found

log = logging.getLogger(__name__)

WORKSPACE_HEADER = "x-stratabox-workspace"
"""By which a call, of whatever protocol, names the workspace that it is to be done in."""

_LOOK = 1.0
"""Seconds between two looks at the keys of calls under way."""
_NOTE_USES = 60
"""Looks between two times that last uses are written down."""
_REFUSALS = 10, 100
"""Refusals a second, and at once, that are written down one by one; the rest is counted."""
_NAMES = 16
_NAME_LENGTH = 200


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who calls, once that is known."""

    role: Role
    workspace: str
    """What this call is done in: nothing of another's can be seen or named in it."""
    key: str | None = None
    """Id of the API key; None: by the Unix socket, where the file's mode is the key."""
    session: str | None = None
    """The one sandbox that it is about; None: any."""

    @property
    def who(self) -> str:
        """As the audit log has it: "socket", or "key:" and the id."""
        return "socket" if self.key is None else f"key:{self.key}"


LOCAL = Principal(role=Role.ADMIN, workspace=DEFAULT_WORKSPACE)
"""Whoever may open the Unix socket."""

current: ContextVar[Principal] = ContextVar("principal", default=LOCAL)
"""Who makes the call that this task works for; the daemon's own work is nobody's, so LOCAL."""


def require_session(session: str) -> None:
    """See that the call that this task works for may be about that sandbox, if there is one.

    For calls that come in by a session's credential.

    :raise UnauthenticatedError: INVALID_CREDENTIAL.
    """
    allowed = current.get().session
    if allowed is not None and not hmac.compare_digest(allowed.encode(), session.encode()):
        raise invalid("of another session")


@dataclass(kw_only=True, eq=False)
class Call:
    """One call under way."""

    principal: Principal
    method: str
    peer: str
    long: bool = False
    """It may go on for days."""
    names: dict[str, str] = field(default_factory=dict)
    """What it is about: field → id, name or path. Never a secret, nor what is in a file."""
    result: str = "OK"
    """A status code's name, for the audit log."""
    reason: str = ""
    """Of the error that it was answered with: the stable word."""
    ended: StrataboxError | None = None
    """Why its task was cancelled, where that was the gate's doing."""
    task: asyncio.Task[object] | None = None
    tell: Callable[[StrataboxError], None] | None = None
    """Answers at once with `ended`; None: the task does that when it is cancelled."""

    @property
    def ended_as(self) -> str:
        """The status code's name of `ended`."""
        return "UNAVAILABLE" if isinstance(self.ended, UnavailableError) else "UNAUTHENTICATED"


_under_way: ContextVar[Call | None] = ContextVar("call", default=None)


def note_failure(reason: str) -> None:
    """Say with which error the call that this task works for is answered."""
    call = _under_way.get()
    if call is not None:
        call.reason = reason


class Gate:
    """See the module. One for all doors; of the event loop's thread.

    :param note_uses: writes down when keys were last used.
    :param credentials: of sessions; None: signed with a secret that nobody else has.
    """

    def __init__(
        self,
        *,
        keyring: Keyring,
        limiter: Limiter,
        calls: AuditLog,
        refused: AuditLog,
        note_uses: Callable[[Mapping[str, datetime]], Awaitable[object]],
        credentials: Credentials | None = None,
    ) -> None:
        self.credentials = credentials or Credentials(secrets.token_bytes(32))
        self._keyring = keyring
        self._limiter = limiter
        self._calls = calls
        self._refused = refused
        self._note_uses = note_uses
        self._open: set[Call] = set()
        self._uses: dict[str, datetime] = {}
        self._refusals = {known: Bucket(*_REFUSALS) for known in (True, False)}
        self._left_out = 0
        self.on_end: list[Callable[[Call, float], None]] = []
        """Called with each call that has ended, and the seconds that it took."""
        self.on_refused: list[Callable[[str], None]] = []
        """Called with the reason of each that was not let in."""

    @property
    def open_calls(self) -> int:
        """How many are under way."""
        return len(self._open)

    def authenticate(self, token: str | None, peer: str, workspace: str | None = None) -> Principal:
        """Find out who calls, and in which workspace: the one place where that is said.

        :param token: the API key that was shown; None: none was.
        :param peer: where the call comes from, as gRPC writes it: "unix:…" is the Unix socket.
        :param workspace: that the caller wants to be in (`WORKSPACE_HEADER`); None or "": its
            key's, or the default one. Only an admin may name another than its own.
        :raise ForbiddenError: FORBIDDEN, for another workspace, whether or not there is one.
        :raise NotFoundError: WORKSPACE_NOT_FOUND, to an admin.
        :raise UnauthenticatedError: NO_KEY; INVALID_KEY, for one that is malformed, unknown, wrong
            or revoked, which are not told apart; KEY_EXPIRED, to whoever has the right secret.
        :raise UnavailableError: KEYS_UNAVAILABLE.
        """
        if peer.startswith("unix:"):
            return self._in(LOCAL, workspace)
        if not token:
            raise UnauthenticatedError(
                "this address takes an API key, and none was given: set STRATABOX_API_KEY",
                reason="NO_KEY",
            )
        shown = parse_token(token)
        if shown is None:
            raise _invalid("malformed")
        key = self._keyring.find(shown.id)
        if not shown.fits(None if key is None else key.hash) or key is None:
            raise _invalid("unknown" if key is None else "wrong secret", shown.id)
        self._require_good(key)
        principal = Principal(role=key.role, workspace=key.workspace, key=key.id)
        return self._in(principal, workspace)

    def authenticate_session(self, credential: str | None) -> Principal:
        """Find out who calls about one session, from elsewhere than the Unix socket.

        Whether that session is the one that the call is about tells `require_session`.

        :raise UnauthenticatedError: as `Credentials.read`, and for a key that is good no more.
        :raise UnavailableError: KEYS_UNAVAILABLE.
        """
        claim = self.credentials.read(credential, datetime.now(UTC))
        key = None if claim.key is None else self._keyring.find(claim.key)
        if key is None:
            raise invalid("given to the Unix socket" if claim.key is None else "of no key")
        self._require_good(key)
        workspace = key.workspace
        if key.role is Role.ADMIN:  # who may have made it in another one
            workspace = self._keyring.workspace_of(claim.session) or workspace
        return Principal(role=key.role, workspace=workspace, key=key.id, session=claim.session)

    def admit(self, principal: Principal, method: str) -> None:
        """Let a call in: within its limits, and by its role.

        :param method: "package.Service/Method", as in ``roles.LEAST``.
        :raise RateLimitedError: RATE_LIMITED.
        :raise ForbiddenError: FORBIDDEN.
        """
        if principal.key is not None:
            self._limiter.take(principal.key)
            roles.require(principal.role, method)
            self._uses[principal.key] = datetime.now(UTC)

    def refuse(
        self, error: StrataboxError, principal: Principal | None, method: str, peer: str
    ) -> None:
        """Note that somebody was not let in.

        :param principal: None: nobody knows who it was.
        """
        for tell in self.on_refused:
            tell(error.reason)
        who = "nobody" if principal is None else principal.who
        if self._refusals[principal is not None].take():
            self._left_out += 1
            return
        entry: dict[str, object] = {"at": _now(), "who": who, "peer": peer, "method": method[:200]}
        entry["reason"] = error.reason
        entry |= _request()
        if isinstance(error, UnauthenticatedError) and error.why:
            entry["why"] = error.why
        if self._left_out:
            entry["left_out"], self._left_out = self._left_out, 0
        self._refused.note(entry)

    @contextmanager
    def call(
        self, principal: Principal, method: str, peer: str, *, long: bool = False
    ) -> Iterator[Call]:
        """Count a call that was admitted until it ends, and write it down then.

        :param long: it may go on for days: that it has begun is written down, too.
        :raise RateLimitedError: TOO_MANY_CALLS.
        """
        if principal.key is not None:
            self._limiter.enter(principal.key)
        task = asyncio.current_task()
        call = Call(principal=principal, method=method, peer=peer, long=long, task=task)
        began, since = _now(), time.monotonic()
        reset, undone = current.set(principal), _under_way.set(call)
        reset_workspace = acting.set(principal.workspace)
        self._open.add(call)
        if long:
            self._calls.note(_entry(call, began) | {"phase": "begun"})
        try:
            yield call
        except asyncio.CancelledError:
            call.result = "CANCELLED" if call.ended is None else call.ended_as
            raise
        except BaseException:
            if call.result == "OK":
                call.result = "INTERNAL"
            raise
        finally:
            self._open.discard(call)
            current.reset(reset)
            _under_way.reset(undone)
            acting.reset(reset_workspace)
            if principal.key is not None:
                self._limiter.leave(principal.key)
            took = round(time.monotonic() - since, 4)
            ending: dict[str, object] = {"result": call.result, "seconds": took}
            if call.reason:
                ending["reason"] = call.reason
            self._calls.note(_entry(call, began) | ending)
            for tell in self.on_end:
                tell(call, took)

    async def keep(self) -> None:
        """End calls whose key is good no more, and write down last uses, until cancelled."""
        while True:
            for _ in range(_NOTE_USES):
                await asyncio.sleep(_LOOK)
                self.end_revoked()
            try:
                await self.write_uses()
            except StrataboxError as error:  # a full disk: keys are looked at all the same
                log.warning("when keys were last used is not written down: %s", error.message)

    def end_revoked(self) -> None:
        """End the calls under way whose key was revoked, or whose time is up."""
        verdicts: dict[str, StrataboxError | None] = {}
        for call in list(self._open):
            key = call.principal.key
            if key is None or call.ended is not None:
                continue
            if key not in verdicts:
                verdicts[key] = self._verdict(key)
            if (verdict := verdicts[key]) is not None:
                _end(call, verdict)

    async def over(self) -> None:
        """Wait until no call is under way."""
        while tasks := {call.task for call in self._open if call.task is not None}:
            await asyncio.wait(tasks)

    def end_all(self) -> None:
        """End the calls under way, as the daemon has to end."""
        for call in list(self._open):
            if call.ended is None:
                _end(call, broken_off())

    async def write_uses(self) -> None:
        """Write down when keys were last used.

        :raise StrataboxError: when the catalog cannot be written; they are kept for the next time.
        """
        uses, self._uses = self._uses, {}
        if uses:
            try:
                await self._note_uses(uses)
            except StrataboxError:
                self._uses = uses | self._uses
                raise

    def _in(self, principal: Principal, workspace: str | None) -> Principal:
        if not workspace or workspace == principal.workspace:
            return principal
        if principal.role is not Role.ADMIN:
            raise ForbiddenError(
                f"this key acts in its own workspace, {principal.workspace!r}, and in no other:"
                " leave the workspace out",
                workspace=principal.workspace,
            )
        if not self._keyring.has_workspace(workspace):
            raise not_found(workspace)
        return replace(principal, workspace=workspace)

    def _verdict(self, key: str) -> StrataboxError | None:
        try:
            found = self._keyring.find(key)
            if found is None:
                raise _invalid("unknown", key)
            self._require_good(found)
        except UnauthenticatedError as error:
            return error
        except StrataboxError:  # the catalog cannot be read now: no reason to end what goes on
            return None
        return None

    def _require_good(self, key: ApiKey) -> None:
        if key.revoked_at is not None:
            raise _invalid("revoked", key.id)
        if key.is_over(datetime.now(UTC)):
            raise UnauthenticatedError(
                "the time of this API key is up: make another with stratabox key create",
                reason="KEY_EXPIRED",
                why=f"expired key:{key.id}",
            )


def _end(call: Call, why: StrataboxError) -> None:
    if call.task is None:
        return
    call.ended, call.reason = why, why.reason
    if call.tell is not None:
        call.tell(why)
    call.task.cancel()


def _invalid(why: str, key: str | None = None) -> UnauthenticatedError:
    return UnauthenticatedError(
        "the API key is not valid: stratabox key list, on the daemon's host, shows those that are",
        reason="INVALID_KEY",
        why=why if key is None else f"{why} key:{key}",
    )


def _entry(call: Call, at: str) -> dict[str, object]:
    named = {name: text[:_NAME_LENGTH] for name, text in list(call.names.items())[:_NAMES]}
    return {
        "at": at,
        "who": call.principal.who,
        "workspace": call.principal.workspace,
        "peer": call.peer,
        "method": call.method,
        "names": named,
    } | _request()


def _request() -> dict[str, object]:
    request = request_ids.current.get()
    return {"request": request} if request else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
