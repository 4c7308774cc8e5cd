"""The options that say what a sandbox may reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import click

from stratabox.client.network_records import NetworkMode

F = TypeVar("F", bound=Callable[..., Any])


def network_options(command: F) -> F:
    """Add --network and --allow (both as `network`)."""

    @wraps(command)
    def wrapped(*args: Any, network: str | None, allow: tuple[str, ...], **kwargs: Any) -> Any:
        if network == NetworkMode.NONE and allow:
            raise click.UsageError("--network none reaches nothing, and --allow names something.")
        return command(*args, network=list(allow) or network, **kwargs)

    modes = click.Choice([str(NetworkMode.NONE), str(NetworkMode.EGRESS)])
    mode = click.option(
        "--network",
        type=modes,
        help="What it may reach: nothing, or what --allow names, without that everything public.",
    )
    allowed = click.option(
        "--allow",
        multiple=True,
        metavar="DOMAIN|CIDR|public[:PORTS]",
        help="As example.org, '*.example.org:443' or 10.1.0.0/16:80,8000-8100; may be repeated.",
    )
    return cast(F, mode(allowed(wrapped)))
