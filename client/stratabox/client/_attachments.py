"""The plans of `client.sandboxes` that give a sandbox volumes, and take them back."""

from __future__ import annotations

from stratabox.client import _requests
from stratabox.client._copies import CopyPlans
from stratabox.client._plans import Call, Plan
from stratabox.client._volumes import SERVICE
from stratabox.client.records import S
from stratabox.v1 import records_pb2
from stratabox.v1 import volumes_pb2 as pb


class AttachmentPlans(CopyPlans[S]):
    """Attach and detach: the part of `SandboxPlans` that is about volumes."""

    def attach_volume(
        self, sandbox: str, volume: str, path: str, *, read_only: bool = False
    ) -> Plan[S]:
        """Give the sandbox a volume, mounted in its guest when this returns.

        One that is stopped claims it, and has it mounted when it is started. One sandbox has a
        volume to write, or any number have it to read.

        :param path: Absolute, in the guest; made where it is not there.
        :raise VolumeInUseError: when others have it so that this one cannot; the message names who.
        :raise VolumeNotCleanError: to read only, when its file system needs recovery.
        :raise VolumeMountFailedError: when the guest could not mount it; it does not have it then.
        :raise VolumesUnsupportedError: when its machine is of before there were volumes.
        :raise InvalidStateError: when the sandbox is paused, or over.
        :raise AgentUnavailableError: when the guest's agent does not answer.
        """
        with _requests.checked():
            request = pb.AttachVolumeRequest(
                sandbox=sandbox,
                mount=records_pb2.VolumeMount(volume=volume, path=path, read_only=read_only),
            )
        return Call(SERVICE, "AttachVolume", request, self._make)

    def detach_volume(self, sandbox: str, volume: str, *, force: bool = False) -> Plan[S]:
        """Take a volume from the sandbox, once its guest has let go of it.

        :param force: Do not ask the guest: what it has not written is lost, and the volume's file
            system needs recovery.
        :raise VolumeBusyError: when the guest does not let go; the sandbox has it still.
        :raise VolumeNotAttachedError: when the sandbox does not have it.
        :raise InvalidStateError: when the sandbox is paused.
        :raise AgentUnavailableError: when the guest's agent does not answer.
        """
        with _requests.checked():
            request = pb.DetachVolumeRequest(sandbox=sandbox, volume=volume, force=force)
        return Call(SERVICE, "DetachVolume", request, self._make)
