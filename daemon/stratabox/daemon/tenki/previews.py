"""What has an address of HTTP: ports that are exposed, previews, and snapshots to download."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf import timestamp_pb2
from grpc.aio import ServicerContext

from stratabox.daemon.access.links import SNAPSHOTS
from stratabox.daemon.lifecycle.creation import require_ready
from stratabox.daemon.lifecycle.inside.previews import PreviewStatus
from stratabox.daemon.tenki import convert, finding, reading
from stratabox.daemon.tenki.errors import UnservedError, unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.ids import is_id
from stratabox.storage.model.previews import Preview
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]

LARGEST_PAGE = 100

_UNSERVED = ("search", "states", "include_facets", "sort_by", "sort_desc")
"""Fields of a request to list."""


@dataclass(frozen=True, kw_only=True)
class PreviewCalls:
    """Message in, one call, message out."""

    parts: Parts

    @unary
    async def ExposePort(
        self, request: sandbox_pb2.ExposePortRequest, context: Context
    ) -> sandbox_pb2.ExposePortResponse:
        """Have an address that nobody can guess lead to a port of a session."""
        _, record = await finding.living(self.parts, request.session_id)
        status = await self.parts.previews.expose(
            record.id,
            request.port,
            slug=request.slug,
            expires_at=_time(request),
        )
        return sandbox_pb2.ExposePortResponse(
            port=request.port,
            preview_url=status.url,
            expires_at=convert.timestamp(status.preview.expires_at),
            preview_url_id=status.preview.id,
            slug=status.preview.slug,
        )

    @unary
    async def UnexposePort(
        self, request: sandbox_pb2.UnexposePortRequest, context: Context
    ) -> sandbox_pb2.UnexposePortResponse:
        """Have no address lead to a port any more."""
        _, record = await finding.session(self.parts, request.session_id)
        await self.parts.previews.unexpose(record.id, request.port)
        return sandbox_pb2.UnexposePortResponse()

    @unary
    async def ListExposedPorts(
        self, request: sandbox_pb2.ListExposedPortsRequest, context: Context
    ) -> sandbox_pb2.ListExposedPortsResponse:
        """List the ports that addresses lead to."""
        _, record = await finding.session(self.parts, request.session_id)
        return sandbox_pb2.ListExposedPortsResponse(
            ports=[
                records_pb2.PortExposure(
                    port=each.preview.port or 0,
                    preview_url=each.url,
                    expires_at=convert.timestamp(each.preview.expires_at),
                    preview_url_id=each.preview.id,
                    slug=each.preview.slug,
                )
                for each in await self.parts.previews.of_sandbox(record.id)
            ]
        )

    @unary
    async def CreatePreviewUrl(
        self, request: sandbox_pb2.CreatePreviewUrlRequest, context: Context
    ) -> sandbox_pb2.CreatePreviewUrlResponse:
        """Make an address that stays until it is deleted."""
        session = ""
        if request.session_id:
            session = (await finding.living(self.parts, request.session_id))[1].id
        status = await self.parts.previews.create(
            request.slug,
            sandbox=session,
            port=request.port,
            expires_at=_time(request),
        )
        return sandbox_pb2.CreatePreviewUrlResponse(preview_url=await self._message(status))

    @unary
    async def DeletePreviewUrl(
        self, request: sandbox_pb2.DeletePreviewUrlRequest, context: Context
    ) -> sandbox_pb2.DeletePreviewUrlResponse:
        """Remove one."""
        await self.parts.previews.delete(request.preview_url_id)
        return sandbox_pb2.DeletePreviewUrlResponse()

    @unary
    async def BindPreviewUrl(
        self, request: sandbox_pb2.BindPreviewUrlRequest, context: Context
    ) -> sandbox_pb2.BindPreviewUrlResponse:
        """Have one lead to a port of a session."""
        _, record = await finding.living(self.parts, request.session_id)
        status = await self.parts.previews.bind(
            request.preview_url_id, record.id, request.port, _time(request)
        )
        return sandbox_pb2.BindPreviewUrlResponse(preview_url=await self._message(status))

    @unary
    async def UnbindPreviewUrl(
        self, request: sandbox_pb2.UnbindPreviewUrlRequest, context: Context
    ) -> sandbox_pb2.UnbindPreviewUrlResponse:
        """Have one lead nowhere."""
        status = await self.parts.previews.unbind(request.preview_url_id)
        return sandbox_pb2.UnbindPreviewUrlResponse(preview_url=await self._message(status))

    @unary
    async def GetPreviewUrl(
        self, request: sandbox_pb2.GetPreviewUrlRequest, context: Context
    ) -> sandbox_pb2.GetPreviewUrlResponse:
        """Return one, by its id or its slug."""
        status = await self.parts.previews.get(preview=request.preview_url_id, slug=request.slug)
        return sandbox_pb2.GetPreviewUrlResponse(preview_url=await self._message(status))

    @unary
    async def ListPreviewUrls(
        self, request: sandbox_pb2.ListPreviewUrlsRequest, context: Context
    ) -> sandbox_pb2.ListPreviewUrlsResponse:
        """List them, newest first."""
        for field, value in request.ListFields():
            if field.name in _UNSERVED and value:
                raise UnservedError(f"ListPreviewUrls with {field.name}")
        session = ""
        if request.session_id:
            session = (await finding.session(self.parts, request.session_id))[1].id
        size = min(request.page_size, LARGEST_PAGE) if request.page_size > 0 else LARGEST_PAGE
        found = await self.parts.previews.list(
            size=size, after=_place(request.page_token), sandbox=session
        )
        return sandbox_pb2.ListPreviewUrlsResponse(
            preview_urls=[await self._message(each) for each in found],
            next_page_token=_token(found[-1].preview) if len(found) == size else "",
        )

    @unary
    async def GetSnapshotDownloadURL(
        self, request: sandbox_pb2.GetSnapshotDownloadURLRequest, context: Context
    ) -> sandbox_pb2.GetSnapshotDownloadURLResponse:
        """Sign a link by which its holder gets a snapshot's archive for a while."""
        record = await finding.snapshot(self.parts, request.snapshot_id)
        require_ready(record)
        origin = self.parts.previews.origin()
        query, expires_at = self.parts.links.sign(record.id)
        return sandbox_pb2.GetSnapshotDownloadURLResponse(
            url=f"{origin}{SNAPSHOTS}{record.id}?{query}",
            expires_at=convert.timestamp(expires_at),
        )

    async def _message(self, status: PreviewStatus) -> records_pb2.PreviewUrl:
        preview, record = status.preview, status.sandbox
        message = records_pb2.PreviewUrl(
            id=preview.id,
            workspace_id=preview.workspace,
            slug=preview.slug,
            token=preview.token,
            preview_url=status.url,
            created_at=convert.timestamp(preview.created_at),
            updated_at=convert.timestamp(preview.updated_at),
            last_accessed_at=convert.timestamp(preview.accessed_at),
            expires_at=convert.timestamp(preview.expires_at),
        )
        if record is not None:
            message.session_id = record.id
            message.session_name = record.name
            message.port = preview.port or 0
        return message


def _time(request: Any) -> datetime | None:
    """When an address is to end, if the request says so."""
    if not request.HasField("expires_at"):
        return None
    given: timestamp_pb2.Timestamp = request.expires_at
    return reading.time(given, "expires_at")


def _token(preview: Preview) -> str:
    return f"{preview.created_at.isoformat(timespec='microseconds')}~{preview.id}"


def _place(token: str) -> tuple[str, str] | None:
    """Where a page begins. :raise InvalidArgumentError: for a token that is none of ours."""
    if not token:
        return None
    age, _, preview = token.partition("~")
    try:
        datetime.fromisoformat(age)
    except ValueError:
        preview = ""
    if not is_id(preview):
        raise InvalidArgumentError("page_token is none that a list has given", field="page_token")
    return age, preview
