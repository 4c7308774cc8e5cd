"""What is out of reach for a QEMU that a guest has taken over: tried from within its walls.

A program of our own is started in QEMU's place, by the same code. What it tries to reach belongs to
its own user, so that only the walls stand before it; without them it reaches all of that. Here the
plain launcher's program starts it, and the one that libvirt runs, without libvirt;
``test_libvirt`` has libvirtd run that.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor import confinement
from stratabox.daemon.hypervisor.confinement import PLAIN, Confinement, Reopened, Walls
from stratabox.daemon.hypervisor.libvirt import emulator, walls
from stratabox.daemon.hypervisor.libvirt.handover import FIRST, Handover
from stratabox.storage.model.errors import DeniedError

SOURCE = Path(__file__).parents[1] / "support" / "escape.c"
USER = 65534
IS_ROOT = os.geteuid() == 0
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--")
NEEDED = ("own-folder", "own-file", "zeros")
MONITOR = ("-chardev", "socket,id=charmonitor,fd=9", "-mon", "chardev=charmonitor,id=monitor")
QEMU = shutil.which("qemu-system-x86_64") or ""
REACHED = ("signal", "see", "environment", "tcp", "abstract", "udp", "read-above", "create")
"""What there is to reach for any program of that user."""


class Things:
    """Things of a user, and the program that is after them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.chmod(0o755)
        self.program = root / "escape"
        subprocess.run(
            [
                *("cc", "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-pic", "-no-pie"),
                *("-fno-stack-protector", "-fcf-protection=none", "-Wno-unused-function"),
                *("-I", confinement.PROGRAM.parent, f'-DQEMU="{QEMU}"'),
                *("-o", self.program, SOURCE),
            ],
            check=True,
        )
        self.confine = Path(shutil.copy(confinement.PROGRAM, root))
        self.folder = root / "folder"
        self.folder.mkdir()
        (self.folder / "given").write_text("QEMU's")
        self.file = root / "file"
        self.file.write_text("QEMU's")
        self.secrets = [root / "secret", root / "catalog.db"]
        for path in self.secrets:
            path.write_text("somebody else's")
        for path in (*self.secrets, self.file) if IS_ROOT else ():
            os.chown(path, USER, USER)
        self.new = root / "open" / "escaped"
        self.new.parent.mkdir()
        self.new.parent.chmod(0o777)
        self.victim = subprocess.Popen(
            [*self.user, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE
        )
        assert self.victim.stdout is not None
        self.victim.stdout.readline()  # it is that user's by now
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.name = f"stratabox-test-{os.getpid()}"
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0{self.name}")
        self.abstract.listen()

    def close(self) -> None:
        self.victim.kill()
        self.victim.communicate()
        self.tcp.close()
        self.abstract.close()

    @property
    def user(self) -> Sequence[str]:
        return AS_USER if IS_ROOT else ()

    def run(self, walls: Confinement | None, *, by_user: bool) -> dict[str, int]:
        """Each try, and its errno; None: no walls, but that user's rights.

        :param by_user: the daemon that starts it is that user's, not root.
        """
        folder, file, words = self.open()
        report = os.pipe()
        command = [str(self.program), *self.arguments(folder, file)]
        try:
            if walls is None:
                subprocess.run(
                    [*self.user, *command], stdout=words, pass_fds=[folder, file], check=True
                )
            else:
                confined = walls.command(
                    command,
                    report=report[1],
                    uid=USER if IS_ROOT and not by_user else None,
                    reopened=Reopened(folders={folder: self.folder}, files=[file]),
                )
                confined[0] = str(self.confine)
                if by_user:
                    confined = [
                        *self.user,
                        *(each.replace("=mpnih", "=umpnih") for each in confined),
                    ]
                pid = confinement.spawn(
                    confined, report, output=words, environment={}, descriptors=[folder, file]
                )
                status = os.waitpid(pid, 0)[1]
                assert status == 0, os.pread(words, 2000, 0)
            return said(words)
        finally:
            for number in (folder, file, words, *report):
                os.close(number)

    async def run_emulator(
        self, start: Callable[[Handover, Path], Awaitable[None]], *, uid: int, wish: Confinement
    ) -> tuple[str, dict[str, int]]:
        """The same by the program that libvirt runs: what it found to be had, and each try.

        :param start: has it started, as that user, and waits for its end.
        :param uid: that user.
        """
        program = await asyncio.to_thread(emulator.place, self.root / "emulator", self.program)
        given = self.open()
        found: list[str] = []
        reopened = Reopened(folders={FIRST: self.folder}, files=[FIRST + 1])
        options = walls.options(wish, reopened=reopened, kvm=False, own_uid=uid != os.geteuid())
        try:
            with Handover(program.parent, uid, "s") as place:
                await asyncio.gather(
                    start(place, program),
                    place.give(self.arguments(FIRST, FIRST + 1), {}, given, options, found.append),
                )
            return found[0], said(given[-1])
        finally:
            for number in given:
                os.close(number)

    def open(self) -> tuple[int, int, int]:
        """The folder and the file that it is given, and where its words go."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        return folder, os.open(self.file, os.O_RDONLY), os.memfd_create("words")

    def arguments(self, folder: int, file: int) -> list[str]:
        """What it is to try.

        :param folder: the numbers that it has these two under.
        """
        return [
            str(folder), str(file), str(self.victim.pid), str(self.tcp.getsockname()[1]),
            self.name, str(self.new), *map(str, self.secrets), "/etc/passwd",
        ]  # fmt: skip


def said(words: int) -> dict[str, int]:
    """Each try, and its errno."""
    lines = os.pread(words, 1 << 16, 0).decode().splitlines()
    tries = (line.partition(" ") for line in lines)
    return {name: int(errno) for name, _, errno in tries if errno.isdigit()}


@contextmanager
def there_are() -> Iterator[Things]:
    """Things that are gone when the context ends."""
    # A folder that another user may enter; pytest's own is private.
    with tempfile.TemporaryDirectory(prefix="stratabox-") as name:
        things = Things(Path(name))
        try:
            yield things
        finally:
            things.close()


@pytest.fixture(scope="module")
def things() -> Iterator[Things]:
    with there_are() as things:
        yield things


def walls_of(things: Things, walls: Walls) -> Confinement:
    found = Confinement(walls=walls, trees=["/usr/lib", str(things.program)])
    if walls is Walls.PATHS and confinement.landlock_version() < 6:
        pytest.skip("this kernel's Landlock knows no signals")
    return found


def test_without_walls_it_reaches_all_of_that_users(things: Things) -> None:
    tried = things.run(None, by_user=True)
    reached = {name for name, errno in tried.items() if errno == 0}
    assert reached >= {*NEEDED, *REACHED, *(f"read:{path}" for path in things.secrets)}
    things.new.unlink()


@pytest.mark.parametrize("by_user", [False, True])
@pytest.mark.parametrize("walls", [Walls.FULL, Walls.PATHS])
def test_it_reaches_nothing_but_its_own(things: Things, walls: Walls, by_user: bool) -> None:
    tried = things.run(walls_of(things, walls), by_user=by_user)
    assert {name for name, errno in tried.items() if errno == 0} - {"see"} == set(NEEDED)
    if walls is Walls.FULL:
        assert tried["see"] != 0
    assert "device" in tried  # the last one
    assert not things.new.exists()


def test_what_fails_is_told_and_runs_nothing(things: Things) -> None:
    missing = replace(walls_of(things, Walls.FULL), trees=["/no/such/file", str(things.program)])
    with pytest.raises(AssertionError, match="confine: lstat /no/such/file: errno 2"):
        things.run(missing, by_user=False)


def test_this_host_has_them_all() -> None:
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu is not None
    found = confinement.examine(Path(qemu).resolve())
    assert found.walls in (Walls.FULL, Walls.PATHS)
    assert bool(found.why) == (found.walls is not Walls.FULL or not confinement.landlock_version())


def test_the_daemons_umask_is_none_of_the_walls() -> None:
    """Root's folders within them are to be entered by QEMU's user; a unit may say UMask=0077."""
    as_usual = confinement.examine(Path(QEMU).resolve())
    before = os.umask(0o077)
    try:
        assert confinement.examine(Path(QEMU).resolve()) == as_usual
    finally:
        os.umask(before)


def test_a_program_that_does_not_run_in_there_is_none_to_confine(tmp_path: Path) -> None:
    wrapper = tmp_path / "qemu"
    wrapper.write_text("#!/no/such/shell\n")
    wrapper.chmod(0o755)
    found = confinement.examine(wrapper)
    assert found.walls is Walls.PLAIN
    assert "execute" in found.why


# The program that libvirt runs


def starting(things: Things, *before: str) -> Callable[[Handover, Path], Awaitable[None]]:
    """As libvirtd would: without capabilities, and by nobody's child."""

    async def start(place: Handover, program: Path) -> None:
        command = [*before, *things.user, str(program), *MONITOR]
        child = await asyncio.create_subprocess_exec(
            *command, *place.arguments, stderr=subprocess.PIPE
        )
        _, words = await child.communicate()
        assert child.returncode == 0, words

    return start


@pytest.mark.parametrize("kind", [Walls.FULL, Walls.PATHS])
async def test_what_libvirt_runs_reaches_nothing_but_its_own(things: Things, kind: Walls) -> None:
    uid = USER if IS_ROOT else os.geteuid()
    found, tried = await things.run_emulator(starting(things), uid=uid, wish=walls_of(things, kind))
    assert found == "full"  # of what was asked for
    assert {name for name, errno in tried.items() if errno == 0} - {"see"} == set(NEEDED)
    if kind is Walls.FULL:
        # It sees itself alone in /proc, without a pid namespace.
        assert tried["see"] != 0
    assert "device" in tried
    assert not things.new.exists()


async def test_what_libvirt_runs_has_no_walls_where_they_are_off(things: Things) -> None:
    uid = USER if IS_ROOT else os.geteuid()
    found, tried = await things.run_emulator(starting(things), uid=uid, wish=PLAIN)
    assert found == "off"
    assert {name for name, errno in tried.items() if errno == 0} >= {*NEEDED, *REACHED}
    things.new.unlink()


@pytest.mark.skipif(not IS_ROOT, reason="takes root: nobody makes namespaces from a changed root")
async def test_where_libvirtd_may_make_no_namespaces(things: Things) -> None:
    below = things.root / "below"
    below.mkdir(exist_ok=True)
    line = f'mount --rbind / {below} && exec chroot {below} "$@"'
    without = starting(things, "unshare", "--mount", "sh", "-c", line, "sh")
    found, tried = await things.run_emulator(without, uid=USER, wish=walls_of(things, Walls.FULL))
    assert found.startswith("paths confine: unshare: errno 1")
    assert {name for name, errno in tried.items() if errno == 0} - {"see"} == set(NEEDED)
    judged = walls.judge(found, confinement.landlock_version(), own_uid=True)
    assert (judged.walls, judged.why) == (Walls.PATHS, "no namespaces (unshare: errno 1)")


async def test_walls_that_will_not_do_start_nothing(things: Things) -> None:
    async def start(place: Handover, program: Path) -> None:
        child = await asyncio.create_subprocess_exec(program, *MONITOR, *place.arguments)
        assert await child.wait() == 1

    def refuse(found: str) -> None:
        raise confinement.denied("a test says so")

    program = await asyncio.to_thread(emulator.place, things.root / "emulator", things.program)
    given = things.open()
    try:
        with Handover(program.parent, os.geteuid(), "s") as place:
            starter = asyncio.create_task(start(place, program))
            with pytest.raises(DeniedError):
                await place.give(things.arguments(FIRST, FIRST + 1), {}, given, [], refuse)
            await starter
        assert b"does not start it within these walls" in os.pread(given[-1], 4096, 0)
        assert said(given[-1]) == {}
    finally:
        for number in given:
            os.close(number)
