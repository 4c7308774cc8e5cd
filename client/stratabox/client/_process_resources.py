"""Where clients and sandboxes have their commands as streams, for both faces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, Concatenate

from stratabox.client import _processes
from stratabox.client._plans import Face, Method, P, Plan, R, Stream
from stratabox.client._process_faces import AsyncProcess, Process
from stratabox.client._processes import ProcessPlans, Words
from stratabox.client._requests import Seconds
from stratabox.client.process_records import Terminal


class _Resource(Face):
    def __init__(self, transport: Any, *leading: str) -> None:
        self._carries = ProcessPlans(), transport, leading

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return self._carries


def _waits(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, R]:
    return Method(build)


def _follows(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, Iterator[R]]:
    return Method(build, "stream")


def _awaits(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _afollows(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


def _own(build: Callable[Concatenate[Any, str, P], Plan[R]]) -> Method[P, R]:
    return Method(build)


def _own_stream(build: Callable[Concatenate[Any, str, P], Stream[R]]) -> Method[P, Iterator[R]]:
    return Method(build, "stream")


def _aown(build: Callable[Concatenate[Any, str, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _aown_stream(
    build: Callable[Concatenate[Any, str, P], Stream[R]],
) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


class Processes(_Resource):
    """Commands as streams, and detached processes; see `ProcessPlans`."""

    start = _waits(ProcessPlans.start)
    list = _waits(ProcessPlans.list)
    attach = _follows(ProcessPlans.attach)
    wait = _waits(ProcessPlans.wait)
    signal = _waits(ProcessPlans.signal)

    def spawn(
        self,
        sandbox: str,
        command: Words,
        *,
        cwd: str | None = None,
        env: Mapping[str, str | bytes] | None = None,
        user: str | None = None,
        timeout: Seconds | None = None,
        stdin: bool = False,
        terminal: Terminal | bool = False,
    ) -> Process:
        """Run a command in a guest, as a stream; see `Sandbox.spawn`."""
        transport = self._carries[1]
        first = _processes.start(
            sandbox,
            command,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            stdin=stdin,
            terminal=terminal,
        )
        rpc = transport.stub(_processes.SERVICE, "Exec")
        return Process(rpc, first, transport.address)


class SandboxProcesses(_Resource):
    """The detached processes of one sandbox; see `ProcessPlans`."""

    start = _own(ProcessPlans.start)
    list = _own(ProcessPlans.list)
    attach = _own_stream(ProcessPlans.attach)
    wait = _own(ProcessPlans.wait)
    signal = _own(ProcessPlans.signal)


class AsyncProcesses(_Resource):
    """Commands as streams, and detached processes; see `ProcessPlans`."""

    start = _awaits(ProcessPlans.start)
    list = _awaits(ProcessPlans.list)
    attach = _afollows(ProcessPlans.attach)
    wait = _awaits(ProcessPlans.wait)
    signal = _awaits(ProcessPlans.signal)

    async def spawn(
        self,
        sandbox: str,
        command: Words,
        *,
        cwd: str | None = None,
        env: Mapping[str, str | bytes] | None = None,
        user: str | None = None,
        timeout: Seconds | None = None,
        stdin: bool = False,
        terminal: Terminal | bool = False,
    ) -> AsyncProcess:
        """Run a command in a guest, as a stream; see `AsyncSandbox.spawn`."""
        transport = self._carries[1]
        first = _processes.start(
            sandbox,
            command,
            cwd=cwd,
            env=env,
            user=user,
            timeout=timeout,
            stdin=stdin,
            terminal=terminal,
        )
        rpc = transport.stub(_processes.SERVICE, "Exec")
        return await AsyncProcess.open(rpc, first, transport.address)


class AsyncSandboxProcesses(_Resource):
    """The detached processes of one sandbox; see `ProcessPlans`."""

    start = _aown(ProcessPlans.start)
    list = _aown(ProcessPlans.list)
    attach = _aown_stream(ProcessPlans.attach)
    wait = _aown(ProcessPlans.wait)
    signal = _aown(ProcessPlans.signal)
