"""Where clients have their workspaces, for both faces."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Concatenate

from stratabox.client._plans import Face, Method, P, Plan, R
from stratabox.client._workspaces import WorkspacePlans


class _Resource(Face):
    def __init__(self, transport: Any) -> None:
        self._carries = WorkspacePlans(), transport, ()

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return self._carries


def _waits(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, R]:
    return Method(build)


def _awaits(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


class Workspaces(_Resource):
    """Tenants, and how much each may have; see `WorkspacePlans`."""

    create = _waits(WorkspacePlans.create)
    get = _waits(WorkspacePlans.get)
    list = _waits(WorkspacePlans.list)
    set_quota = _waits(WorkspacePlans.set_quota)
    delete = _waits(WorkspacePlans.delete)


class AsyncWorkspaces(_Resource):
    """Tenants, and how much each may have; see `WorkspacePlans`."""

    create = _awaits(WorkspacePlans.create)
    get = _awaits(WorkspacePlans.get)
    list = _awaits(WorkspacePlans.list)
    set_quota = _awaits(WorkspacePlans.set_quota)
    delete = _awaits(WorkspacePlans.delete)
