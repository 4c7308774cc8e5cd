"""The daemon is restarted while clients are at work, with its socket held as systemd holds it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stratabox.client import AsyncClient, Client, DaemonEndingError, Sandbox, Volume
from support.daemon import DaemonProcess, activated
from support.doors import free_port, key
from support.rig import eventually, standing

RESTARTS = 3
BROKEN_OFF = "are broken off"
SLEEPERS = (
    'for each in /proc/[0-9]*; do read name <$each/comm; test "$name" != sleep || echo x; done'
)


@dataclass
class Place:
    """A daemon with a guest, and the ways to it."""

    process: DaemonProcess
    client: Client
    box: Sandbox
    url: str
    key: str

    def start(self, *, failpoints: str = "") -> None:
        """Start the next daemon; callers have clients of their own."""
        self.process.start(failpoints=failpoints).close()

    def execute_by_rest(self, command: str) -> tuple[int, str]:
        """The status, and an error's code."""
        with contextlib.closing(_UnixConnection(self.process.folder / "rest.sock")) as rest:
            body = json.dumps({"command": command})
            headers = {"content-type": "application/json"}
            rest.request("POST", f"/v1/sandboxes/{self.box.id}/execute", body, headers)
            answer = rest.getresponse()
            return answer.status, str(json.loads(answer.read())["error"]["code"])


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("restarts")
    url = f"http://127.0.0.1:{free_port()}"
    environment = {"STRATABOX_LISTEN": url, "STRATABOX_REST": f"unix://{folder}/rest.sock"}
    with activated(folder, environment) as process, process.start() as client:
        client.images.build_tiny()
        box = client.sandboxes.create(image="tiny", memory=128)
        made = key(process, "create", "--role", "admin", "--name", "admin")["key"]
        yield Place(process, client, box, url, made)


@dataclass
class Load:
    """Callers who ask again and again, each in a thread of its own."""

    failures: list[tuple[str, Exception]] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    over: bool = False
    _names: set[str] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def caller(self, threads: ThreadPoolExecutor, name: str, ask: Callable[[], object]) -> None:
        self._names.add(name)
        threads.submit(self._run, name, ask)

    def go_on(self, times: int = 2) -> None:
        """Wait until each of them has had so many answers more."""
        with self._changed:
            before = self.answers.copy()
            assert self._changed.wait_for(
                lambda: all(self.answers[each] >= before[each] + times for each in self._names), 60
            ), (before, self.answers, self.failures)

    def _run(self, name: str, ask: Callable[[], object]) -> None:
        while not self.over:
            failure: Exception | None = None
            try:
                ask()
            except Exception as error:  # whatever it is, it is what this looks for
                failure = error
            with self._changed:
                if failure is None:
                    self.answers[name] += 1
                else:
                    self.failures.append((name, failure))
                self._changed.notify_all()


def test_short_calls_notice_nothing(place: Place) -> None:
    """Old connections and new ones, threads and asyncio: all are answered, commands run once."""
    client, load = place.client, Load()
    told: list[DaemonEndingError] = []
    watches = threading.Event()
    numbers = itertools.count()
    ran: list[str] = []

    def execute() -> None:
        mine = str(next(numbers))
        line = f"echo {mine} >> /root/runs; sleep 0.2; echo {mine}"
        assert client.sandboxes.execute(place.box.id, line).stdout_text.strip() == mine
        ran.append(mine)

    def anew() -> None:
        with Client(place.process.address) as other:
            other.host()

    async def several() -> None:
        async with AsyncClient(place.process.address) as other:
            while not load.over:
                await other.host()
                load.answers["asyncio's own"] += 1

    def watch() -> None:
        try:
            for _ in client.sandboxes.watch():
                watches.set()
                if load.over:
                    return
        except DaemonEndingError as error:
            watches.clear()
            told.append(error)

    with ThreadPoolExecutor(12) as threads:
        for name, ask in (
            ("host", client.host), ("list", client.sandboxes.list),
            ("list too", client.sandboxes.list), ("anew", anew), ("anew too", anew),
            ("execute", execute), ("execute too", execute),
        ):  # fmt: skip
            load.caller(threads, name, ask)
        several_calls = threads.submit(asyncio.run, several())
        watching = threads.submit(load._run, "watch", watch)
        try:
            for _ in range(RESTARTS):
                load.go_on()
                assert watches.wait(60)
                before = len(told)
                place.process.stop()
                eventually(lambda before=before: len(told) > before)  # type: ignore[misc]
                place.start()
            load.go_on()
        finally:
            load.over = True
            client.sandboxes.update(place.box.id, name="watched")
    several_calls.result()
    watching.result()
    assert load.failures == []
    assert BROKEN_OFF not in place.process.log.read_text(), "short calls take no grace"
    assert load.answers["asyncio's own"] > RESTARTS
    found = place.box.execute("cat /root/runs").stdout_text.split()
    assert sorted(found) == sorted(ran)


def refused(client: Client) -> DaemonEndingError:
    """Ask until the daemon takes nothing more by this way."""
    while True:
        try:
            client.host()
        except DaemonEndingError as error:
            return error


def test_long_calls_are_told(place: Place) -> None:
    """After the grace all hear the same, by whatever way they came, and nothing is done twice."""
    place.process.stop()
    formatted = place.process.folder / "formatted"
    place.start(failpoints=f"volume.formatted=hold:{formatted}")
    client, box = place.client, place.box
    calls: dict[str, Future[object]] = {}
    with (
        Client(place.url, api_key=place.key) as by_tcp,
        Client(place.url, api_key=place.key) as late,
        Client(place.process.address) as anew,
        ThreadPoolExecutor(8) as threads,
    ):
        sleep = "touch /root/{}; sleep 60"
        stream = box.spawn(sleep.format("stream"))
        calls["socket"] = threads.submit(client.sandboxes.execute, box.id, sleep.format("socket"))
        calls["tcp"] = threads.submit(by_tcp.sandboxes.execute, box.id, sleep.format("tcp"))
        calls["stream"] = threads.submit(stream.wait)
        by_rest = threads.submit(place.execute_by_rest, sleep.format("rest"))
        wanted = "cd /root && test -e stream -a -e socket -a -e tcp -a -e rest"
        eventually(lambda: box.execute(wanted).exit_code == 0)

        def make() -> Volume:
            return client.volumes.create("late", size_bytes=64 << 20, idempotency_key="late")

        late.host()
        calls["volume"] = threads.submit(make)
        with standing(formatted):
            ends = place.process.log.read_text().count("ending; guests run on")
            stopping = threads.submit(place.process.stop)
            eventually(lambda: place.process.log.read_text().count("ending; guests run on") > ends)
            assert not refused(late).begun
            waiting = threads.submit(anew.host)  # by a connection that nobody has taken
            assert not any(call.done() for call in calls.values())
            told = {name: call.exception(60) for name, call in calls.items()}
            for name, error in told.items():
                assert isinstance(error, DaemonEndingError), (name, error)
                assert error.begun
            assert BROKEN_OFF in place.process.log.read_text()
            assert by_rest.result(60) == (503, "DAEMON_ENDING")
        stopping.result(60)
        assert not waiting.done()
        place.start()
        assert waiting.result(60).pid == place.process.pid
        eventually(lambda: box.execute(SLEEPERS).stdout == b"", what="commands live on")
        again = make()
        assert [each.id for each in client.volumes.list()] == [again.id]
        stream.close()
