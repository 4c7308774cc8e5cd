"""Files in guests, for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, Concatenate

from stratabox.client._files import FilePlans
from stratabox.client._plans import Face, Method, P, Plan, R, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from stratabox.client.aio import Transport


def _method(build: Callable[Concatenate[Any, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _stream(build: Callable[Concatenate[Any, P], Stream[R]]) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


def _own(build: Callable[Concatenate[Any, str, P], Plan[R]]) -> Method[P, Coroutine[Any, Any, R]]:
    return Method(build)


def _own_stream(
    build: Callable[Concatenate[Any, str, P], Stream[R]],
) -> Method[P, AsyncIterator[R]]:
    return Method(build, "stream")


class _Resource(Face):
    def __init__(self, transport: Transport, *leading: str) -> None:
        self._carries = FilePlans(), transport, leading

    def _carrier(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return self._carries


class AsyncFiles(_Resource):
    """Files in guests; see `FilePlans`."""

    stat = _method(FilePlans.stat)
    list = _method(FilePlans.list)
    read = _method(FilePlans.read)
    write = _method(FilePlans.write)
    make_directory = _method(FilePlans.make_directory)
    remove = _method(FilePlans.remove)
    move = _method(FilePlans.move)
    change = _method(FilePlans.change)
    symlink = _method(FilePlans.symlink)
    read_link = _method(FilePlans.read_link)
    upload = _method(FilePlans.upload)
    download = _method(FilePlans.download)
    write_archive = _method(FilePlans.write_archive)
    iterate = _stream(FilePlans.iterate)
    stream = _stream(FilePlans.stream)
    watch = _stream(FilePlans.watch)
    read_archive = _stream(FilePlans.read_archive)


class AsyncSandboxFiles(_Resource):
    """Files in one guest; see `FilePlans`."""

    stat = _own(FilePlans.stat)
    list = _own(FilePlans.list)
    read = _own(FilePlans.read)
    write = _own(FilePlans.write)
    make_directory = _own(FilePlans.make_directory)
    remove = _own(FilePlans.remove)
    move = _own(FilePlans.move)
    change = _own(FilePlans.change)
    symlink = _own(FilePlans.symlink)
    read_link = _own(FilePlans.read_link)
    upload = _own(FilePlans.upload)
    download = _own(FilePlans.download)
    write_archive = _own(FilePlans.write_archive)
    iterate = _own_stream(FilePlans.iterate)
    stream = _own_stream(FilePlans.stream)
    watch = _own_stream(FilePlans.watch)
    read_archive = _own_stream(FilePlans.read_archive)
