"""What `stratabox sandbox port forward` does: listens here and dials for each connection."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import click

from stratabox.client._dial import AsyncConnection
from stratabox.client.aio import AsyncClient
from stratabox.client.cli.app import App
from stratabox.client.cli.output import print_json, printable
from stratabox.client.errors import StrataboxError
from stratabox.client.port_errors import PortInUseError
from stratabox.client.port_records import Endpoint

_PIECE = 64 << 10
_LOOPBACK = "127.0.0.1"

Pair = tuple[Endpoint | None, Endpoint]


def run(app: App, sandbox: str, pairs: Sequence[Pair]) -> None:
    """Listen until SIGINT or SIGTERM.

    :raise PortInUseError: when something listens there already.
    :raise StrataboxError: when there is no such sandbox.
    """
    asyncio.run(_run(app, sandbox, pairs))


async def _run(app: App, sandbox: str, pairs: Sequence[Pair]) -> None:
    ending = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(app.address, workspace=app.workspace))
        record = await client.sandboxes.get(sandbox)
        shown = []
        for listens, target in pairs:
            bound = await stack.enter_async_context(
                _listening(app, client, record.id, listens or Endpoint(port=0), target)
            )
            shown.append({"listens": bound, "leads_to": str(target)})
        if app.json:
            print_json({"sandbox_id": record.id, "forwards": shown})
        else:
            for each in shown:
                click.echo(f"{each['listens']} leads to {each['leads_to']} in {record.id}")
        sys.stdout.flush()
        await ending.wait()


@asynccontextmanager
async def _listening(
    app: App, client: AsyncClient, sandbox: str, listens: Endpoint, target: Endpoint
) -> AsyncIterator[str]:
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _lead(app, client, sandbox, target, reader, writer)
        except asyncio.CancelledError:
            pass  # the end of all: a handler that is cancelled would be reported as a mistake
        finally:
            tasks.discard(task)

    path = Path(listens.path) if listens.path else None
    try:
        if path is not None:
            if path.exists() or path.is_symlink():
                raise PortInUseError(f"there is a file {path} already")
            server = await asyncio.start_unix_server(handle, path)
            path.chmod(0o600)
        else:
            server = await asyncio.start_server(
                handle, listens.address or _LOOPBACK, listens.port or 0
            )
    except OSError as error:
        raise PortInUseError(f"cannot listen at {listens}: {error.strerror}") from error
    try:
        yield str(path) if path else str(_bound(server))
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        if path is not None:
            path.unlink(missing_ok=True)


def _bound(server: asyncio.Server) -> Endpoint:
    host, port = server.sockets[0].getsockname()[:2]
    return Endpoint(address=host, port=port)


async def _lead(
    app: App,
    client: AsyncClient,
    sandbox: str,
    target: Endpoint,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    try:
        async with await client.ports.dial(sandbox, target) as far:
            await _carry(far, reader, writer)
        writer.close()
        await writer.wait_closed()
    except StrataboxError as error:
        app.note(f"error: {printable(error.message)}")
    except OSError:
        pass  # whoever connected has broken it off
    finally:
        writer.transport.abort()


async def _carry(
    far: AsyncConnection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    async def up() -> None:
        while data := await reader.read(_PIECE):
            await far.write(data)
        await far.write_eof()

    sending = asyncio.create_task(up())
    closed = asyncio.create_task(far.wait_closed())
    try:
        while data := await far.read():
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
        await asyncio.wait({sending, closed}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (sending, closed):
            task.cancel()
        await asyncio.gather(sending, closed, return_exceptions=True)
