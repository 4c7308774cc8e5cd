"""Readiness probes: what is sound, what rules, and that they are kept and sent as they are."""

from __future__ import annotations

from datetime import timedelta

import click
import pytest
from click.testing import CliRunner

from stratabox.client import InvalidArgumentError as ClientInvalidArgumentError
from stratabox.client import ReadinessProbe, _convert, _probes
from stratabox.client.cli.probes import probe_options
from stratabox.daemon.api import probes as api_probes
from stratabox.daemon.lifecycle.running import probing
from stratabox.storage.catalog import probes
from stratabox.storage.model.errors import InvalidArgumentError
from stratabox.storage.model.probes import Probe, chosen
from stratabox.v1 import records_pb2, sandboxes_pb2

SOUND = (
    Probe(argv=("true",)),
    Probe(argv=("/bin/sh", "-c", "test -e /go"), interval=0.1, timeout=3600),
    Probe(port=65535, start_period=0),
    Probe(port=1, path="/a?b=%20c", start_period=86400),
)


@pytest.mark.parametrize("probe", SOUND)
def test_sound_ones_are_kept_and_sent_as_they_are(probe: Probe) -> None:
    assert probing.check(probe) is probe
    assert probe.checks
    assert probes.load(probes.dump(probe)) == probe
    record = records_pb2.Sandbox()
    api_probes.put(record, probe)
    assert api_probes.probe_from(record) == probe
    told = _convert.probe_of(record)
    again = sandboxes_pb2.CreateSandboxRequest(readiness_probe=_probes.message(told))
    assert api_probes.probe_from(again) == probe


@pytest.mark.parametrize(
    "probe",
    [
        Probe(argv=("",)),
        Probe(argv=("a\0b",)),
        Probe(argv=("x" * 40_000,)),
        Probe(argv=("true",), port=80),
        Probe(port=65536),
        Probe(port=-1),
        Probe(port=80, path="a"),
        Probe(port=80, path="/a b"),
        Probe(port=80, path="/\r\nX: y"),
        Probe(port=80, path="/" + "a" * 3000),
        Probe(port=80, interval=0.05),
        Probe(port=80, timeout=3601),
        Probe(port=80, start_period=-1),
        Probe(port=80, start_period=90_000),
        Probe(port=80, interval=float("nan")),
    ],
)
def test_unsound_ones_are_refused(probe: Probe) -> None:
    with pytest.raises(InvalidArgumentError):
        probing.check(probe)


def test_which_one_rules() -> None:
    one, other = SOUND[0], SOUND[1]
    assert chosen(None, None) is None
    assert chosen(None, one) is one
    assert chosen(other, one) is other
    assert chosen(Probe(), one) is None
    assert probes.load(probes.dump(None)) is None
    empty = sandboxes_pb2.CreateSandboxRequest(readiness_probe=_probes.message(ReadinessProbe()))
    assert api_probes.probe_from(empty) == Probe()
    assert api_probes.probe_from(sandboxes_pb2.CreateSandboxRequest()) is None


def test_messages_that_say_nothing_or_two_things() -> None:
    check = records_pb2.CommandCheck
    for message in (
        records_pb2.ReadinessProbe(command=check()),
        records_pb2.ReadinessProbe(command=check(argv=["a"], shell="b")),
        records_pb2.ReadinessProbe(port=0),
        records_pb2.ReadinessProbe(http=records_pb2.HttpCheck(path="/")),
    ):
        with pytest.raises(InvalidArgumentError):
            api_probes.probe_from(sandboxes_pb2.CreateSandboxRequest(readiness_probe=message))
    for probe in (ReadinessProbe(command="a", port=1), ReadinessProbe(path="/")):
        with pytest.raises(ClientInvalidArgumentError):
            _probes.message(probe)


@pytest.mark.parametrize(
    ("words", "probe"),
    [
        ("", None),
        ("--ready-cmd true", ReadinessProbe(command="true")),
        ("--ready-port 80", ReadinessProbe(port=80)),
        ("--ready-http 80", ReadinessProbe(port=80, path="/")),
        ("--ready-http :8080/a/b?c", ReadinessProbe(port=8080, path="/a/b?c")),
        ("--no-ready-probe", ReadinessProbe()),
        (
            "--ready-port 80 --ready-interval 500ms --ready-try 2s --ready-start-period 1m",
            ReadinessProbe(
                port=80,
                interval=timedelta(seconds=0.5),
                timeout=timedelta(seconds=2),
                start_period=timedelta(minutes=1),
            ),
        ),
        ("--ready-cmd true --ready-port 80", 2),
        ("--ready-cmd true --no-ready-probe", 2),
        ("--ready-try 2s", 2),
        ("--ready-http /health", 2),
        ("--ready-http 99999/health", 2),
        ("--ready-port 0", 2),
    ],
)
def test_on_the_command_line(words: str, probe: ReadinessProbe | int | None) -> None:
    seen: list[ReadinessProbe | None] = []

    @click.command()
    @probe_options
    def command(readiness_probe: ReadinessProbe | None) -> None:
        seen.append(readiness_probe)

    done = CliRunner().invoke(command, words.split())
    if isinstance(probe, int):
        assert done.exit_code == probe, done.output
    else:
        assert (done.exit_code, seen) == (0, [probe])
