"""How the daemon's log is written: lines for people, or JSON objects for programs, one a line.

```
2026-11-22 14:25:06,617 INFO stratabox.daemon.api.server: listening on unix:///run/… [request 4f…]
{"at":"2026-11-22T14:25:06.617Z","level":"info","logger":"…","message":"…","request":"4f…"}
```

Every record made while a call is answered, or by what it has begun, has the call's request id. API
keys are cut down to their ids in both.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from stratabox.daemon.access import request_ids
from stratabox.daemon.access.keys import redacted
from stratabox.daemon.access.redacting import Redacting
from stratabox.daemon.config import Config
from stratabox.daemon.config.keys import LogFormat


def begin(config: Config) -> None:
    """Have everything that is logged from now on written to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if config.log_format is LogFormat.JSON else Lines())
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])


class Lines(Redacting):
    """For people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Write its first line."""
        text = super().formatMessage(record)
        request = request_ids.current.get()
        return f"{text} [request {request}]" if request else text


class JsonLines(logging.Formatter):
    """For programs: `at`, `level`, `logger`, `message`; `request` and `traceback` where there is
    one.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write it, as ASCII and on one line."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request := request_ids.current.get():
            entry["request"] = request
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return redacted(json.dumps(entry, separators=(",", ":")))
