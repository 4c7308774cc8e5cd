"""The program that begins commands in guests: run here, told to change files of the test's own."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from stratabox.daemon.hypervisor.guest import wake
from support.waiting import killed_at_last

ROOT = Path(__file__).resolve().parents[2]
A_FILE = Path(__file__)
SOURCE = Path(wake.__file__).with_name("wake.c")
PATH = "/usr/local/bin:/usr/bin:/bin"

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="needs a C compiler for x86-64",
)

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the program, built as the package's build does, and without a warning."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec
    assert spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    (flags,) = (how[1] for source, how in build.COMPILED.items() if source.endswith("/wake.c"))
    made = tmp_path_factory.mktemp("wake") / "wake"
    subprocess.run(["cc", *build.COMMON, "-Werror", *flags, "-o", made, SOURCE], check=True)
    return made


@pytest.fixture
def run(program: Path, tmp_path: Path) -> Run:
    """Run it with orders on its standard input, in an environment of its own."""

    def run(*arguments: object, orders: Sequence[bytes] = (), path: str = PATH) -> Done:
        return subprocess.run(
            [program, *map(str, arguments)],
            input=b"".join(orders).decode("latin-1"),
            encoding="latin-1",
            env={"PATH": path, "STRATABOX_EXEC": "marker"},
            capture_output=True,
            check=False,
        )

    return run


def test_a_command_is_started_as_it_is(run: Run, tmp_path: Path) -> None:
    words = ["a b", "$HOME", "*", "", "'\"\\", "line\nline", "--", "-n"]
    done = run(tmp_path, "printf", "%s|", *words)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "".join(f"{word}|" for word in words), "",
    )  # fmt: skip
    assert run(tmp_path, "pwd").stdout == f"{tmp_path}\n"
    assert run("/", "sh", "-c", "exit 7").returncode == 7


def test_it_leads_a_session_of_its_own(program: Path) -> None:
    command: list[str | Path] = [
        program,
        "/",
        "sh",
        "-c",
        'read -r a b c d e f rest </proc/$$/stat; echo "$a $f"',
    ]
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with killed_at_last(started) as process:
        assert process.stdout
        pid, session = process.stdout.read().split()
    # Found by the number that the starter has.
    assert int(pid) == int(session) == process.pid


@pytest.mark.parametrize("orders", [(), (b"",), (wake.delete("x", "/nowhere", ""),)])
def test_nothing_is_left_to_read(run: Run, orders: Sequence[bytes]) -> None:
    done = run("/", "cat", orders=orders)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_folder_that_cannot_be_entered(run: Run, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", A_FILE, Path("/-")):
        done = run(folder, "echo", "ran")
        assert (done.returncode, done.stdout) == (126, "")
        assert done.stderr.startswith(f"{folder}: ")


def test_programs_are_found_as_a_shell_finds_them(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (second / "here").write_text('#!/bin/sh\necho "second $0"\n')
    (second / "here").chmod(0o755)
    (first / "here").write_text("")  # may not be run: the next one is
    (first / "here").chmod(0o644)
    path = f"{first}/none:{first}:{A_FILE}:{'x' * 5000}:{second}:{PATH}"
    assert run("/", "here", path=path).stdout == f"second {second}/here\n"
    assert run(second, "./here").stdout == "second ./here\n"
    assert run(second, "here", path=f"{first}:").stdout == "second ./here\n"
    # Without a first line that says whose it is, a script is the shell's.
    (first / "plain").write_text('echo "plain $1 $2"\n')
    (first / "plain").chmod(0o755)
    assert run("/", "plain", "a b", "c", path=path).stdout == "plain a b c\n"


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("no-such-program", 127, "not found"),
        ("/no/such/program", 127, "not found"),
        (f"{A_FILE}", 126, "permission denied"),
        (f"{A_FILE}/x", 126, "not a directory"),
        ("x" * 5000, 127, "not found"),
    ],
)
def test_programs_that_cannot_be_run(run: Run, command: str, code: int, words: str) -> None:
    done = run("/", command, "--flag")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"{command}: {words}\n"


def test_files_are_written_moved_and_deleted(run: Run, tmp_path: Path) -> None:
    folder, kept = tmp_path / "ssh", tmp_path / "kept"
    folder.mkdir()
    kept.write_text("old and longer\n")
    kept.chmod(0o640)
    for kind in ("rsa", "ecdsa", "ed25519"):
        (folder / f"ssh_host_{kind}_key").write_text("old")
        (folder / f"ssh_host_{kind}_key.pub").write_text("old")
    for name in ("sshd_config", "host_key", "ssh_host_key_of_mine"):
        (folder / name).write_text("mine")
    key = f"{folder}/ssh_host_ed25519_key"
    create = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    done = run(
        "/", "cat", kept,
        orders=[
            wake.write("a", str(kept), "new\n"),
            wake.delete("b", str(folder), "ssh_host_", "_key"),
            wake.delete("b", str(folder), "ssh_host_", "_key.pub"),
            wake.write("b", f"{key}.new", "secret\n", mode=0o600, flags=create),
            wake.move("b", f"{key}.new", key),
            wake.write("b", f"{key}.pub", "public\n", flags=os.O_CREAT),
        ],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "new\n", "marker \n")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "sshd_config": "mine",
        "host_key": "mine",
        "ssh_host_key_of_mine": "mine",
        "ssh_host_ed25519_key": "secret\n",
        "ssh_host_ed25519_key.pub": "public\n",
    }
    modes = [stat.S_IMODE(Path(f"{key}{end}").stat().st_mode) for end in ("", ".pub")]
    assert modes == [0o600, 0o644]


def test_a_file_is_never_emptied_first(run: Run) -> None:
    """Its blocks would be freed and found again; the kernel refuses that of this one."""
    file = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    try:
        os.write(file, b"old\n127.0.1.1 old\n")
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        path = f"/proc/{os.getpid()}/fd/{file}"
        orders = [
            wake.set_line("line", path, "127.0.1.1 somebody-new"),
            wake.write("file", path, "somebody new, and longer than before\n"),
        ]
        assert run(orders=orders[:1]).stderr == "marker \n"
        assert os.pread(file, 99, 0) == b"old\n127.0.1.1 somebody-new\n"
        assert run(orders=orders[1:]).stderr == "marker \n"
        assert os.pread(file, 99, 0) == b"somebody new, and longer than before\n"
        # What is shorter does cut it, or there would be a tail.
        assert run(orders=[wake.write("file", path, "short\n")]).stderr == "marker file\n"
    finally:
        os.close(file)


def test_what_is_not_there_is_not_made(run: Run, tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    orders = [
        wake.write("a", none, "x"),
        wake.write("b", f"{none}/x", "x", flags=os.O_CREAT),
        wake.move("c", none, f"{none}-2"),
        wake.delete("d", none, ""),
        wake.set_line("e", none, "127.0.1.1 x"),
        wake.hang_up("f", none, "sshd"),
        wake.set_mac("g", none, "52:54:00:12:34:56"),
    ]
    assert run(orders=orders).stderr == "marker \n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("127.0.0.1 a\n127.0.1.1 old x\n::1 a\n", "127.0.0.1 a\n127.0.1.1 new\n::1 a\n"),
        ("127.0.1.1\told", "127.0.1.1 new\n"),
        ("127.0.1.10 a\n127.0.1.1\n#127.0.1.1 b", "127.0.1.10 a\n127.0.1.1\n#127.0.1.1 b"),
        ("127.0.1.1 a\n\n127.0.1.1 b\nc", "127.0.1.1 new\n\n127.0.1.1 new\nc"),
        ("", ""),
        ("a " * 8000 + "\n127.0.1.1 x\n", "a " * 8000 + "\n127.0.1.1 new\n"),
    ],
)
def test_one_line_of_a_file(run: Run, tmp_path: Path, before: str, after: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(before)
    inode = hosts.stat().st_ino
    done = run(orders=[wake.set_line("hosts", str(hosts), "127.0.1.1 new")])
    assert done.stderr == "marker \n"
    assert hosts.read_text() == after
    assert hosts.stat().st_ino == inode


def test_a_file_with_too_many_lines_is_left_alone(run: Run, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    text = "127.0.1.1 x\n" * 4000
    hosts.write_text(text)
    done = run(orders=[wake.set_line("hosts", str(hosts), "127.0.1.1 new")])
    assert done.stderr == "marker hosts\n"
    assert hosts.read_text() == text


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process called "napper" that says when it is told to hang up."""
    script = tmp_path / "napper"
    script.symlink_to("/bin/sh")
    line = "trap 'echo told; exit' HUP; echo ready; while :; do read -r x; done"
    # No shell traps what was ignored when it began, as under nohup.
    command = ["env", "--default-signal=HUP", str(script), "-c", line]
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with killed_at_last(started) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process


