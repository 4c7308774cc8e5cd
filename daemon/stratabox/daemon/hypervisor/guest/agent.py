"""The guest's agent (qemu-ga): is it there, freeze, thaw, clock, shutdown; `exec` builds on it.

One channel and one command at a time. A command that was not answered in time may still be run
later; the channel is brought in step before the next one, so its late reply is never taken for
another's.

*Freeze* is the dangerous one: a guest left frozen hangs. So the thaw is queued right behind a
freeze that was given up, before anything else, and `ensure_thawed` goes on until the guest says
"thawed". A new daemon calls it for every guest that an earlier one may have left frozen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from stratabox.daemon.hypervisor.guest.agent_channel import (
    AgentChannel,
    AgentGoneError,
    QemuGoneError,
)
from stratabox.storage.model.errors import FailedError

REPLY_BYTES = 1 << 20
"""Largest reply to a command, but for those that bring output."""
REPLY_SECONDS = 10.0

_TRY_SECONDS = 2.0
_LONGEST_TRY_SECONDS = 15.0
_PORT_SECONDS = 5.0
_THAW_PAUSE = 0.2
_SHUTDOWN_SECONDS = 1.0


class AgentRefusedError(FailedError):
    """The agent answered with an error. AGENT_FAILED; the message has the agent's own words.

    :param kind: the agent's error class, as "GenericError" or "CommandNotFound". The latter comes
        for every command but freeze, thaw and ping while file systems are frozen.
    """

    default_reason = "AGENT_FAILED"

    def __init__(self, command: str, kind: str, words: str) -> None:
        super().__init__(f"The guest's agent refused {command}: {words}", command=command)
        self.kind = kind
        self.words = words


class GuestAgent:
    """The agent in the guest whose sockets lie in `folder`. Connects when it is first needed.

    Every method raises AgentGoneError (UnavailableError, AGENT_UNAVAILABLE) when the agent does
    not answer in time or QEMU is gone, and AgentRefusedError (FailedError, AGENT_FAILED) when the
    agent answers with an error. Times are seconds and count from the moment when it is this
    call's turn, but for `wait_ready` and `ensure_thawed`, whose times are for all.
    """

    def __init__(self, folder: Path) -> None:
        self._channel = AgentChannel(folder)
        self._turn = asyncio.Lock()
        self._port = asyncio.Event()
        self._waiting: asyncio.Timeout | None = None
        self._early: asyncio.Task[None] | None = None
        self.has_program = True
        """The guest may have the program by which commands begin (`wake`): it could be started, or
        nobody has tried."""

    def port_changed(self, *, is_open: bool) -> None:
        """Tell that the guest's agent opened or closed its port (event `AgentPort`, or a reset)."""
        if is_open:
            self._port.set()
        else:
            self._port.clear()
            self._channel.out_of_step()
            if self._waiting is not None and not self._waiting.expired():
                # Whoever was asked is gone, and its successor does not know the question.
                self._waiting.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Let go of the channel; waits for the command that runs."""
        if self._early is not None:
            self._early.cancel()
        async with self._turn:
            self._channel.close()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = REPLY_SECONDS,
        limit: int = REPLY_BYTES,
    ) -> object:
        """Run a command of the agent and return what it returns.

        :param limit: largest reply, bytes.
        """
        async with self._turn:
            return await self._exchange(command, arguments, timeout, limit)

    async def ping(self, timeout: float = REPLY_SECONDS) -> None:
        """Return when the agent answered."""
        await self.execute("guest-ping", timeout=timeout)

    def ask_early(self) -> None:
        """Ask an agent that does not run yet but will go on with its port open; see `wait_ready`.

        The question is with QEMU when this returns. To be called before the guest is let run: QEMU
        reads nothing for some 10 ms while it does so, and the guest finds the question as it wakes.
        """
        self._channel.begin_sync()
        self._early = asyncio.create_task(self._hear(_LONGEST_TRY_SECONDS), name="ask early")
        self._early.add_done_callback(lambda early: early.cancelled() or early.exception())

    @property
    def is_asked(self) -> bool:
        """Somebody has asked early, and nobody has waited for the answer yet."""
        return self._early is not None

    async def wait_ready(self, timeout: float) -> None:
        """Return as soon as the agent answers; asked when its port opens, and rarely otherwise."""
        deadline = time.monotonic() + timeout
        patience = _TRY_SECONDS
        if self._early is not None:
            early, self._early = self._early, None
            try:
                async with asyncio.timeout(timeout):
                    return await early
            except (AgentGoneError, TimeoutError):
                pass  # then as if nobody had asked
        while True:
            await self._wait_port(min(_PORT_SECONDS, deadline - time.monotonic()))
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentGoneError(f"The guest's agent did not answer within {timeout:g} s.")
            try:
                await self._hear(min(patience, left))
            except AgentGoneError:
                # Each try leaves a question in the guest's queue: fewer and longer ones, so that
                # a slow guest can catch up.
                patience = min(patience * 2, _LONGEST_TRY_SECONDS)
                await asyncio.sleep(min(_THAW_PAUSE, max(deadline - time.monotonic(), 0)))
            else:
                return

    async def fsfreeze_status(self, timeout: float = REPLY_SECONDS) -> str:
        """ "thawed" or "frozen"."""
        return str(await self.execute("guest-fsfreeze-status", timeout=timeout))

    async def fsfreeze_freeze(self, timeout: float) -> int:
        """Freeze the guest's file systems; how many.

        Where this raises or is cancelled, a thaw is queued behind the freeze; the caller must
        still `ensure_thawed`.
        """
        async with self._turn:
            await self._get_in_step(timeout)
            try:
                return _count(await self._exchange("guest-fsfreeze-freeze", None, timeout))
            except AgentRefusedError:
                raise  # qemu-ga itself thaws what it froze before it failed
            except BaseException:
                self._channel.send_now("guest-fsfreeze-thaw")
                raise

    async def fsfreeze_thaw(self, timeout: float = REPLY_SECONDS) -> int:
        """Thaw the guest's file systems; how many."""
        return _count(await self.execute("guest-fsfreeze-thaw", timeout=timeout))

    async def ensure_thawed(self, timeout: float) -> None:
        """Return when the guest says that nothing is frozen; thaw and ask until it does.

        Connects anew after each failure.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise AgentGoneError(
                    f"The guest's file systems may be frozen: its agent did not say otherwise "
                    f"within {timeout:g} s."
                )
            try:
                if await self.fsfreeze_status(min(left, REPLY_SECONDS)) == "thawed":
                    return
                await self.fsfreeze_thaw(min(left, REPLY_SECONDS))
            except QemuGoneError:
                raise
            except AgentGoneError:
                async with self._turn:
                    self._channel.close()
                await asyncio.sleep(_THAW_PAUSE)
            except AgentRefusedError as error:
                if error.kind == "CommandNotFound":
                    return  # an agent without freeze has frozen nothing
                await asyncio.sleep(_THAW_PAUSE)

    async def get_time(self, timeout: float = REPLY_SECONDS) -> int:
        """The guest's clock, in ns since 1970 UTC."""
        return _number(await self.execute("guest-get-time", timeout=timeout), "what time it has")

    async def set_time(self, nanoseconds: int, timeout: float = REPLY_SECONDS) -> None:
        """Set the guest's clock, in ns since 1970 UTC. qemu-ga 7.2 wants hwclock in the guest."""
        await self.execute("guest-set-time", {"time": nanoseconds}, timeout=timeout)

    async def shutdown(self, mode: str = "powerdown", timeout: float = REPLY_SECONDS) -> None:
        """Ask the guest to end: "powerdown", "halt" or "reboot". It does not answer; see the exit.

        Only a refusal that comes at once is told.
        """
        async with self._turn:
            await self._get_in_step(timeout)
            try:
                async with asyncio.timeout(_SHUTDOWN_SECONDS):
                    reply = await self._channel.exchange(
                        "guest-shutdown", {"mode": mode}, REPLY_BYTES
                    )
            except (TimeoutError, AgentGoneError):
                return
        _result("guest-shutdown", reply)

    async def _exchange(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        timeout: float,
        limit: int = REPLY_BYTES,
    ) -> object:
        started = time.monotonic()
        await self._get_in_step(timeout)
        try:
            async with asyncio.timeout(timeout - (time.monotonic() - started)) as self._waiting:
                reply = await self._channel.exchange(command, arguments, limit)
        except TimeoutError:
            spent = time.monotonic() - started
            raise AgentGoneError(
                f"The guest's agent did not answer {command} within {timeout:g} s."
                if spent >= timeout
                else f"The guest's agent went away during {command}."
            ) from None
        finally:
            self._waiting = None
        return _result(command, reply)

    async def _hear(self, timeout: float) -> None:
        """Return when the agent has answered anything; getting in step is an answer, too."""
        async with self._turn:
            if self._channel.in_step:
                await self._exchange("guest-ping", None, timeout)
            else:
                await self._get_in_step(timeout)

    async def _get_in_step(self, timeout: float) -> None:
        if self._channel.in_step:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._channel.sync()
        except TimeoutError:
            raise AgentGoneError(
                f"The guest's agent did not answer within {timeout:g} s."
            ) from None

    async def _wait_port(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._port.wait()
        except TimeoutError:
            return  # the event can have been lost: then asking is the only way


def _result(command: str, reply: Mapping[str, object]) -> object:
    if "return" in reply:
        return reply["return"]
    error = reply.get("error")
    if isinstance(error, dict):
        kind, words = str(error.get("class", "")), str(error.get("desc", ""))
        raise AgentRefusedError(command, kind, words[:500])
    raise AgentGoneError(f"The guest's reply to {command} makes no sense.")


def _count(value: object) -> int:
    return _number(value, "how many file systems")


def _number(value: object, what: str) -> int:
    if isinstance(value, int) and value >= 0:
        return value
    raise AgentGoneError(f"The guest's agent did not say {what}.")
