"""What a copy is told: names, the script and the program in it, and agents that will not."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from stratabox.daemon.hypervisor.guest import exec as guest_exec
from stratabox.daemon.hypervisor.guest import identity, wake
from stratabox.daemon.hypervisor.guest.agent import AgentRefusedError
from stratabox.daemon.hypervisor.guest.identity import (
    Renewal,
    errand,
    hostname_of,
    orders,
    script,
    tell,
)
from stratabox.storage.model.ids import mint

NEW = Renewal.mint("it's", "0123456789", "52:54:00:12:34:56")


class Agent:
    """Stands for `GuestAgent`: answers from a table of functions, and notes what it was asked."""

    def __init__(self, **answers: Callable[[Mapping[str, Any]], object]) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.clock_off = 0.0
        self.has_program = False
        self._answers = {name.replace("_", "-"): answer for name, answer in answers.items()}

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, **_: object
    ) -> Awaitable[object]:
        async def answer() -> object:
            self.asked.append((command, arguments or {}))
            return self._answers[command](arguments or {})

        return answer()

    async def get_time(self) -> int:
        return int((time.time() + self.clock_off) * 1e9)

    async def set_time(self, nanoseconds: int) -> None:
        self.asked.append(("guest-set-time", {"time": nanoseconds}))

    async def fsfreeze_status(self) -> str:
        return "thawed"


def refuses(arguments: Mapping[str, Any]) -> object:
    raise AgentRefusedError("guest-exec", "CommandNotFound", "it has been disabled")


class Shell(Agent):
    """An agent whose commands only say that they have done something."""

    def __init__(self, says: str, lacks: str = "") -> None:
        super().__init__(guest_exec=self._start, guest_exec_status=self._status)
        self._says = says
        self._lacks = lacks

    def _start(self, arguments: Mapping[str, Any]) -> object:
        if arguments["path"] == self._lacks:
            words = f"Failed to execute child process “{self._lacks}” (No such file or directory)"
            raise AgentRefusedError("guest-exec", "GenericError", words)
        self._marker = dict(each.split("=", 1) for each in arguments["env"])[guest_exec.MARKER]
        return {"pid": 1}

    def _status(self, arguments: Mapping[str, Any]) -> object:
        said = self._says.format(marker=self._marker).encode()
        return {"exited": True, "exitcode": 0, "err-data": base64.b64encode(said).decode()}


@pytest.mark.parametrize(
    ("name", "hostname"),
    [
        ("worker-1", "worker-1"),
        ("My Box!", "my-box"),
        ("--a..b__c--", "a-b-c"),
        ("Ünïcode", "n-code"),
        ("日本", "sandbox-01234567"),
        ("x" * 62 + "-y", "x" * 62),
        ("'; reboot; '", "reboot"),
    ],
)
def test_host_names(name: str, hostname: str) -> None:
    assert hostname_of(name, "0123456789") == hostname


@pytest.mark.parametrize("renewal", [None, NEW])
def test_the_script_is_sound_and_holds_no_quote_in_a_value(renewal: Renewal | None) -> None:
    text = script(renewal)
    subprocess.run(["sh", "-n"], input=text, check=True)
    values = text.split(b"\nfailed=")[0]
    for line in values.decode().replace("\n'", "'").splitlines():
        assert line.count("'") in (0, 1, 2)
    assert (b"PRIVATE KEY" in text) is (renewal is not None)


def test_two_are_never_the_same() -> None:
    other = Renewal.mint("it's", "0123456789", NEW.mac)
    assert other.hostname == NEW.hostname == "it-s"
    for field in ("machine_id", "host_key", "public_key"):
        assert getattr(other, field) != getattr(NEW, field)
    assert script().split(b"seed=")[1][:256] != script().split(b"seed=")[1][:256]


def test_the_program_asks_for_reseeding(tmp_path: Path) -> None:
    program = tmp_path / "reseed"
    program.write_bytes(identity._reseed_program())
    program.chmod(0o700)
    # What is no source of random numbers does not know the question: ENOTTY.
    assert subprocess.run([program], stdin=subprocess.DEVNULL, check=False).returncode == 25
    with Path("/dev/urandom").open("rb") as urandom:
        done = subprocess.run([program], stdin=urandom, check=False)
    assert done.returncode in (0, 1)  # EPERM for those who may not


async def test_what_could_not_be_done_is_said() -> None:
    shell = Shell("{marker} host name, machine-id\nmore\n")
    assert await tell(shell, NEW) == "host name, machine-id"  # type: ignore[arg-type]
    request = dict(shell.asked)["guest-exec"]
    told = base64.b64decode(request["input-data"])
    assert NEW.host_key.encode() in told
    # No list of processes shows the key.
    assert NEW.host_key not in json.dumps({**request, "input-data": ""})


async def test_a_shell_that_says_nothing_has_done_nothing() -> None:
    assert "sh: not today" in await tell(Shell("sh: not today\n"), NEW)  # type: ignore[arg-type]


async def test_a_clock_that_is_off_all_the_same_is_set_by_the_agent() -> None:
    shell = Shell("{marker} clock\n")
    shell.clock_off = -3600
    before = time.time_ns()
    assert await tell(shell) == ""  # type: ignore[arg-type]
    ((_, given),) = [each for each in shell.asked if each[0] == "guest-set-time"]
    assert before <= given["time"] <= time.time_ns()


async def test_an_agent_that_may_run_nothing() -> None:
    agent = Agent(guest_exec=refuses)
    agent.clock_off = 86400
    failed = await tell(agent, NEW)  # type: ignore[arg-type]
    assert "it has been disabled" in failed
    assert "clock" not in failed
    assert "guest-set-time" in dict(agent.asked)


async def test_a_command_brings_the_script_along() -> None:
    shell = Shell("{marker} clock\nits own words\n")
    result = await guest_exec.execute(shell, ["true"], first=errand())  # type: ignore[arg-type]
    assert (result.first, result.stderr) == ("clock", b"its own words\n")
    # Without one, nothing is taken for a report.
    shell = Shell("{marker} clock\n")
    result = await guest_exec.execute(shell, ["true"])  # type: ignore[arg-type]
    assert result.first is None
    assert result.stderr.endswith(b" clock\n")
    assert "input-data" not in dict(shell.asked)["guest-exec"]


async def test_the_program_is_used_where_it_is() -> None:
    shell = Shell("{marker} clock\nits own words\n")
    shell.has_program = True
    began = time.time_ns()
    result = await guest_exec.execute(shell, ["true"], cwd="a", first=errand())  # type: ignore[arg-type]
    assert (result.first, result.stderr) == ("clock", b"its own words\n")
    request = dict(shell.asked)["guest-exec"]
    assert (request["path"], request["arg"]) == (wake.PROGRAM, ["/a", "true"])
    told = base64.b64decode(request["input-data"])
    before, _, rest = told.partition(b"c\x05\0clock\0\x10\0")
    assert before == b""
    assert began // 10**9 <= struct.unpack_from("<q", rest)[0] <= time.time()
    assert len(told) < len(orders(NEW)) < wake.LARGEST
    # By itself, without a command; no list of processes shows the key.
    shell = Shell("{marker} random numbers, machine-id\n")
    shell.has_program = True
    assert await tell(shell, NEW) == "random numbers, machine-id"  # type: ignore[arg-type]
    request = dict(shell.asked)["guest-exec"]
    assert (request["path"], request["arg"]) == (wake.PROGRAM, [])
    assert NEW.host_key.encode() in base64.b64decode(request["input-data"])
    assert NEW.host_key not in json.dumps({**request, "input-data": ""})


async def test_the_shell_does_where_the_program_is_not() -> None:
    shell = Shell("{marker} \n", lacks=wake.PROGRAM)
    shell.has_program = True
    for _ in range(2):
        result = await guest_exec.execute(shell, ["true"], first=errand())  # type: ignore[arg-type]
        assert result.first == ""
    paths = [given["path"] for command, given in shell.asked if command == "guest-exec"]
    assert paths == [wake.PROGRAM, "/bin/sh", "/bin/sh"]


def test_a_sandbox_without_a_name_has_its_id() -> None:
    sandbox = mint()
    assert hostname_of("", sandbox) == f"sandbox-{sandbox[:8]}"