def test_only_the_right_process_is_told_to_hang_up(
    run: Run, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    file = tmp_path / "pid"
    for text in ("", "x", "0", "1", "-1", "99999999999999"):
        file.write_text(text)
        assert run(orders=[wake.hang_up("a", str(file), "napper")]).stderr == "marker \n"
    file.write_text(f"{sleeper.pid}\n")
    assert run(orders=[wake.hang_up("a", str(file), "nap")]).stderr == "marker \n"
    assert sleeper.poll() is None
    assert run(orders=[wake.hang_up("a", str(file), "napper")]).stderr == "marker \n"
    assert sleeper.stdout
    assert sleeper.stdout.read() == b"told\n"


def test_what_failed_is_said_once_and_the_rest_is_done(run: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    good = tmp_path / "good"
    good.write_text("old")
    orders = [
        wake.write("one", str(tmp_path / "folder"), "x"),
        wake.write("one", str(good), "not this: the one before failed"),
        wake.move("two", str(good), str(tmp_path / "folder")),
        wake.write("three", str(good), "new"),
    ]
    done = run("/", "sh", "-c", "echo own words >&2; echo out; exit 3", orders=orders)
    assert (done.returncode, done.stdout) == (3, "out\n")
    assert done.stderr == "marker one, two\nown words\n"
    assert good.read_text() == "new"


def test_orders_that_make_no_sense(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    whole = wake.write("name", str(file), "new")
    for size in range(1, len(whole)):
        assert run(orders=[whole[:size]]).stderr == "marker the rest: it makes no sense\n", size
        assert file.read_text() == "old"
    no_zero = whole[:-1] + b"x"
    assert "makes no sense" in run(orders=[no_zero]).stderr
    assert run(orders=[b"?" + whole[1:]]).stderr == "marker name\n"
    assert run(orders=[wake.seed("seed", b"x" * wake.LARGEST)]).stderr == (
        "marker all: there is too much of it\n"
    )
    assert file.read_text() == "old"
    assert run(orders=[whole, b"?"]).stderr == "marker the rest: it makes no sense\n"
    assert file.read_text() == "new"
    names = [bytes([65 + n]) * 60 for n in range(26)]
    done = run(orders=[b"?" + b"\x3c\0" + name + b"\0" + b"\0\0\0" * 3 for name in names])
    assert re.fullmatch(r"marker (([A-Z])\2{59}(, )?)+\n", done.stderr)
    for name in (b"c", b"w", b"a"):
        assert run(orders=[name + b"\1\0n\0" + b"\0\0\0" * 3]).stderr == "marker n\n"


def test_clock_random_numbers_and_host_name_need_their_rights(run: Run, program: Path) -> None:
    """In a user namespace of its own: nothing of this machine is changed."""
    orders = [
        wake.set_clock("clock", 10**18),
        wake.seed("random numbers", b"x" * 64),
        wake.set_host_name("host name", "renamed"),
    ]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--uts", program, "/", "uname", "-n"],
        input=b"".join(orders), env={"PATH": PATH, "STRATABOX_EXEC": "marker"},
        capture_output=True, check=False,
    )  # fmt: skip
    # The clock and the reseeding are the whole machine's, and refused here.
    assert done.stderr == b"marker clock, random numbers\n"
    assert done.stdout == b"renamed\n"


def test_it_stands_alone(program: Path) -> None:
    data = program.read_bytes()
    assert data[:4] == b"\x7fELF"
    assert len(data) < 8192
    assert b"ld-linux" not in data
    assert sys.byteorder == "little"
