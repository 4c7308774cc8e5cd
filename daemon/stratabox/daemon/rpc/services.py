"""What a server takes on beside our own services."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import grpc.aio


class Services(Protocol):
    """Services that know how they are served."""

    @property
    def names(self) -> Sequence[str]:
        """Their full names."""

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have a server answer their methods."""
