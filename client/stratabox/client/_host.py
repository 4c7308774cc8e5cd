"""The plan of `client.host`."""

from __future__ import annotations

from stratabox.client import _convert
from stratabox.client._plans import Call, Plan
from stratabox.client.records import Host
from stratabox.v1.host_pb2 import GetHostRequest


def host_plan() -> Plan[Host]:
    """Return what the daemon is and uses."""
    return Call("host", "GetHost", GetHostRequest(), _convert.host)
