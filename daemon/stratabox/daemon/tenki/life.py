"""What happens to a session between its making and its end: paused, resumed, extended, changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.lifecycle import policy
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.lifecycle.running import power
from stratabox.daemon.lifecycle.running.guest import Guest
from stratabox.daemon.tenki import convert, endpoints, errors, finding, messages, reading, sessions
from stratabox.daemon.tenki.errors import not_running, streaming, unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import sandboxes, tenki_sessions
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.tenki_sessions import Session
from stratabox.storage.model.errors import InvalidArgumentError, StrataboxError
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]

_MOST_AT_ONCE = 100
_ID_LENGTH = 36
_OVER = (records_pb2.SESSION_STATE_TERMINATING, records_pb2.SESSION_STATE_TERMINATED)


@dataclass(frozen=True, kw_only=True)
class LifeCalls:
    """Message in, one call, message out."""

    parts: Parts

    @unary
    async def PauseSession(
        self, request: sandbox_pb2.PauseSessionRequest, context: Context
    ) -> sandbox_pb2.PauseSessionResponse:
        """Save a session's memory to disk and end its process."""
        parts = self.parts
        guest, record = await finding.living(parts, request.session_id)
        if record.state not in (SandboxState.RUNNING, SandboxState.PAUSED):
            raise not_running(convert.state_name(record))
        parts.pausing.add(guest.id)
        work = parts.world.tasks.spawn(_pause(parts, guest), f"pause {guest.id}")
        if not getattr(request, "async"):
            await asyncio.shield(work)
        return sandbox_pb2.PauseSessionResponse(
            session=await messages.of_session_now(parts, guest.id)
        )

    @unary
    async def ResumeSession(
        self, request: sandbox_pb2.ResumeSessionRequest, context: Context
    ) -> sandbox_pb2.ResumeSessionResponse:
        """Have a paused session go on, and wait until it is ready."""
        parts = self.parts
        guest, record = await finding.living(parts, request.session_id)
        if record.state not in (SandboxState.RUNNING, SandboxState.PAUSED):
            raise not_running(convert.state_name(record))
        await parts.world.tasks.see_through(_resume(parts, guest))
        return sandbox_pb2.ResumeSessionResponse(
            session=await messages.of_session_now(parts, guest.id)
        )

    @unary
    async def ExtendSession(
        self, request: sandbox_pb2.ExtendSessionRequest, context: Context
    ) -> sandbox_pb2.ExtendSessionResponse:
        """Put off a session's end. One that has none keeps having none."""
        parts = self.parts
        _, record = await finding.living(parts, request.session_id)
        more = reading.span(request.additional_duration, "additional_duration")

        def write(tx: Transaction) -> Sandbox:
            now = sandboxes.get(tx, record.id)
            known = tenki_sessions.of(tx, record.id)
            until = convert.timeout_at(now, known)
            return _write_timeout(tx, now, None if until is None else until + more)

        changed = await self._change(write)
        return sandbox_pb2.ExtendSessionResponse(session=await messages.of_session(parts, changed))

    @unary
    async def UpdateSession(
        self, request: sandbox_pb2.UpdateSessionRequest, context: Context
    ) -> sandbox_pb2.UpdateSessionResponse:
        """Change a session's name, tags, stickiness or longest life."""
        parts = self.parts
        _, record = await finding.living(parts, request.session_id)
        changes: dict[str, object] = {}
        if request.HasField("name"):
            changes["name"] = policy.check_name(reading.name(request.name))
        if request.clear_tags or request.tags:
            changes["tags"] = () if request.clear_tags else reading.tags(request.tags)
        longest = None
        if request.HasField("max_duration"):
            longest = reading.span(request.max_duration, "max_duration")
        sticky = request.sticky if request.HasField("sticky") else None

        def write(tx: Transaction) -> Sandbox:
            now = sandboxes.get(tx, record.id)
            if changes:
                now = sandboxes.change(tx, record.id, **changes)
            known = tenki_sessions.of(tx, record.id)
            if sticky is not None:
                known = tenki_sessions.change(tx, record.id, sticky=sticky)
            if known.sticky and (sticky or longest):
                return _write_timeout(tx, now, None)
            if longest is None:
                return now
            until = now.created_at + longest
            if until <= tx.now:
                raise InvalidArgumentError(
                    "max_duration is shorter than the session's life until now",
                    field="max_duration",
                )
            return _write_timeout(tx, now, until)

        changed = await self._change(write)
        session = await messages.of_session(parts, changed)
        warns = session.sticky and longest is not None
        return sandbox_pb2.UpdateSessionResponse(
            session=session, warnings=[sessions.STICKY_WINS] if warns else []
        )

    @streaming
    async def WaitSession(
        self, request: sandbox_pb2.WaitSessionRequest, context: Context
    ) -> AsyncIterator[sandbox_pb2.WaitSessionResponse]:
        """Tell of a session's states until it is ready, or over."""
        parts = self.parts
        with parts.world.bus.subscribe() as subscription:
            _, record = await finding.session(parts, request.session_id)
            session = await messages.of_session(parts, record)
            yield self._waited(session, context)
            if _is_settled(session):
                return
            async for event in subscription.events():
                if not isinstance(event.record, Sandbox) or event.record.id != record.id:
                    continue
                if event.happening is Happening.DELETED:
                    await finding.session(parts, request.session_id)
                    return
                before, session = session, await messages.of_session(parts, event.record)
                if session.state != before.state:
                    yield self._waited(session, context)
                if _is_settled(session):
                    return

    @unary
    async def TerminateSessions(
        self, request: sandbox_pb2.TerminateSessionsRequest, context: Context
    ) -> sandbox_pb2.TerminateSessionsResponse:
        """End several sessions; what could not be ended is told of each."""
        parts = self.parts
        if len(request.session_ids) > _MOST_AT_ONCE:
            raise InvalidArgumentError(
                f"{len(request.session_ids)} sessions; at most {_MOST_AT_ONCE} at once",
                field="session_ids",
            )
        done, failures = [], []
        for session_id in dict.fromkeys(request.session_ids):
            try:
                done.append(await sessions.terminate(parts, session_id))
            except StrataboxError as error:
                message = errors.status_of(error).message
                failures.append(
                    records_pb2.TerminateSessionFailure(
                        session_id=session_id[:_ID_LENGTH], message=message
                    )
                )
        return sandbox_pb2.TerminateSessionsResponse(
            sessions=[await messages.of_session(parts, record) for record in done],
            failures=failures,
        )

    async def _change(self, write: Any) -> Sandbox:
        record: Sandbox = await self.parts.world.write(write)
        self.parts.world.bus.publish(Happening.UPDATED, record)
        return record

    def _waited(
        self, session: records_pb2.SandboxSession, context: Context
    ) -> sandbox_pb2.WaitSessionResponse:
        message = sandbox_pb2.WaitSessionResponse(session=session)
        if session.state == records_pb2.SESSION_STATE_RUNNING:
            message.data_plane_endpoint = endpoints.data_plane(self.parts.world.config, context)
            message.credential.CopyFrom(sessions.credential(self.parts, session.id))
            message.route_status = sessions.VERIFIED
        return message


