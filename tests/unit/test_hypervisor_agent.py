"""The guest's agent as a liar, a sluggard and a flood: against a peer in this process."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from stratabox.daemon.hypervisor import sockets
from stratabox.daemon.hypervisor.guest import agent as agent_module
from stratabox.daemon.hypervisor.guest import exec as guest_exec
from stratabox.daemon.hypervisor.guest.agent import AgentRefusedError, GuestAgent
from stratabox.daemon.hypervisor.guest.agent_channel import AgentGoneError
from stratabox.storage.model.errors import InvalidArgumentError

Answer = Callable[[dict[str, Any]], Awaitable[bytes | None]]


class Peer:
    """Speaks for the guest: answers syncs, and everything else by `answer`."""

    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self.heard: list[str] = []
        self.before_sync = b""
        self.answer: Answer = self.says({})

    @staticmethod
    def says(value: object) -> Answer:
        async def answer(request: dict[str, Any]) -> bytes | None:
            return json.dumps({"return": value}).encode() + b"\n"

        return answer

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._listening.setblocking(False)
        while True:
            sock, _ = await loop.sock_accept(self._listening)
            with sock:
                buffer = b""
                while data := await loop.sock_recv(sock, 65536):
                    buffer += data
                    *lines, buffer = buffer.split(b"\n")
                    for line in lines:
                        reply = await self._reply(json.loads(line.lstrip(b"\xff")))
                        if reply is not None:
                            await loop.sock_sendall(sock, reply)

    async def _reply(self, request: dict[str, Any]) -> bytes | None:
        command = request["execute"]
        self.heard.append(command)
        if command != "guest-sync-delimited":
            return await self.answer(request)
        number = request["arguments"]["id"]
        return self.before_sync + b"\xff" + json.dumps({"return": number}).encode() + b"\n"


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    with sockets.listen(tmp_path, sockets.AGENT) as listening:
        peer = Peer(listening)
        serving = asyncio.create_task(peer.serve())
        yield peer
        serving.cancel()
        await asyncio.wait((serving,))


@pytest.fixture
async def agent(tmp_path: Path, peer: Peer) -> AsyncIterator[GuestAgent]:
    agent = GuestAgent(tmp_path)
    yield agent
    await agent.close()


async def test_one_sync_is_enough(agent: GuestAgent, peer: Peer) -> None:
    await agent.ping()
    await agent.ping()
    assert peer.heard == ["guest-sync-delimited", "guest-ping", "guest-ping"]


async def test_who_asks_early_has_asked_before_anything_is_waited_for(
    agent: GuestAgent, tmp_path: Path
) -> None:
    with sockets.listen(tmp_path, sockets.AGENT) as listening:
        agent.ask_early()
        # Nothing else has run: so the question is with QEMU before a `cont` can be.
        listening.settimeout(0)
        sock, _ = listening.accept()
        with sock:
            sock.settimeout(0)
            assert sock.recv(4096).startswith(b'\xff{"execute": "guest-sync-delimited"')


async def test_an_early_question_is_answered_once(agent: GuestAgent, peer: Peer) -> None:
    agent.ask_early()
    await agent.wait_ready(60)
    await agent.ping()
    assert peer.heard == ["guest-sync-delimited", "guest-ping"]


async def test_an_early_question_that_a_reset_has_lost_is_asked_again(
    agent: GuestAgent, peer: Peer
) -> None:
    agent.ask_early()
    agent.port_changed(is_open=False)
    await agent.wait_ready(60)
    assert peer.heard == ["guest-sync-delimited"] * 2


async def test_a_late_reply_is_never_taken_for_anothers(agent: GuestAgent, peer: Peer) -> None:
    async def slow(request: dict[str, Any]) -> bytes | None:
        return None

    await agent.ping()  # in step, so that it is the command that takes its time
    peer.answer = slow
    with pytest.raises(AgentGoneError):
        await agent.execute("guest-fsfreeze-status", timeout=0.05)
    # Now it comes, with garbage and the answer to a sync of long ago.
    peer.before_sync = b'{"return": "frozen"}\nxx\xff{"return": 1}\n\xff\n\xff[[[\n'
    peer.answer = Peer.says("thawed")
    assert await agent.fsfreeze_status() == "thawed"


async def test_a_cancelled_command_leaves_the_channel_usable(agent: GuestAgent, peer: Peer) -> None:
    asked, release = asyncio.Event(), asyncio.Event()

    async def slow(request: dict[str, Any]) -> bytes | None:
        asked.set()
        await release.wait()
        return b'{"return": 1}\n'

    peer.answer = slow
    task = asyncio.create_task(agent.execute("guest-a", timeout=600))
    await asked.wait()
    task.cancel()
    await asyncio.wait((task,))
    release.set()
    peer.answer = Peer.says(2)
    assert await agent.execute("guest-b") == 2


@pytest.mark.parametrize(
    "reply",
    [
        b"x" * 3000 + b"\n",
        b"not json\n",
        b"[1]\n",
        b'{"neither": 1}\n',
        b"[" * 1500 + b"\n",
        b'{"return":' + b"9" * 1800 + b"\n",
        b"\xff\xfe\n",
    ],
)
async def test_nonsense_is_an_agent_that_does_not_answer(
    agent: GuestAgent, peer: Peer, reply: bytes
) -> None:
    async def nonsense(request: dict[str, Any]) -> bytes | None:
        return reply

    peer.answer = nonsense
    with pytest.raises(AgentGoneError):
        await agent.execute("guest-info", limit=2000, timeout=5)
    peer.answer = Peer.says({})
    await agent.ping()


async def test_nesting_deeper_than_python_can_follow(agent: GuestAgent, peer: Peer) -> None:
    async def deep(request: dict[str, Any]) -> bytes | None:
        return b'{"return":' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"

    peer.answer = deep
    with pytest.raises(AgentGoneError):
        await agent.execute("guest-info")


async def test_a_flood_before_the_sync_is_skipped(agent: GuestAgent, peer: Peer) -> None:
    peer.before_sync = b"z" * 3_000_000
    await agent.ping(timeout=60)


async def test_a_long_reply_of_tiny_values_is_not_parsed(agent: GuestAgent, peer: Peer) -> None:
    async def crowded(request: dict[str, Any]) -> bytes:
        return b'{"return": {"a": [[]' + b",[]" * 300_000 + b"]}}\n"

    async def long(request: dict[str, Any]) -> bytes:
        return json.dumps({"return": {"out-data": "A" * 900_000}}).encode() + b"\n"

    peer.answer = crowded
    with pytest.raises(AgentGoneError, match="makes no sense"):
        await agent.execute("guest-exec-status")
    peer.answer = long
    assert await agent.execute("guest-exec-status") == {"out-data": "A" * 900_000}


async def test_others_have_their_turn_while_a_flood_is_read(
    agent: GuestAgent, tmp_path: Path
) -> None:
    with sockets.listen(tmp_path, sockets.AGENT) as listening:
        waiting = asyncio.create_task(agent.ping(1.5))
        listening.setblocking(False)
        sock, _ = await asyncio.get_running_loop().sock_accept(listening)
        with sock:
            sent, flooding = 0, True

            def flood() -> None:
                nonlocal sent
                sock.setblocking(True)
                with contextlib.suppress(OSError):
                    while flooding:
                        sent += sock.send(b'{"return": {}}\n' * 5000)

            thread = threading.Thread(target=flood)
            thread.start()
            try:
                with pytest.raises(AgentGoneError):
                    await waiting
            finally:
                flooding = False
                await agent.close()
                await asyncio.to_thread(thread.join)
    # All that is said before a mark is dropped, and after a while only slowly.
    assert sent < 64 << 20


async def test_a_refusal_has_the_agents_words(agent: GuestAgent, peer: Peer) -> None:
    async def refuse(request: dict[str, Any]) -> bytes | None:
        return b'{"error": {"class": "GenericError", "desc": "hook has failed"}}\n'

    peer.answer = refuse
    with pytest.raises(AgentRefusedError, match="hook has failed"):
        await agent.fsfreeze_freeze(5)
    assert "guest-fsfreeze-thaw" not in peer.heard


async def test_a_thaw_follows_a_freeze_that_was_given_up(agent: GuestAgent, peer: Peer) -> None:
    given_up = asyncio.Event()

    async def slow(request: dict[str, Any]) -> bytes | None:
        if request["execute"] == "guest-fsfreeze-freeze":
            await given_up.wait()
            return b'{"return": 1}\n'
        return b'{"return": "thawed"}\n'

    peer.answer = slow
    await agent.ping()  # in step, so that the time-out is the freeze's
    with pytest.raises(AgentGoneError):
        await agent.fsfreeze_freeze(0.05)
    given_up.set()
    await agent.ensure_thawed(60)
    assert peer.heard[2:] == [
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
        "guest-sync-delimited",
        "guest-fsfreeze-status",
    ]


async def test_ensure_thawed_goes_on_until_it_is(agent: GuestAgent, peer: Peer) -> None:
    thaws = 0

    async def stubborn(request: dict[str, Any]) -> bytes | None:
        nonlocal thaws
        if request["execute"] == "guest-fsfreeze-thaw":
            thaws += 1
            return b'{"return": 1}\n'
        return json.dumps({"return": "thawed" if thaws > 2 else "frozen"}).encode() + b"\n"

    peer.answer = stubborn
    await agent.ensure_thawed(60)
    assert thaws == 3


async def test_who_waits_is_told_when_the_port_closes(agent: GuestAgent, peer: Peer) -> None:
    asked = asyncio.Event()

    async def silent(request: dict[str, Any]) -> bytes | None:
        asked.set()
        return None

    peer.answer = silent
    task = asyncio.create_task(agent.ping(timeout=60))
    await asked.wait()
    agent.port_changed(is_open=False)
    with pytest.raises(AgentGoneError, match="went away"):
        await task


async def test_ready_when_the_port_opens(
    agent: GuestAgent, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "_PORT_SECONDS", 600)  # asked in spite of it: never, here
    waiting = asyncio.create_task(agent.wait_ready(60))
    await asyncio.sleep(0.05)
    assert peer.heard == []  # nothing is asked of a guest without an agent
    agent.port_changed(is_open=True)
    await waiting


async def test_without_qemu_there_is_no_agent(tmp_path: Path) -> None:
    with pytest.raises(AgentGoneError):
        await GuestAgent(tmp_path).ping()


async def test_a_command_and_its_output(agent: GuestAgent, peer: Peer) -> None:
    polls = 0

    async def guest(request: dict[str, Any]) -> bytes | None:
        nonlocal polls
        if request["execute"] == "guest-exec":
            assert request["arguments"]["arg"][-2:] == ["echo", "hi"]
            assert "A=b" in request["arguments"]["env"]
            return b'{"return": {"pid": 7}}\n'
        polls += 1
        if polls == 2:  # an application snapshot is being taken
            return (
                b'{"error": {"class": "CommandNotFound", "desc": "Command guest-exec-status has '
                b'been disabled: the agent is in frozen state"}}\n'
            )
        status: dict[str, object] = {"exited": polls > 2}
        if polls > 2:
            status |= {"exitcode": 3, "out-data": base64.b64encode(b"hi\0\n").decode()}
            status |= {"out-truncated": True}
        return json.dumps({"return": status}).encode() + b"\n"

    peer.answer = guest
    result = await guest_exec.execute(agent, ["echo", "hi"], env={"A": "b"})
    assert (result.exit_code, result.signal, result.stdout) == (3, None, b"hi\0\n")
    assert (result.stdout_truncated, result.stderr_truncated) == (True, False)
    assert not result.timed_out


@pytest.mark.parametrize("data", ["\ud800", "ü", "A"])
async def test_output_that_makes_no_sense(agent: GuestAgent, peer: Peer, data: str) -> None:
    async def answer(request: dict[str, Any]) -> bytes | None:
        value: dict[str, Any] = {"pid": 7, "exited": True, "exitcode": 10**30, "out-data": data}
        return json.dumps({"return": value}).encode() + b"\n"

    peer.answer = answer
    with pytest.raises(AgentGoneError, match="makes no sense"):
        await guest_exec.execute(agent, ["true"])


async def test_numbers_that_cannot_be_are_none(agent: GuestAgent, peer: Peer) -> None:
    async def answer(request: dict[str, Any]) -> bytes | None:
        value = {"pid": 7, "exited": True, "exitcode": 10**30, "signal": -1, "out-data": ""}
        return json.dumps({"return": value}).encode() + b"\n"

    peer.answer = answer
    result = await guest_exec.execute(agent, ["true"])
    assert (result.exit_code, result.signal) == (None, None)


async def test_a_timeout_kills_by_marker_and_session(
    agent: GuestAgent, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = ""
    killed = False
    limits: list[asyncio.Timeout] = []
    real = asyncio.timeout

    def noted(seconds: float | None) -> asyncio.Timeout:
        limits.append(real(seconds))
        return limits[-1]

    monkeypatch.setattr(asyncio, "timeout", noted)

    async def guest(request: dict[str, Any]) -> bytes | None:
        nonlocal marker, killed
        arguments = request["arguments"]
        status: dict[str, object] = {"pid": 8 if marker else 7}
        if request["execute"] == "guest-exec":
            if marker:
                assert arguments["arg"][-2:] == [marker, "7"]
                killed = True
            marker = marker or arguments["env"][-1]
        elif arguments["pid"] == 8:
            status = {"exited": True, "out-data": base64.b64encode(b"done\n").decode()}
        else:
            if not killed:  # it runs, and now its time, the first of all limits, is up
                limits[0].reschedule(asyncio.get_running_loop().time())
            status = {"exited": killed, "signal": 9}
        return json.dumps({"return": status}).encode() + b"\n"

    peer.answer = guest
    result = await guest_exec.execute(agent, ["sleep", "99"], timeout=600)
    assert (result.timed_out, result.exit_code, result.signal) == (True, None, 9)
    assert marker.startswith(guest_exec.MARKER)


async def test_a_forgotten_command_is_an_agent_that_is_gone(agent: GuestAgent, peer: Peer) -> None:
    async def guest(request: dict[str, Any]) -> bytes | None:
        if request["execute"] == "guest-exec":
            return b'{"return": {"pid": 7}}\n'
        return b'{"error": {"class": "GenericError", "desc": "Invalid parameter \'pid\'"}}\n'

    peer.answer = guest
    with pytest.raises(AgentGoneError):
        await guest_exec.execute(agent, ["true"])


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        ([], {}),
        ([""], {}),
        (["a\0b"], {}),
        (["a"], {"A": "\0"}),
        (["a"], {"A=B": "c"}),
        (["a"], {"": "c"}),
        (["\ud800"], {}),
        (["x" * 200_000], {}),
        (["x" * 1000] * 3000, {}),
    ],
)
async def test_commands_that_cannot_be_run(
    tmp_path: Path, argv: list[str], env: dict[str, str]
) -> None:
    with pytest.raises(InvalidArgumentError):
        await guest_exec.execute(GuestAgent(tmp_path), argv, env=env)
