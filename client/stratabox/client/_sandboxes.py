"""The plans of `client.sandboxes`."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence

from google.protobuf.field_mask_pb2 import FieldMask

from stratabox.client import _convert, _requests
from stratabox.client._copies import CopyPlans
from stratabox.client._plans import Call, Fold, Plan, Script, Steps, Stream
from stratabox.client._requests import Seconds
from stratabox.client.errors import InvalidArgumentError, InvalidStateError, SandboxNotFoundError
from stratabox.client.records import (
    EventType,
    ExecuteResult,
    Page,
    S,
    SandboxEvent,
    SandboxState,
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


class SandboxPlans(CopyPlans[S]):
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
        cold: bool = False,
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
        :param cold: Boot from a memory snapshot's disks instead of going on from its memory.
        :param wait_for_ready: Return only when the guest's agent has answered.
        :param idempotency_key: The same key within 24 hours returns the same sandbox.
        :raise InvalidResourcesError: when a size is out of its limits.
        :raise AgentUnavailableError: when the guest was not ready in time; nothing is left of it.
        :raise QemuFailedError: when QEMU did not start; nothing is left of it.
        :raise NoSpaceError: when the host has no room.
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
                cold=cold,
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
    ) -> Plan[S]:
        """Replace what is given, whole; leave what is None.

        :raise InvalidArgumentError: when a value breaks a limit.
        """
        given = {"name": name, "env": env, "metadata": metadata, "tags": tags}
        with _requests.checked():
            request = pb.UpdateSandboxRequest(
                sandbox=records_pb2.Sandbox(
                    id=sandbox,
                    name=name or "",
                    env=env or {},
                    metadata=metadata or {},
                    tags=tags or (),
                ),
                update_mask=FieldMask(paths=[key for key in given if given[key] is not None]),
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

    def pause(self, sandbox: str) -> Plan[S]:
        """Stop the vCPUs and keep the RAM.

        :raise InvalidStateError: when the sandbox does not run.
        """
        with _requests.checked():
            request = pb.PauseSandboxRequest(sandbox=sandbox)
        return Call(_SERVICE, "PauseSandbox", request, self._make)

    def resume(self, sandbox: str) -> Plan[S]:
        """Continue a paused sandbox.

        :raise InvalidStateError: when it is not paused.
        """
        with _requests.checked():
            request = pb.ResumeSandboxRequest(sandbox=sandbox)
        return Call(_SERVICE, "ResumeSandbox", request, self._make)

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
        wait_for_ready: bool = True,
        ready_timeout: Seconds | None = None,
    ) -> Plan[S]:
        """Boot a stopped or failed sandbox from its disks.

        :raise InvalidStateError: when it is neither.
        :raise AgentUnavailableError: when the guest was not ready in time.
        :raise QemuFailedError: when QEMU did not start.
        """
        with _requests.checked():
            request = pb.StartSandboxRequest(
                sandbox=sandbox,
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
