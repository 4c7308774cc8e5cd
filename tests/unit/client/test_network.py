"""What a sandbox may reach, as requests and as words on the command line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stratabox.client import (
    Client,
    InvalidArgumentError,
    Network,
    NetworkFailedError,
    NetworkMode,
    NetworkUnavailableError,
    NetworkUnsupportedError,
    errors,
)
from stratabox.client._requests import network
from stratabox.v1 import network_pb2, sandboxes_pb2

EGRESS, NONE = network_pb2.NETWORK_MODE_EGRESS, network_pb2.NETWORK_MODE_NONE


def test_a_policy_is_asked_for_in_several_ways() -> None:
    for asked, mode, allow in (
        ("none", NONE, []),
        ("egress", EGRESS, ["public"]),
        (["a.org", "10.0.0.0/8"], EGRESS, ["a.org", "10.0.0.0/8"]),
        (Network(allow=("a.org",)), EGRESS, ["a.org"]),
        (Network(mode=NetworkMode.NONE), NONE, []),
        ([], EGRESS, []),  # which the daemon refuses: nobody opens all by an empty list
    ):
        message = network(asked)
        assert message is not None
        assert (message.mode, list(message.allow)) == (mode, allow), asked
    assert network(None) is None
    for wrong in ("public", "unknown", "", "a.org"):
        with pytest.raises(InvalidArgumentError):
            network(wrong)


def test_every_call_takes_one(daemon: Any, run: Any, make: Any) -> None:
    record = make.sandbox()
    record.network.mode = EGRESS
    record.network.allow.append("a.org:443")
    daemon.answers["CreateSandbox"] = daemon.answers["UpdateSandbox"] = record
    daemon.answers["RestoreSnapshot"] = record
    clones = sandboxes_pb2.CloneSandboxResponse(snapshot=make.snapshot())
    clones.results.add().sandbox.CopyFrom(record)
    daemon.answers["CloneSandbox"] = clones
    for call, *words in (
        ("CreateSandbox", "sandbox", "create"),
        ("CloneSandbox", "sandbox", "clone", "debugbox"),
        ("RestoreSnapshot", "snapshot", "restore", "s"),
    ):
        assert run(*words).exit_code == 0
        assert not daemon.last(call).HasField("network")
        assert run(*words, "--network", "egress").exit_code == 0
        assert list(daemon.last(call).network.allow) == ["public"]
        result = run(*words, "--allow", "a.org:443", "--allow", "10.0.0.0/8", "--json")
        assert result.exit_code == 0, result.stderr
        assert list(daemon.last(call).network.allow) == ["a.org:443", "10.0.0.0/8"]
        refused = run(*words, "--network", "none", "--allow", "a.org")
        assert refused.exit_code == 2
        assert "--allow names something" in refused.stderr
    result = run("sandbox", "update", "debugbox", "--network", "none", "--json")
    sent = daemon.last("UpdateSandbox")
    assert list(sent.update_mask.paths) == ["network"]
    assert (sent.sandbox.network.mode, list(sent.sandbox.network.allow)) == (NONE, [])
    body = json.loads(result.stdout)
    assert body["network"] == {"mode": "egress", "allow": ["a.org:443"]}
    assert "a.org:443" in run("sandbox", "update", "debugbox", "--allow", "a.org:443").stdout


def test_a_record_tells_its_network(daemon: Any, make: Any) -> None:
    daemon.answers["GetSandbox"] = make.sandbox()
    with Client(daemon.address) as client:
        # Of a daemon that knows of none: it has none.
        assert client.sandboxes.get("s").network == Network(mode=NetworkMode.NONE)
        daemon.answers["GetSnapshot"] = make.snapshot()
        assert client.snapshots.get("s").network is None


@pytest.mark.parametrize(
    "kind", [NetworkFailedError, NetworkUnavailableError, NetworkUnsupportedError]
)
def test_its_errors_are_known(kind: type[errors.StrataboxError]) -> None:
    assert type(errors.from_reason(kind.default_reason, "why")) is kind
