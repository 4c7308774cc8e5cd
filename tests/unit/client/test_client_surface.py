"""What the SDK exports, and that both faces are the same."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import stratabox.client
from stratabox.client import (
    _events_faces,
    _files_aio,
    _files_sync,
    _ports_aio,
    _ports_sync,
    _workspace_faces,
    access_errors,
    aio,
    archives,
    background,
    errors,
    event_records,
    file_errors,
    file_records,
    host_records,
    network_errors,
    network_records,
    observed_errors,
    observed_records,
    port_errors,
    port_records,
    probe_records,
    process_records,
    records,
    sync,
    volume_errors,
    volume_records,
    workspace_records,
)
from stratabox.client._plans import Method

PAIRS = [
    (sync.Sandbox, aio.AsyncSandbox),
    (sync.Sandboxes, aio.AsyncSandboxes),
    (sync.Snapshots, aio.AsyncSnapshots),
    (sync.Images, aio.AsyncImages),
    (sync.Volumes, aio.AsyncVolumes),
    (_events_faces.Events, _events_faces.AsyncEvents),
    (sync.Jobs, aio.AsyncJobs),
    (sync.Client, aio.AsyncClient),
    (_files_sync.Files, _files_aio.AsyncFiles),
    (_ports_sync.Ports, _ports_aio.AsyncPorts),
    (_ports_sync.SandboxPorts, _ports_aio.AsyncSandboxPorts),
    (_ports_sync.Ssh, _ports_aio.AsyncSsh),
    (_ports_sync.SandboxSsh, _ports_aio.AsyncSandboxSsh),
    (_workspace_faces.Workspaces, _workspace_faces.AsyncWorkspaces),
    (_files_sync.SandboxFiles, _files_aio.AsyncSandboxFiles),
]


def public(holder: type) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if not name.startswith("_")}


def test_exported_names() -> None:
    exported = stratabox.client.__all__
    assert exported == sorted(exported)
    for name in exported:
        assert getattr(stratabox.client, name).__name__ == name
    ours = {
        name
        for module in (
            *(
                errors,
                event_records,
                access_errors,
                file_errors,
                file_records,
                records,
                host_records,
                volume_errors,
                volume_records,
                archives,
                background,
            ),
            *(observed_errors, observed_records, probe_records),
            *(port_errors, port_records),
            process_records,
            workspace_records,
            *(network_errors, network_records),
        )
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    late = {"AsyncClient", "AsyncConnection", "AsyncSandbox", "Client", "Connection", "Sandbox"}
    late |= {"AsyncProcess", "Process"}
    assert ours | late == set(exported)


def test_there_is_nothing_else() -> None:
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = stratabox.client.Nonsense


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_both_faces_have_the_same_methods(one: type, other: type) -> None:
    assert set(public(one)) == set(public(other))
    for name, method in public(one).items():
        twin = public(other)[name]
        if isinstance(method, Method):
            assert method._build is twin._build, name
            assert method._carry == twin._carry, name
        assert method.__doc__, name


def test_methods_tell_their_parameters_and_documentation() -> None:
    with sync.Client("unix:///nowhere") as client:
        create = client.sandboxes.create
        assert [*inspect.signature(create).parameters][:3] == ["image", "snapshot", "name"]
        assert create.__doc__
        assert "MiB" in create.__doc__
        execute = inspect.signature(client.sandboxes.execute)
        assert [*execute.parameters][:2] == ["sandbox", "command"]


def test_importing_the_package_or_asking_for_help_does_not_import_grpc() -> None:
    late = {"grpc", "rich", "google"}
    code = f"import sys, stratabox.client.cli; sys.exit(bool({late} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_reason_has_its_class() -> None:
    for name in stratabox.client.__all__:
        kind = getattr(stratabox.client, name)
        if not name.endswith("Error") or kind in errors._LOCAL:
            continue
        made = errors.from_reason(kind.default_reason, "why", {"a": "b"})
        assert type(made) is kind
        assert made.metadata == {"a": "b"}
    stranger = errors.from_reason("NEW_REASON", "why", otherwise=errors.DeniedError)
    assert type(stranger) is errors.DeniedError
    assert stranger.reason == "NEW_REASON"
