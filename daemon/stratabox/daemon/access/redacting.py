"""Keeps API keys out of the daemon's log, whoever puts one there: a caller's text can hold one."""

from __future__ import annotations

import logging

from stratabox.daemon.access.keys import redacted


class Redacting(logging.Formatter):
    """Writes a record with every key in it, or in its traceback, cut down to its id."""

    def format(self, record: logging.LogRecord) -> str:
        """Write it."""
        return redacted(super().format(record))
