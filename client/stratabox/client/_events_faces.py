"""`client.events`, of both faces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Concatenate

from stratabox.client._events import EventPlans
from stratabox.client._plans import Face, Method, P, R, Stream


def _watch(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, Iterator[R]]:
    return Method(build, "stream")


def _watch_aio(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


class _Resource(Face):
    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return EventPlans(), self._transport, ()


class Events(_Resource):
    """What happens, of all kinds of things in one stream; see `EventPlans`."""

    watch = _watch(EventPlans.watch)


class AsyncEvents(_Resource):
    """What happens, of all kinds of things in one stream; see `EventPlans`."""

    watch = _watch_aio(EventPlans.watch)
