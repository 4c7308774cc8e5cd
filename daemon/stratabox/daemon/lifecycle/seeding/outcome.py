"""What came of a seed: a guest is ready when cloud-init has done what its seed says."""

from __future__ import annotations

from stratabox.daemon.hypervisor.guest import cloud_init
from stratabox.daemon.hypervisor.guest.agent import GuestAgent
from stratabox.storage.model.errors import FailedError
from stratabox.storage.model.ids import SandboxId

RUNS = "cloud-init did not end"
NO_ANSWER = "the guest's agent did not answer"


async def of(agent: GuestAgent, sandbox: SandboxId) -> FailedError | None:
    """Wait until cloud-init has ended, however long; what went wrong with it, if anything did."""
    wrong = await cloud_init.settle(agent)
    if not wrong:
        return None
    return FailedError(
        f"cloud-init says of sandbox {sandbox}: {wrong}; see its /var/log/cloud-init-output.log",
        reason="CLOUD_INIT_FAILED",
        sandbox=sandbox,
    )