async def _pause(parts: Parts, guest: Guest) -> None:
    """Pause to disk; the time that it is kept counts from now on, and its own stands still."""
    world = parts.world
    try:
        record = await guest.record()
        if record.ram_parked is not None:
            return
        if record.state is SandboxState.RUNNING and not record.ready:
            await guest.wait_ready(world.config.ready_timeout)

        def begin(tx: Transaction) -> datetime | None:
            now = sandboxes.get(tx, guest.id)
            known = tenki_sessions.change(
                tx,
                guest.id,
                paused_at=tx.now,
                timeout_at=convert.timeout_at(now, tenki_sessions.of(tx, guest.id)),
            )
            return None if known.pause_retention is None else tx.now + known.pause_retention

        kept_until = await world.write(begin)
        try:
            await power.pause_to_disk(world, guest, expires_at=kept_until)
        except StrataboxError:
            await world.write(lambda tx: tenki_sessions.change(tx, guest.id, paused_at=None))
            raise
    finally:
        parts.pausing.discard(guest.id)


async def _resume(parts: Parts, guest: Guest) -> None:
    """Let it go on; the time that it was paused is added to what it has left."""
    world = parts.world

    def begin(tx: Transaction) -> Sandbox:
        record = sandboxes.get(tx, guest.id)
        known = tenki_sessions.of(tx, guest.id)
        if convert.is_kept(record, known):
            sandboxes.change(tx, guest.id, expires_at=_end(known, tx.now))
        return record

    before = await world.write(begin)
    try:
        await power.resume(world, guest)
        await guest.wait_ready(world.config.ready_timeout)
    except StrataboxError as error:
        message = error.message
        await world.write(lambda tx: _note_failure(tx, before, message))
        raise

    def finish(tx: Transaction) -> Sandbox:
        record = sandboxes.get(tx, guest.id)
        known = tenki_sessions.of(tx, guest.id)
        if known.paused_at is not None:  # also by a pause that was under way at the beginning
            record = sandboxes.change(tx, guest.id, expires_at=_end(known, tx.now))
        tenki_sessions.change(tx, guest.id, paused_at=None, last_resume_error="")
        return record

    world.bus.publish(Happening.UPDATED, await world.write(finish))


def _end(known: Session, now: datetime) -> datetime | None:
    """When a session is over that goes on now."""
    if known.timeout_at is None or known.paused_at is None:
        return known.timeout_at
    return known.timeout_at + max(now - known.paused_at, timedelta(0))


def _note_failure(tx: Transaction, before: Sandbox, message: str) -> None:
    record = sandboxes.get(tx, before.id)
    tenki_sessions.change(tx, before.id, last_resume_error=message[:2000])
    if record.state is SandboxState.PAUSED:
        sandboxes.change(tx, before.id, expires_at=before.expires_at)


def _write_timeout(tx: Transaction, record: Sandbox, until: datetime | None) -> Sandbox:
    """Set when a session is over while it runs; one that is paused remembers it."""
    known = tenki_sessions.change(tx, record.id, timeout_at=until)
    if convert.is_kept(record, known):
        return record
    return sandboxes.change(tx, record.id, expires_at=until)


def _is_settled(session: records_pb2.SandboxSession) -> bool:
    return session.state == records_pb2.SESSION_STATE_RUNNING or session.state in _OVER
