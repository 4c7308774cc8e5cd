"""Puts guests into scopes of their own (systemd.scope(5)), out of the daemon's control group.

```
stratabox.slice
├── stratabox-guest-ID-PID.scope       QEMU of a sandbox
├── stratabox-network-ID-PID.scope     the helper of its network
└── …                                  each with figures of its own in systemd-cgtop
system.slice
└── strataboxd.service                 the daemon; stopped, restarted or upgraded without them
```

Only where systemd runs the daemon. The manager is spoken to on its own socket, so that no message
bus is needed. A guest that cannot be put into a scope runs on in the daemon's group (unless limits
are required), which ``KillMode=process`` lets it outlive, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from jeepney import DBusAddress, HeaderFields, Message, MessageType, new_method_call
from jeepney.auth import BEGIN, AuthenticationError, Authenticator
from jeepney.low_level import Parser

from stratabox.daemon.hypervisor.housing import HouseError
from stratabox.daemon.hypervisor.limits import GroupLimits, scope_properties
from stratabox.storage.model.ids import SandboxId

SLICE = "stratabox.slice"
_DAEMON = "strataboxd.service"
_SECONDS = 15.0
_LARGEST = 1 << 20
"""Bytes of an answer."""
_MANAGER = DBusAddress(
    "/org/freedesktop/systemd1",
    bus_name="org.freedesktop.systemd1",
    interface="org.freedesktop.systemd1.Manager",
)


class SystemdError(Exception):
    """systemd does not do it, and why."""


def manager_socket(environ: Mapping[str, str]) -> Path | None:
    """Where the service manager that runs this daemon listens; None: none runs it."""
    if environ.get("SYSTEMD_EXEC_PID") != str(os.getpid()):
        return None
    if os.geteuid() == 0:
        return Path("/run/systemd/private")
    runtime = environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "systemd/private") if runtime else None


class Scopes:
    """Asks one service manager for scopes; implements `House`. Each message has a connection.

    :param socket: as of `manager_socket`.
    :param place: a folder on the device whose bandwidth is limited.
    """

    def __init__(self, socket: Path, place: Path) -> None:
        self._socket = socket
        self._place = place

    async def put(
        self, kind: str, sandbox: SandboxId, pid: int, limits: GroupLimits | None
    ) -> None:
        """Have a process run in a scope of its own, which goes with its last process.

        :raise HouseError: when systemd does not make it, or does not answer.
        """
        name = f"stratabox-{kind}-{sandbox}-{pid}.scope"
        properties = [
            ("Description", ("s", f"Stratabox {kind} {sandbox}")),
            ("PIDs", ("au", [pid])),
            ("Slice", ("s", SLICE)),
            ("CollectMode", ("s", "inactive-or-failed")),
            # Units end in the reverse order: when the host goes down, the daemon ends first, and
            # does not take what happens to its guests then for failures of theirs.
            ("Before", ("as", [_DAEMON])),
            *(scope_properties(limits, str(self._place)) if limits is not None else ()),
        ]
        auxiliary: list[object] = []
        body = (name, "fail", properties, auxiliary)
        try:
            async with asyncio.timeout(_SECONDS):
                await self._run("StartTransientUnit", "ssa(sv)a(sa(sv))", body)
        except TimeoutError as error:
            raise HouseError(f"{name}: systemd does not answer within {_SECONDS:g} s") from error
        except (OSError, SystemdError, AuthenticationError) as error:
            raise HouseError(f"{name}: {error}") from error

    async def keep(self) -> None:
        """Nothing: systemd removes scopes itself."""

    def close(self) -> None:
        """Nothing is held."""

    async def _run(self, method: str, signature: str, body: tuple[object, ...]) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            greeting = Authenticator()
            for piece in greeting:
                writer.write(piece)
                greeting.feed(await _some(reader))
            writer.write(BEGIN)
            message = new_method_call(_MANAGER, method, signature, body)
            writer.write(message.serialise(serial=1))
            parser, job, over = Parser(), None, dict[str, str]()
            while True:
                parser.add_data(await _some(reader))
                while (answer := parser.get_next_message()) is not None:
                    job = _job_in(answer) or job
                    over |= _ended_job(answer)
                # Before its job is done the unit is not there yet, nor are its limits.
                if job in over:
                    if over[job] != "done":
                        raise SystemdError(f"its job ends as {over[job]}")
                    return
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _some(reader: asyncio.StreamReader) -> bytes:
    piece = await reader.read(_LARGEST)
    if not piece:
        raise SystemdError("it hangs up")
    return piece


def _job_in(message: Message) -> str | None:
    """The job that our only message has begun. :raise SystemdError: the answer is an error."""
    match message.header.message_type:
        case MessageType.method_return:
            return str(message.body[0])
        case MessageType.error:
            raise SystemdError(f"{_error_name(message)}: {' '.join(map(str, message.body))}")
    return None


def _ended_job(message: Message) -> dict[str, str]:
    """Job → how it ended, where that is what is told: to each connection, without being asked."""
    if message.header.message_type is not MessageType.signal:
        return {}
    if message.header.fields.get(HeaderFields.member) != "JobRemoved":
        return {}
    _, job, _, result = message.body
    return {str(job): str(result)}


def _error_name(message: Message) -> str:
    return str(message.header.fields.get(HeaderFields.error_name, "error"))
