"""For all tests: a slow machine is no failure, and children that are forked live."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("stratabox", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stratabox")

# Tests fork QEMU from a process in which gRPC works; see daemon/__main__.py. Read at its import.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
