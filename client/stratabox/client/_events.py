"""The plans of `client.events`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from stratabox.client import _convert, _requests
from stratabox.client._plans import Stream
from stratabox.client.event_records import Happened, Subject
from stratabox.client.records import EventType
from stratabox.v1 import events_pb2 as pb


class EventPlans:
    """What happens to sandboxes, snapshots, volumes, images and jobs, in one stream."""

    def watch(
        self,
        subjects: Sequence[Subject | str] = (),
        *,
        since: datetime | None = None,
        follow: bool = True,
    ) -> Stream[Happened]:
        """Return what happened, oldest first, and what happens, for as long as the caller reads.

        The daemon remembers some thousand events since its start.

        :param subjects: Of these kinds of things; none: all.
        :param since: Those at this time or later; None: none of the past when following, else all
            that are remembered.
        :param follow: Go on with what happens from now on.
        :raise WatchBehindError: when the caller is too slow and has missed some.
        """
        with _requests.checked():
            request = pb.WatchEventsRequest(
                subjects=[_convert.number(Subject, each) for each in subjects],
                follow=follow,
            )
            if since is not None:
                request.since.FromDatetime(since)
        return Stream("events", "WatchEvents", request, _happened)


def _happened(message: pb.WatchEventsResponse) -> Happened:
    return Happened(
        time=_convert.moment(message.time),
        subject=_convert.word(Subject, message.subject),
        id=message.id,
        name=message.name,
        type=_convert.word(EventType, message.type),
        state=message.state,
        ready=message.ready,
        reason=message.reason or None,
        request_id=message.request_id or None,
    )
