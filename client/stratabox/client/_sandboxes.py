"""The plans of `client.sandboxes`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from datetime import datetime

from google.protobuf.field_mask_pb2 import FieldMask

from stratabox.client import _convert, _probes, _requests
from stratabox.client._attachments import AttachmentPlans
from stratabox.client._plans import Call, Fold, Plan, Script, Steps, Stream
from stratabox.client._requests import UNSET, Seconds, Unset
from stratabox.client.errors import InvalidArgumentError, InvalidStateError, SandboxNotFoundError
from stratabox.client.network_records import Network
from stratabox.client.probe_records import ReadinessProbe
from stratabox.client.records import (
    EventType,
    ExecuteResult,
    Identity,
    Page,
    S,
    SandboxEvent,
    SandboxState,
    SnapshotSchedule,
    TimeoutAction,
    VolumeMount,
)
from stratabox.v1 import records_pb2
from stratabox.v1 import sandboxes_pb2 as pb

_SERVICE = "sandboxes"
_NEVER_READY = (
    SandboxState.STOPPED,
    SandboxState.TERMINATING,
    SandboxState.TERMINATED,
    SandboxState.FAILED,
)


class SandboxPlans(AttachmentPlans[S]):
    """Creating, using, copying and ending sandboxes.

    Wherever a sandbox, snapshot or image is named, an id is taken, else an exact name that only
    one has, else the unambiguous start of an id. Memory is in MiB, storage in GiB, time spans in
    seconds (or a timedelta). A gone thing raises its NotFoundError, a name that fits several
    AmbiguousNameError, and a daemon that does not answer DaemonUnavailableError, everywhere.
    """

    def create(
        self,
        *,
        image: str | None = None,
        snapshot: str | None = None,
        name: str | None = None,
        cpus: int | None = None,
        memory: int | None = None,
        storage: int | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Sequence[str] = (),
        data_disks: Sequence[int] = (),
        volumes: Sequence[VolumeMount | str] = (),
        cold: bool = False,
        expires_at: datetime | None = None,
        on_timeout: TimeoutAction | str | None = None,
        keep_last: int = 0,
        snapshot_schedule: SnapshotSchedule | Seconds | None = None,
        verify: bool = False,
        user_data: bytes | str = b"",
        ssh_keys: Sequence[str] = (),
        network: Network | str | Sequence[str] | None = None,
        identity: Identity | str | None = None,
        paused: bool = False,
        readiness_probe: ReadinessProbe | None = None,
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[S]:
        """Create a sandbox from an image or a snapshot, and start it.

        :param image: None, with no snapshot either: the daemon's default_image.
        :param cpus: 1-32. This and what follows: None is the daemon's default.
        :param memory: MiB, 128-32768.
        :param storage: GiB of the root disk, no less than the image's.
        :param env: Given to every command that is executed.
        :param data_disks: Empty disks beside the root disk, GiB each.
        :param volumes: What is mounted before it is ready, as records or as "VOLUME:/PATH" with
            ":ro" behind where it is only to be read. Those of a snapshot's source it does not get.
        :param cold: Boot from a memory snapshot's disks instead of going on from its memory.
        :param expires_at: Aware: when `on_timeout` is done to it; None: never.
        :param on_timeout: "terminate" (the default), "pause": to disk, or "snapshot": one is taken,
            and then it is terminated.
        :param keep_last: With each new snapshot of it the oldest beyond so many are deleted, but
            for those with an expiry of their own, which do not count; 0: all are kept.
        :param snapshot_schedule: Snapshots are taken of it by themselves, so often.
        :param verify: Compare all of a memory snapshot's saved memory with its checksums first, and
            refuse it (CorruptError) where they differ.
        :param user_data: For cloud-init at the first boot, as "#cloud-config ..." or a script; with
            this and the next the image must be known to run cloud-init.
        :param ssh_keys: Lines of an authorized_keys file: who may log in as the image's user.
        :param network: What it may reach: "none", "egress" (every public address), or a list of
            what is allowed, as ["*.example.org:443", "10.1.0.0/16"]; None: what the snapshot's
            source might, or the daemon's configuration says.
        :param identity: "keep" or "renew": whether it is who the snapshot's source was. None: renew
            for a snapshot, keep for an image.
        :param paused: Leave it at its first instant, or the snapshot's; `resume` lets it go on. It
            is not waited for.
        :param readiness_probe: What must pass before it counts as ready; None: the snapshot's, if
            any, and with nothing to check: none.
        :param wait_for_ready: Return only when the guest's agent has answered and the probe passed.
        :param idempotency_key: The same key within 24 hours returns the same sandbox.
        :raise InvalidResourcesError: when a size is out of its limits.
        :raise AgentUnavailableError: when the guest was not ready in time; nothing is left of it.
        :raise ProbeFailedError: when its probe did not pass in time; nothing is left of it.
        :raise VolumeInUseError: when others have a volume so that it cannot.
        :raise VolumeMountFailedError: when the guest could not mount one; nothing is left of it.
        :raise DeniedError: NO_CLOUD_INIT, for user data or keys with another image.
        :raise InvalidUserDataError: for what cloud-init would pass over.
        :raise CloudInitFailedError: when that went wrong; nothing is left of it. With
            `wait_for_ready` False it stays, and its `state_reason` says so.
        :raise QemuFailedError: when QEMU did not start; nothing is left of it.
        :raise NoSpaceError: when the host has no room, or its budget none.
        :raise IdempotencyMismatchError: when the key was used with another request.
        """
        if image and snapshot:
            raise InvalidArgumentError(
                "a sandbox starts from an image or a snapshot, not from both"
            )
        with _requests.checked():
            request = pb.CreateSandboxRequest(
                name=name or "",
                resources=_requests.resources(cpus, memory, storage),
                env=env or {},
                metadata=metadata or {},
                tags=tags,
                data_disks=data_disks,
                volumes=_requests.mounts(volumes),
                cold=cold,
                expires_at=_requests.timestamp(expires_at),
                on_timeout=_requests.on_timeout(on_timeout),
                keep_last=keep_last,
                snapshot_schedule=_requests.schedule(snapshot_schedule),
                verify=verify,
                user_data=user_data.encode() if isinstance(user_data, str) else user_data,
                ssh_keys=ssh_keys,
                network=_requests.network(network),
                identity=_requests.identity(identity),
                paused=paused,
                readiness_probe=_probes.message(readiness_probe),
                wait_for_ready=wait_for_ready,
                ready_timeout=_requests.duration(ready_timeout),
                idempotency_key=idempotency_key or "",
            )
            if image:
                request.image = image
            if snapshot:
                request.snapshot = snapshot
        waits = _requests.seconds(ready_timeout)
        return Call(_SERVICE, "CreateSandbox", request, self._make, waits)

    def get(self, sandbox: str) -> Plan[S]:
        """Return one sandbox as it is now."""
        with _requests.checked():
            request = pb.GetSandboxRequest(sandbox=sandbox)
        return Call(_SERVICE, "GetSandbox", request, self._make)

    def list_page(
        self,
        *,
        page_size: int | None = None,
        page_token: str | None = None,
        states: Sequence[SandboxState | str] = (),
        name: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        image: str | None = None,
        include_terminated: bool = False,
    ) -> Plan[Page[S]]:
        """Return one page of the list, newest first.

        :param page_size: At most so many, 1-1000; None: 100.
        :param page_token: `next_page_token` of the page before, with the same filters.
        :raise InvalidArgumentError: when the token or a filter cannot be right.
        """
        with _requests.checked():
            request = pb.ListSandboxesRequest(
                page_size=page_size or 0,
                page_token=page_token or "",
                states=[_convert.number(SandboxState, state) for state in states],
                name=name or "",
                tags=tags,
                metadata=metadata or {},
                image=image or "",
                include_terminated=include_terminated,
            )
        return Call(_SERVICE, "ListSandboxes", request, self._page)

    def _page(self, message: pb.ListSandboxesResponse) -> Page[S]:
        items = tuple(self._make(one) for one in message.sandboxes)
        return Page(items=items, next_page_token=message.next_page_token or None)

    def list(
        self,
        *,
        states: Sequence[SandboxState | str] = (),
        name: str | None = None,
        tags: Sequence[str] = (),
        metadata: Mapping[str, str] | None = None,
        image: str | None = None,
        include_terminated: bool = False,
    ) -> Plan[builtins.list[S]]:
        """Return all sandboxes that fit every filter, newest first, over as many pages as needed.

        :param states: None given: all but terminated ones.
        :param name: With exactly this name.
        :param tags: With all of these.
        :param metadata: With all of these entries.
        :param image: Descending from this image.
        :param include_terminated: Terminated ones too, when no states are given.
        """

        def steps() -> Steps[builtins.list[S]]:
            found: builtins.list[S] = []
            token: str | None = None
            while True:
                page: Page[S] = yield self.list_page(
                    page_size=1000,
                    page_token=token,
                    states=states,
                    name=name,
                    tags=tags,
                    metadata=metadata,
                    image=image,
                    include_terminated=include_terminated,
                )
                found += page.items
                token = page.next_page_token
                if token is None:
                    return found

        return Script(steps())

    def update(
        self,
        sandbox: str,
        *,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
        tags: Sequence[str] | None = None,
        expires_at: datetime | Unset | None = UNSET,
        on_timeout: TimeoutAction | str | None = None,
        keep_last: int | None = None,
        snapshot_schedule: SnapshotSchedule | Seconds | Unset | None = UNSET,
        readiness_probe: ReadinessProbe | Unset | None = UNSET,
        network: Network | str | Sequence[str] | None = None,
    ) -> Plan[S]:
        """Replace what is given, whole; leave what is None.

        :param expires_at: Aware; None: it never expires. Not given: as it is.
        :param on_timeout: "terminate", "pause" or "snapshot".
        :param keep_last: 0: all are kept.
        :param snapshot_schedule: None: none are taken by themselves. Not given: as it is.
        :param readiness_probe: From the next start on; None: none. Not given: as it is.
        :param network: What it may reach, as at `create`, at once: connections that it does not
            allow end.
        :raise InvalidArgumentError: when a value breaks a limit, or the expiry is past.
        """
        given = {
            "name": name,
            "env": env,
            "metadata": metadata,
            "tags": tags,
            "on_timeout": on_timeout,
            "keep_last": keep_last,
            "network": network,
        }
        paths = [key for key in given if given[key] is not None]
        expiry = None if isinstance(expires_at, Unset) else expires_at
        if expires_at is not UNSET:
            paths.append("expires_at")
        rhythm = None if isinstance(snapshot_schedule, Unset) else snapshot_schedule
        if snapshot_schedule is not UNSET:
            paths.append("snapshot_schedule")
        probe = None if isinstance(readiness_probe, Unset) else readiness_probe
        if readiness_probe is not UNSET:
            paths.append("readiness_probe")
        with _requests.checked():
            request = pb.UpdateSandboxRequest(
                sandbox=records_pb2.Sandbox(
                    id=sandbox,
                    name=name or "",
                    env=env or {},
                    metadata=metadata or {},
                    tags=tags or (),
                    expires_at=_requests.timestamp(expiry),
                    on_timeout=_requests.on_timeout(on_timeout),
                    keep_last=keep_last or 0,
                    network=_requests.network(network),
                    snapshot_schedule=_requests.schedule(rhythm),
                    readiness_probe=_probes.message(probe),
                ),
                update_mask=FieldMask(paths=paths),
            )
        return Call(_SERVICE, "UpdateSandbox", request, self._make)

    def execute(
        self,
        sandbox: str,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: Seconds | None = None,
    ) -> Plan[ExecuteResult]:
        """Run one command in the guest and return when it has ended.

        :param command: A line for the guest's shell, or a program and its arguments as they are.
        :param cwd: Working directory in the guest; None: the user's home.
        :param env: Over the sandbox's env, key by key.
        :param timeout: After this the command and all that it started are killed, and the result
            says `timed_out`; None or 0: no limit.
        :raise InvalidStateError: when the sandbox does not run.
        :raise AgentUnavailableError: when the guest's agent does not answer.
        """
        with _requests.checked():
            request = pb.ExecuteCommandRequest(
                sandbox=sandbox,
                argv=() if isinstance(command, str) else command,
                shell=command if isinstance(command, str) else "",
                cwd=cwd or "",
                env=env or {},
                timeout=_requests.duration(timeout),
            )
        waits = _requests.seconds(timeout)
        return Call(_SERVICE, "ExecuteCommand", request, _convert.execute_result, waits)

    def pause(self, sandbox: str, *, to_disk: bool = False) -> Plan[S]:
        """Stop the vCPUs and keep the RAM.

        :param to_disk: Save the RAM to the host's disk and end the process; also for one that is
            paused in memory. `resume` goes on at that instant, also after a reboot of the host.
        :raise InvalidStateError: when the sandbox does not run.
        :raise GuestBootingError: to disk, when its agent has not answered since its start.
        :raise NoSpaceError: to disk, when the host has no room; the guest goes on.
        """
        with _requests.checked():
            request = pb.PauseSandboxRequest(sandbox=sandbox, to_disk=to_disk)
        return Call(_SERVICE, "PauseSandbox", request, self._make)

    def resume(
        self,
        sandbox: str,
        *,
        identity: Identity | str | None = None,
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
    ) -> Plan[S]:
        """Continue a paused sandbox.

        :param identity: "keep" or "renew": who it is from now on. None: what its restore said, and
            otherwise who it was.
        :param wait_for_ready: Return only when the guest's agent has answered, where it goes on
            from saved memory.
        :raise InvalidStateError: when it is not paused.
        :raise MachineMismatchError: when its saved memory cannot go on on the daemon's host; it
            stays paused. Stopped and started, it boots its disks.
        :raise CorruptError: when its saved memory is damaged; it stays paused.
        :raise AgentUnavailableError: when the guest was not ready in time; it runs.
        """
        with _requests.checked():
            request = pb.ResumeSandboxRequest(
                sandbox=sandbox,
                identity=_requests.identity(identity),
                wait_for_ready=wait_for_ready,
                ready_timeout=_requests.duration(ready_timeout),
            )
        waits = _requests.seconds(ready_timeout)
        return Call(_SERVICE, "ResumeSandbox", request, self._make, waits)

    def stop(self, sandbox: str, *, force: bool = False, timeout: Seconds | None = None) -> Plan[S]:
        """Shut the guest down, and by force when that takes too long; the disks stay.

        :param force: Cut the power without asking the guest.
        :param timeout: How long the guest may take; None: the daemon's stop_timeout.
        :raise InvalidStateError: when the sandbox has no guest to stop.
        """
        with _requests.checked():
            request = pb.StopSandboxRequest(
                sandbox=sandbox, force=force, timeout=_requests.duration(timeout)
            )
        return Call(_SERVICE, "StopSandbox", request, self._make, _requests.seconds(timeout))

    def start(
        self,
        sandbox: str,
        *,
        readiness_probe: ReadinessProbe | None = None,
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
    ) -> Plan[S]:
        """Boot a stopped or failed sandbox from its disks.

        :param readiness_probe: What must pass from now on before it is ready; None: what it has.
        :raise ProbeFailedError: when that did not pass in time; it runs.
        :raise InvalidStateError: when it is neither.
        :raise AgentUnavailableError: when the guest was not ready in time.
        :raise QemuFailedError: when QEMU did not start.
        """
        with _requests.checked():
            request = pb.StartSandboxRequest(
                sandbox=sandbox,
                readiness_probe=_probes.message(readiness_probe),
                wait_for_ready=wait_for_ready,
                ready_timeout=_requests.duration(ready_timeout),
            )
        return Call(_SERVICE, "StartSandbox", request, self._make, _requests.seconds(ready_timeout))

    def terminate(self, sandbox: str) -> Plan[S]:
        """End the guest and free its disks; the record stays, as terminated."""
        with _requests.checked():
            request = pb.TerminateSandboxRequest(sandbox=sandbox)
        return Call(_SERVICE, "TerminateSandbox", request, self._make)

    def delete(self, sandbox: str) -> Plan[None]:
        """End the guest where needed, free its disks, and remove the record too."""
        with _requests.checked():
            request = pb.DeleteSandboxRequest(sandbox=sandbox)
        return Call(_SERVICE, "DeleteSandbox", request, lambda message: None)

    def wait_ready(self, sandbox: str, *, timeout: Seconds | None = None) -> Plan[S]:
        """Wait until the guest's agent has answered; the daemon tells, nothing is polled.

        :param timeout: None: no limit.
        :raise InvalidStateError: when the sandbox stops, fails or ends before that.
        :raise DeadlineExceededError: when the time was up; the sandbox goes on.
        """

        def step(event: pb.SandboxEvent) -> S | None:
            if event.type == _convert.number(EventType, EventType.DELETED):
                raise SandboxNotFoundError(f"the sandbox {event.sandbox.id} was deleted")
            state = _convert.word(SandboxState, event.sandbox.state)
            if state in _NEVER_READY:
                why = f": {event.sandbox.state_reason}" if event.sandbox.state_reason else ""
                raise InvalidStateError(f"the sandbox {event.sandbox.id} is {state}{why}")
            return self._make(event.sandbox) if event.sandbox.ready else None

        with _requests.checked():
            request = pb.WatchSandboxesRequest(sandboxes=[sandbox])
        limit = None if timeout is None else _requests.seconds(timeout)
        return Fold(_SERVICE, "WatchSandboxes", request, step, limit)

    def watch(
        self, *, sandboxes: Sequence[str] = (), changes_only: bool = False
    ) -> Stream[SandboxEvent]:
        """Follow every change, for as long as the caller reads.

        :param sandboxes: Only these; none: all, also those to come.
        :param changes_only: Leave out the present ones that come first.
        """
        with _requests.checked():
            request = pb.WatchSandboxesRequest(sandboxes=sandboxes, changes_only=changes_only)
        return Stream(_SERVICE, "WatchSandboxes", request, _convert.sandbox_event)
