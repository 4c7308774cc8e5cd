"""Sessions: made, looked at, ended; and the credentials of their data plane."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.access import gate
from stratabox.daemon.lifecycle.common.threads import undone_by
from stratabox.daemon.lifecycle.creation import NewSandbox
from stratabox.daemon.lifecycle.inside import keys
from stratabox.daemon.lifecycle.inside.accounts import Accounts
from stratabox.daemon.tenki import convert, endpoints, finding, messages, reading
from stratabox.daemon.tenki.errors import unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.daemon.tenki.ssh_keys import SshKeys
from stratabox.storage.catalog import tenki_sessions
from stratabox.storage.catalog.tenki_sessions import Session
from stratabox.storage.model.errors import DeniedError
from stratabox.storage.model.records import Sandbox
from stratabox.storage.model.states import SandboxState
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]

VERIFIED = records_pb2.DATA_PLANE_ROUTE_STATUS_VERIFIED
STICKY_WINS = records_pb2.SandboxWarning(
    code=records_pb2.SANDBOX_WARNING_CODE_STICKY_OVERRIDES_MAX_DURATION,
    message="a sticky session runs until it is terminated: max_duration is not kept",
)
_NO_IDLE_TIMEOUT = records_pb2.SandboxWarning(
    code=records_pb2.SANDBOX_WARNING_CODE_STICKY_OVERRIDES_IDLE_TIMEOUT,
    message="idle_timeout_minutes is not kept: nothing is paused because it is idle",
)


@dataclass(frozen=True, kw_only=True)
class SessionCalls:
    """Message in, one call, message out."""

    parts: Parts
    keys: SshKeys
    accounts: Accounts

    @unary
    async def CreateSession(
        self, request: sandbox_pb2.CreateSessionRequest, context: Context
    ) -> sandbox_pb2.CreateSessionResponse:
        """Make a session and wait until it is ready; nothing is left of it when the client goes."""
        parts = self.parts
        reading.require_served(request)
        keys.all_checked(request.ssh_authorized_keys)
        endpoint = endpoints.data_plane(parts.world.config, context)
        known = _known(request)
        source = ""
        if request.HasField("snapshot_id"):
            source = (await finding.snapshot(parts, request.snapshot_id)).id
        else:
            _require_default_image(parts)
        wanted = NewSandbox(
            snapshot=source,
            name=request.name,
            resources=reading.resources(request),
            env=dict(request.env),
            metadata=dict(request.metadata),
            tags=reading.tags(request.tags),
            volumes=reading.wishes(request.volumes),
            network=reading.reach(request),
            expires_at=known.timeout_at,
            ready_timeout=parts.world.config.ready_timeout,
            also=lambda tx, sandbox: tenki_sessions.insert(tx, sandbox, known),
        )
        record = await parts.sandboxes.create(wanted)
        async with undone_by(lambda: parts.sandboxes.delete(record.id)):
            if request.ssh_authorized_keys:
                await self.keys.update(record.id, request.ssh_authorized_keys)
            if written := [each.path for each in record.volumes if not each.read_only]:
                await self.accounts.give(record.id, written)
        warnings = []
        if request.sticky and request.HasField("max_duration"):
            warnings.append(STICKY_WINS)
        if request.HasField("idle_timeout_minutes") and request.idle_timeout_minutes:
            warnings.append(_NO_IDLE_TIMEOUT)
        return sandbox_pb2.CreateSessionResponse(
            session=await messages.of_session(parts, record),
            data_plane_endpoint=endpoint,
            credential=credential(parts, record.id),
            route_status=VERIFIED,
            warnings=warnings,
        )

    @unary
    async def CreateSessionCredential(
        self, request: sandbox_pb2.CreateSessionCredentialRequest, context: Context
    ) -> sandbox_pb2.CreateSessionCredentialResponse:
        """Give out what opens the data plane of a session that runs, for a little while."""
        _, record = await finding.living(self.parts, request.session_id)
        finding.require_running(record)
        return sandbox_pb2.CreateSessionCredentialResponse(
            credential=credential(self.parts, record.id),
            data_plane_endpoint=endpoints.data_plane(self.parts.world.config, context),
            route_status=VERIFIED,
        )

    @unary
    async def GetSession(
        self, request: sandbox_pb2.GetSessionRequest, context: Context
    ) -> sandbox_pb2.GetSessionResponse:
        """Return one session."""
        _, record = await finding.session(self.parts, request.session_id)
        return sandbox_pb2.GetSessionResponse(session=await messages.of_session(self.parts, record))

    @unary
    async def TerminateSession(
        self, request: sandbox_pb2.TerminateSessionRequest, context: Context
    ) -> sandbox_pb2.TerminateSessionResponse:
        """End a session. Its snapshots and volumes stay."""
        record = await terminate(self.parts, request.session_id)
        return sandbox_pb2.TerminateSessionResponse(
            session=await messages.of_session(self.parts, record)
        )


async def terminate(parts: Parts, session_id: str) -> Sandbox:
    """End a session; one that is over is fine. :raise NotFoundError: SANDBOX_NOT_FOUND."""
    _, record = await finding.session(parts, session_id)
    if record.state is SandboxState.TERMINATED:
        return record
    return await parts.sandboxes.terminate(record.id)


def credential(parts: Parts, session_id: str) -> records_pb2.SessionCredential:
    """What opens a session's data plane for whoever calls."""
    text, claim = parts.credentials.issue(session_id, gate.current.get().key, datetime.now(UTC))
    return records_pb2.SessionCredential(
        credential=text, expires_at=convert.timestamp(claim.expires_at)
    )


def _known(request: sandbox_pb2.CreateSessionRequest) -> Session:
    """What a new session is beyond its sandbox."""
    timeout_at = None
    if request.HasField("max_duration") and not request.sticky:
        timeout_at = datetime.now(UTC) + reading.span(request.max_duration, "max_duration")
    retention = None
    if request.HasField("pause_retention"):
        retention = reading.span(request.pause_retention, "pause_retention")
    return Session(
        owner=gate.current.get().key or "",
        inbound=not request.HasField("allow_inbound") or request.allow_inbound,
        sticky=request.sticky,
        timeout_at=timeout_at,
        pause_retention=retention,
    )


def _require_default_image(parts: Parts) -> None:
    """:raise DeniedError: NO_DEFAULT_IMAGE, when none is configured."""
    if not parts.world.config.default_image:
        raise DeniedError(
            "the daemon's configuration has no default_image, which sessions are made from",
            reason="NO_DEFAULT_IMAGE",
        )
