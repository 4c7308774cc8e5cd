"""What a domain tells by itself: QEMU's events as small records, and what they mean to us.

Pure: a QMP message in, a record or None out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

AGENT_PORT = "agent-port"
"""Id of the guest agent's virtio-serial port."""
CHANNEL_PORTS = ("channel-port-0", "channel-port-1")
"""Ids of the virtio-serial ports of the channel to the guest's sshd."""
EXEC_PORT = "exec-port"
"""Id of the one that commands go by while there is no channel."""


@dataclass(frozen=True)
class Shutdown:
    """QEMU is about to end. `guest`: the guest powered itself off."""

    guest: bool
    reason: str
    """QEMU's word, as "guest-shutdown" or "host-signal"."""


@dataclass(frozen=True)
class Reset:
    """The guest starts over. `guest`: by its own doing."""

    guest: bool
    reason: str


@dataclass(frozen=True)
class Stopped:
    """The vCPUs stopped."""


@dataclass(frozen=True)
class Resumed:
    """The vCPUs run again."""


@dataclass(frozen=True)
class Panicked:
    """The guest's kernel panicked; the domain stays, stopped, with runstate "guest-panicked"."""


@dataclass(frozen=True)
class BlockError:
    """A disk operation failed. `action`: "stop" (the domain was stopped), "report" or "ignore"."""

    node: str
    """Node of the disk's active layer."""
    nospace: bool
    action: str
    what: str = ""
    """The operation and the host's own word for what failed, for people."""


@dataclass(frozen=True)
class AgentPort:
    """The guest's agent opened or closed its port. QEMU tells at most one change each second."""

    open: bool


@dataclass(frozen=True)
class ChannelPort:
    """The guest opened or closed a port of its channel. Told as an `AgentPort` is."""

    number: int
    open: bool


@dataclass(frozen=True)
class Wired:
    """QEMU has taken, or lost, the connection that its guest's network card is wired to."""

    connected: bool


@dataclass(frozen=True)
class Reconnected:
    """The monitor was lost and is back; what happened meanwhile was not told. Ask `status`."""


@dataclass(frozen=True)
class Exited:
    """The process is gone; the last event of a domain."""

    reason: str
    """A sentence for people."""
    guest: bool
    """The guest powered itself off, in its own good order."""
    status: int | None
    """Exit code, or minus the signal's number; None when QEMU was not this daemon's child."""


Event: TypeAlias = (
    Shutdown
    | Reset
    | Stopped
    | Resumed
    | Panicked
    | BlockError
    | AgentPort
    | ChannelPort
    | Wired
    | Reconnected
    | Exited
)
OnEvent: TypeAlias = Callable[[Event], None]


def parse(message: Mapping[str, object]) -> Event | None:
    """The record of a QMP event; None for one that does not matter here."""
    data = message.get("data")
    details: Mapping[str, object] = data if isinstance(data, Mapping) else {}
    match message.get("event"):
        case "SHUTDOWN":
            return Shutdown(bool(details.get("guest")), str(details.get("reason", "")))
        case "RESET":
            return Reset(bool(details.get("guest")), str(details.get("reason", "")))
        case "STOP":
            return Stopped()
        case "RESUME":
            return Resumed()
        case "GUEST_PANICKED" | "GUEST_CRASHLOADED":
            return Panicked()
        case "BLOCK_IO_ERROR":
            return BlockError(
                str(details.get("node-name", "")),
                bool(details.get("nospace")),
                str(details.get("action", "")),
                f"{details.get('operation', '')}: {details.get('reason', '')}",
            )
        case "VSERPORT_CHANGE" if details.get("id") == AGENT_PORT:
            return AgentPort(bool(details.get("open")))
        case "VSERPORT_CHANGE" if details.get("id") in CHANNEL_PORTS:
            number = CHANNEL_PORTS.index(str(details.get("id")))
            return ChannelPort(number, bool(details.get("open")))
        case "NETDEV_STREAM_CONNECTED":
            return Wired(connected=True)
        case "NETDEV_STREAM_DISCONNECTED":
            return Wired(connected=False)
    return None


def describe_end(shutdown: Shutdown | None, *, panicked: bool, ended: str, last_words: str) -> str:
    """Say in a sentence why a domain ended, from all that is known.

    :param ended: how the process ended, as "exited with code 1".
    :param last_words: the tail of QEMU's own messages.
    """
    if shutdown is not None and shutdown.guest:
        if panicked or shutdown.reason == "guest-panic":
            return "The guest's kernel panicked."
        return "The guest powered itself off."
    if panicked:
        return f"The guest's kernel panicked, and QEMU {ended}."
    if shutdown is not None and shutdown.reason == "host-qmp-quit":
        return "The guest's plug was pulled by Stratabox."
    if shutdown is not None and shutdown.reason == "host-signal":
        return "QEMU was asked to end by a signal from the host, as kill and virsh destroy send it."
    words = f" Its last words: {last_words}" if last_words else ""
    return f"QEMU {ended}.{words}"
