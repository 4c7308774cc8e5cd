"""For all tests: a slow machine is no failure, nor is an example that nobody had before, and
children that are forked live.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The same examples in every run: a change is not refused for what was there before it. Others are
# looked for by `--hypothesis-profile=random`.
settings.register_profile(
    "random", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("stratabox", settings.get_profile("random"), derandomize=True)
settings.load_profile("stratabox")

# Tests fork QEMU from a process in which gRPC works; see daemon/__main__.py. Read at its import.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
