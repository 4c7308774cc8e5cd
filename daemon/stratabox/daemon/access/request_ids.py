"""Ids of requests: one for each call, in its log lines, its audit line and its answer.

A caller may bring one in `x-request-id`, so that its own log and the daemon's tell of the same
thing; what is not fit for a log, or absent, gets one made here.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from uuid import uuid4

HEADER = "x-request-id"
"""Metadata and HTTP header, of the request and of the answer."""

current: ContextVar[str] = ContextVar("request_id", default="")
"""Of the call that this task works for, or was begun by; "": the daemon's own work."""

_FIT = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def chosen(offered: object) -> str:
    """The id that a caller has brought, if it is one; else a new one."""
    if isinstance(offered, bytes):
        offered = offered.decode("latin-1")
    if isinstance(offered, str) and _FIT.fullmatch(offered):
        return offered
    return uuid4().hex
