"""Lists of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.tenki import messages, reading
from stratabox.daemon.tenki.errors import unary
from stratabox.daemon.tenki.parts import Parts
from stratabox.storage.catalog import lookup, tenki_lists
from stratabox.storage.catalog.database import Transaction
from stratabox.storage.catalog.keyset import By
from stratabox.tenki.v1 import records_pb2, sandbox_pb2

Context = ServicerContext[Any, Any]

_Sort = records_pb2.SandboxSortField


@dataclass(frozen=True, kw_only=True)
class ListCalls:
    """Message in, one call, message out."""

    parts: Parts

    @unary
    async def ListSessions(
        self, request: sandbox_pb2.ListSessionsRequest, context: Context
    ) -> sandbox_pb2.ListSessionsResponse:
        """List sessions, newest first."""
        wanted = tenki_lists.SessionFilter(
            tags=reading.tags(request.tags),
            sticky=request.sticky if request.HasField("sticky") else None,
            include_terminated=request.include_terminated,
            pausing=tuple(self.parts.pausing),
        )
        page = lookup.Page(size=request.page_size, token=request.page_token)

        def look(tx: Transaction) -> sandbox_pb2.ListSessionsResponse:
            records, token = tenki_lists.sessions(tx, wanted, page)
            return sandbox_pb2.ListSessionsResponse(
                sessions=messages.of_sessions(tx, self.parts, records), next_page_token=token
            )

        return await self.parts.world.read(look)

    @unary
    async def ListWorkspaceSandboxes(
        self, request: sandbox_pb2.ListWorkspaceSandboxesRequest, context: Context
    ) -> sandbox_pb2.ListWorkspaceSandboxesResponse:
        """List sessions, searched and sorted as is asked for; newest first where nothing is."""
        reading.require_workspace(request.workspace_id)
        named = [request.state] if request.state else []
        wanted = tenki_lists.SessionFilter(
            states=[_state(each) for each in dict.fromkeys([*named, *request.states])],
            tags=reading.tags(request.tags),
            sticky=request.sticky if request.HasField("sticky") else None,
            search=request.search,
            min_cpus=request.min_cpu_cores,
            min_memory=request.min_memory_mb,
            min_storage=request.min_disk_gb,
            include_terminated=request.include_terminated,
            pausing=tuple(self.parts.pausing),
        )
        page = lookup.Page(size=request.page_size, token=request.page_token)
        order = _order(request)

        def look(tx: Transaction) -> sandbox_pb2.ListWorkspaceSandboxesResponse:
            records, token = tenki_lists.sessions(tx, wanted, page, order)
            response = sandbox_pb2.ListWorkspaceSandboxesResponse(
                sessions=messages.of_sessions(tx, self.parts, records), next_page_token=token
            )
            if request.include_facets:
                response.facets.CopyFrom(_facets(tenki_lists.session_facets(tx, wanted)))
            return response

        return await self.parts.world.read(look)


def _state(value: records_pb2.SessionState.ValueType) -> str:
    name = reading.enum_name(records_pb2.SessionState, value, "states")
    return name.removeprefix("SESSION_STATE_")


def _order(request: sandbox_pb2.ListWorkspaceSandboxesRequest) -> Sequence[By]:
    if request.sort_by:
        name = reading.enum_name(_Sort, request.sort_by, "sort_by")
        expression = tenki_lists.SESSIONS_BY[name.removeprefix("SANDBOX_SORT_FIELD_")]
        return (By(expression, descending=request.sort_desc),)
    if request.order == records_pb2.SANDBOX_LIST_ORDER_STATE_THEN_CREATED:
        return tenki_lists.ACTIVE_FIRST
    return tenki_lists.NEWEST


def _facets(found: tenki_lists.SessionFacets) -> records_pb2.SandboxListFacets:
    return records_pb2.SandboxListFacets(
        total=sum(found.states.values()),
        state_counts=[
            records_pb2.SandboxStateCount(
                state=records_pb2.SessionState.Value(f"SESSION_STATE_{name}"), count=count
            )
            for name, count in sorted(found.states.items())
        ],
        cpu_cores_options=found.cpus,
        memory_mb_options=found.memory,
        disk_gb_options=found.storage,
    )
