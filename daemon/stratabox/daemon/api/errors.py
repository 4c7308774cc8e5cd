"""How the methods of our own services answer: every error leaves by the map of ``rpc.errors``."""

from __future__ import annotations

from stratabox.daemon.rpc.errors import Answering, status_of

_answering = Answering(status_of)
unary = _answering.unary
"""Has a method answer one message."""
streaming = _answering.streaming
"""Has a method answer a stream of messages."""
