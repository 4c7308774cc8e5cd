"""Network policies as messages, and back."""

from __future__ import annotations

from typing import Any

from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.network import Network, NetworkMode, network
from stratabox.v1 import network_pb2, records_pb2

_MODES = {
    NetworkMode.NONE: network_pb2.NETWORK_MODE_NONE,
    NetworkMode.EGRESS: network_pb2.NETWORK_MODE_EGRESS,
}
_WORDS = {number: mode for mode, number in _MODES.items()}


def put(message: records_pb2.Sandbox | records_pb2.Snapshot, policy: Network | None) -> None:
    """Write a record's policy into its message; None leaves the field unset."""
    if policy is not None:
        message.network.mode = _MODES[policy.mode]
        message.network.allow.extend(policy.allow)


def wanted(request: Any) -> Network | None:
    """The policy that a message names; None: it names none.

    :raise InvalidArgumentError: when it cannot be.
    """
    if not request.HasField("network"):
        return None
    message: network_pb2.Network = request.network
    mode = _WORDS.get(message.mode)
    if message.mode == network_pb2.NETWORK_MODE_UNSPECIFIED:
        mode = NetworkMode.EGRESS if message.allow else NetworkMode.NONE
    if mode is None:
        raise InvalidArgumentError(f"there is no network mode {message.mode}", field="network")
    return network(mode, message.allow)


def required(request: Any) -> Network:
    """The same, where one must be named. :raise InvalidArgumentError: when none is."""
    policy = wanted(request)
    if policy is None:
        raise InvalidArgumentError("update_mask names network, and none is given", field="network")
    return policy
