"""EventsService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import streaming
from stratabox.daemon.lifecycle.observing.chronicle import Chronicle, Entry, Subject
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.v1 import events_pb2, events_pb2_grpc, records_pb2

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class EventsServicer(events_pb2_grpc.EventsServiceServicer):
    """Message in, one call, message out."""

    chronicle: Chronicle

    @streaming
    async def WatchEvents(
        self, request: events_pb2.WatchEventsRequest, context: Context
    ) -> AsyncIterator[events_pb2.WatchEventsResponse]:
        """Stream what happened, and what happens."""
        since = None
        if request.HasField("since"):
            try:
                since = request.since.ToDatetime(UTC)
            except ValueError as error:
                raise InvalidArgumentError("that is no time", field="since") from error
        subjects = {_subject(each) for each in request.subjects}
        async for entry in self.chronicle.entries(subjects, since, follow=request.follow):
            yield _message(entry)


def _subject(value: int) -> Subject:
    names: dict[int, Subject] = {
        events_pb2.Subject.Value(f"SUBJECT_{each.upper()}"): each for each in Subject
    }
    if value not in names:
        raise InvalidArgumentError(f"there are no events of the kind {value}", field="subjects")
    return names[value]


def _message(entry: Entry) -> events_pb2.WatchEventsResponse:
    return events_pb2.WatchEventsResponse(
        time=convert.timestamp(entry.time),
        subject=events_pb2.Subject.Value(f"SUBJECT_{entry.subject.upper()}"),
        id=entry.id,
        name=entry.name,
        type=records_pb2.EventType.Value(f"EVENT_TYPE_{entry.happening.upper()}"),
        state=entry.state,
        ready=entry.ready,
        reason=entry.reason,
        request_id=entry.request,
    )
