"""The plans of `client.host` and `client.check`."""

from __future__ import annotations

from stratabox.client import _convert
from stratabox.client._plans import Call, Plan
from stratabox.client.host_records import DiskUsage, Host
from stratabox.client.records import Checked
from stratabox.v1.host_pb2 import (
    CheckStoreRequest,
    GetDiskUsageRequest,
    GetHostRequest,
)

CHECK_SECONDS = 24 * 3600.0
"""A check reads all that is kept: it may take long, and whoever waits can leave at any time."""


def host_plan() -> Plan[Host]:
    """Return what the daemon is and uses."""
    return Call("host", "GetHost", GetHostRequest(), _convert.host)


def disk_usage_plan() -> Plan[DiskUsage]:
    """Look at all files of the daemon's state folder: what takes how much of the disk."""
    return Call("host", "GetDiskUsage", GetDiskUsageRequest(), _convert.disk_usage, waits=600.0)


def check_plan(*, repair: bool, deep: bool) -> Plan[Checked]:
    """Read all that the daemon keeps and compare it with its catalog."""
    request = CheckStoreRequest(repair=repair, deep=deep)
    return Call("host", "CheckStore", request, _convert.checked, waits=CHECK_SECONDS)
