"""Guests that misbehave, on purpose or for want of something: the daemon and others go on.

All are copies of one tiny guest's memory; another guest, the *witness*, works all the while.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from stratabox.client import (
    AgentUnavailableError,
    Client,
    ExecuteResult,
    Sandbox,
    SandboxState,
    Snapshot,
    StrataboxError,
    UnavailableError,
)
from support.daemon import DaemonProcess, daemon
from support.hostile import CHANNEL_LIES, LIES, lie, teach

MIB = 1 << 20
FEW = ("silent", "endless", "nested", "crowded", "strange", "channel-noise")
"""Each liar keeps a vCPU busy for a while; `make soak` has them all."""
TOLD = (*LIES, *CHANNEL_LIES) if os.environ.get("STRATABOX_SOAK_LIES") else FEW


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon of these tests' own, whose memory is looked at."""
    with daemon(tmp_path_factory.mktemp("hostile")) as process:
        yield process


@pytest.fixture(scope="module")
def client(process: DaemonProcess) -> Iterator[Client]:
    """A client of it."""
    with process.start() as client:
        client.images.build_tiny()
        yield client


@pytest.fixture(scope="module")
def witness(client: Client) -> Iterator[Sandbox]:
    """A guest that has nothing to do with the others."""
    with client.sandboxes.create(image="tiny", memory=128) as sandbox:
        teach(sandbox)
        yield sandbox


@pytest.fixture(scope="module")
def origin(witness: Sandbox) -> Snapshot:
    """What the others are copies of."""
    return witness.snapshot(level="memory", name="origin")


@dataclass
class Liars:
    """Guests whose agents lie, and what becomes of a command in each, meanwhile."""

    copies: dict[str, Sandbox]
    calls: dict[str, Future[StrataboxError | ExecuteResult]]
    resident: int
    """Bytes that the daemon had before."""


@pytest.fixture(scope="module")
def liars(client: Client, process: DaemonProcess, origin: Snapshot) -> Iterator[Liars]:
    """They lie for as long as the other tests go on."""
    copies = {how: client.snapshots.restore(origin.id, name=how, identity="keep") for how in TOLD}
    before = resident(process, "VmRSS")
    forget_peak(process)
    for how, copy in copies.items():
        lie(copy, how)
    with ThreadPoolExecutor(len(copies)) as pool:
        calls = {how: pool.submit(first_failure, client, copy, how) for how, copy in copies.items()}
        yield Liars(copies, calls, before)
    for copy in copies.values():
        copy.delete()


@pytest.fixture
def victim(client: Client, origin: Snapshot, liars: Liars) -> Iterator[Sandbox]:
    """A copy that may be done anything to."""
    with client.snapshots.restore(origin.id, identity="keep") as sandbox:
        yield sandbox


@contextmanager
def goes_on(witness: Sandbox) -> Iterator[list[int]]:
    """The witness does one thing after another meanwhile, each right; counts them."""
    done: list[int] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            number = len(done)
            assert witness.execute(f"echo {number}").check().stdout == f"{number}\n".encode()
            done.append(number)

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield done
        finally:
            ended.set()
        working.result()
    assert done


def resident(process: DaemonProcess, what: str = "VmHWM") -> int:
    """The daemon's memory, bytes: now (VmRSS), or the most since `forget_peak`."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(what)


def forget_peak(process: DaemonProcess) -> None:
    """Let the most that the daemon took be what it takes now."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def ended_by(sandbox: Sandbox, line: str, timeout: float = 20) -> StrataboxError | ExecuteResult:
    """What becomes of a command."""
    try:
        return sandbox.execute(line, timeout=timeout)
    except StrataboxError as error:
        return error


def first_failure(client: Client, sandbox: Sandbox, how: str) -> StrataboxError | ExecuteResult:
    """What becomes of a command, or of a question by the channel, once lies have begun.

    The guest is ended then. No memory of it, and no disk, depends on what it says.
    """
    outcome: StrataboxError | ExecuteResult | None = None
    while outcome is None:
        if how in CHANNEL_LIES:
            try:
                client.files.stat(sandbox.id, "/")
            except StrataboxError as error:
                outcome = error
        else:
            answer = ended_by(sandbox, "true")
            outcome = None if isinstance(answer, ExecuteResult) and answer.ok else answer
    assert sandbox.snapshot(level="crash").frozen_filesystems == 0
    # One is asked in vain, the others are not.
    assert sandbox.stop(force=how != "silent", timeout=1).state is SandboxState.STOPPED
    return outcome


def test_an_agent_that_dies_with_a_command_under_way(victim: Sandbox, witness: Sandbox) -> None:
    with goes_on(witness):
        line = "(sleep 1; kill -9 $(pidof qemu-ga)) & sleep 4321; echo never"
        with pytest.raises(AgentUnavailableError):
            victim.execute(line)
        # Its init has started another one, and that is found.
        assert victim.execute("echo again").stdout == b"again\n"


def test_a_guest_without_memory_says_so(victim: Sandbox, witness: Sandbox) -> None:
    with goes_on(witness):
        victim.execute("echo 1 >/proc/sys/vm/overcommit_memory").check()
        result = victim.execute("dd if=/dev/zero of=/dev/null bs=200M count=1")
    assert (result.signal, result.exit_code) in ((9, None), (None, 137))
    assert result.out_of_memory
    assert not result.timed_out
    killed = victim.execute("kill -9 $$")
    assert (killed.signal, killed.out_of_memory) == (9, False)
    assert victim.execute("exit 137").out_of_memory is False


def test_a_guest_without_room_says_so(victim: Sandbox, witness: Sandbox) -> None:
    with goes_on(witness):
        victim.execute("fallocate -l $(($(stat -f -c '%a * %S' /) - 4000000)) /most").check()
        result = victim.execute("dd if=/dev/zero of=/full bs=1M")
    assert result.exit_code == 1
    assert result.disk_full
    assert victim.execute("echo more >/more; false").disk_full
    victim.execute("rm /full /most").check()
    assert victim.execute("false").disk_full is False


def test_a_fork_bomb(client: Client, victim: Sandbox, witness: Sandbox) -> None:
    with goes_on(witness):
        bomb = "bomb() { bomb | bomb & }; sleep 1; bomb"
        victim.execute(f"setsid sh -c '{bomb}' >/dev/null 2>&1 </dev/null &").check()
        time.sleep(3)
        outcome = ended_by(victim, "true", timeout=5)
        assert isinstance(outcome, ExecuteResult | StrataboxError)
        snapshot = victim.snapshot(level="crash")
        assert victim.stop(force=True).state is SandboxState.STOPPED
        client.snapshots.delete(snapshot.id)
    victim.start()
    assert victim.execute("echo back").stdout == b"back\n"


def test_an_agent_that_lies(process: DaemonProcess, witness: Sandbox, liars: Liars) -> None:
    with goes_on(witness):
        outcomes = {how: call.result() for how, call in liars.calls.items()}
    for how, outcome in outcomes.items():
        if how in CHANNEL_LIES:
            assert isinstance(outcome, UnavailableError), (how, outcome)
            assert outcome.reason == "CHANNEL_UNAVAILABLE"
        elif how == "strange":  # an answer like another's, but for its sense
            assert isinstance(outcome, ExecuteResult | AgentUnavailableError)
        else:
            assert isinstance(outcome, AgentUnavailableError), (how, outcome)
    assert resident(process) - liars.resident < 160 * MIB
