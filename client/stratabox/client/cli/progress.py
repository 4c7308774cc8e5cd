"""A bar that moves, for who looks at a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stratabox.client.cli.app import App
from stratabox.client.cli.output import printable


@contextmanager
def bar(app: App, doing: str, *, in_bytes: bool = False) -> Iterator[Callable[..., None]]:
    """Give a function (done, total, text) that draws a bar on a terminal and nothing elsewhere.

    :param in_bytes: what is counted are bytes: show how many, how fast, and how long still.
    """
    if not app.animated:
        yield lambda done, total, text=None: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [
        SpinnerColumn("line"),
        TextColumn("{task.description}"),
        BarColumn(),
    ]
    if in_bytes:
        columns += [DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()]
    else:
        columns.append(TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(doing, total=None)

        def draw(done: int, total: int, text: str | None = None) -> None:
            shown = escape(printable(text)) if text else doing
            progress.update(task, completed=done, total=total or None, description=shown)

        yield draw
