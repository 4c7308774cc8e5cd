"""Commands in guests: what goes in, what comes out, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from stratabox.client import (
    AsyncClient,
    Client,
    CommandFailedError,
    DeadlineExceededError,
    Image,
    InvalidArgumentError,
    InvalidStateError,
    Sandbox,
    SnapshotLevel,
)
from support.rig import eventually

Shell = Callable[[Sandbox, str], str]
MIB = 1 << 20
KEPT = 16 * MIB


def living(sandbox: Sandbox, word: str) -> str:
    """The guest's processes with `word` among their arguments, one a line."""
    # The bracket keeps the search from finding itself.
    pattern = f"[{word[0]}]{word[1:]}"
    line = (
        "for p in /proc/[0-9]*; do"
        f" tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '{pattern}' && echo $p; done; true"
    )
    return sandbox.execute(line).check().stdout_text


def test_argv_reaches_the_program_as_it_is(module_box: Sandbox) -> None:
    words = ["a b", "$HOME", "*", "", "'\"\\", "line\nline", "ünïcødé", "--", "-n", "; exit 9"]
    result = module_box.execute(["printf", "%s|", *words])
    assert (result.exit_code, result.signal) == (0, None)
    assert result.stdout.decode() == "".join(f"{word}|" for word in words)
    assert result.stderr == b""
    assert result.ok
    assert timedelta(0) < result.duration < timedelta(seconds=60)


def test_a_shell_line_is_run_by_the_shell(module_box: Sandbox) -> None:
    result = module_box.execute("x=6; echo $((x * 7)) | tr 4 5; echo oops >&2; exit 3")
    assert (result.exit_code, result.signal) == (3, None)
    assert (result.stdout, result.stderr) == (b"52\n", b"oops\n")
    assert not result.ok
    with pytest.raises(CommandFailedError, match="exit code 3: oops") as caught:
        result.check()
    assert caught.value.result is result


@pytest.mark.parametrize("code", [0, 1, 2, 126, 127, 137, 255])
def test_exit_codes_are_exit_codes(module_box: Sandbox, code: int) -> None:
    result = module_box.execute(f"exit {code}")
    assert (result.exit_code, result.signal) == (code, None)


@pytest.mark.parametrize("signal", [1, 9, 11, 15])
def test_signals_are_signals(module_box: Sandbox, signal: int) -> None:
    result = module_box.execute(f"echo before; kill -{signal} $$; echo after")
    assert (result.exit_code, result.signal) == (None, signal)
    assert result.stdout == b"before\n"
    assert not result.ok
    assert not result.timed_out


def test_output_is_bytes_and_the_streams_are_apart(module_box: Sandbox) -> None:
    result = module_box.execute(r"printf 'a\000\377\n\r'; printf '\376\000e' >&2")
    assert result.stdout == b"a\x00\xff\n\r"
    assert result.stderr == b"\xfe\x00e"
    assert (result.stdout_truncated, result.stderr_truncated) == (False, False)


def test_a_megabyte_comes_out_unharmed(module_box: Sandbox) -> None:
    result = module_box.execute(
        "head -c 1048576 /dev/urandom >/tmp/noise; cat /tmp/noise; sha256sum </tmp/noise >&2"
    )
    assert len(result.stdout) == MIB
    assert hashlib.sha256(result.stdout).hexdigest() == result.stderr_text.split()[0]
    assert not result.stdout_truncated


def test_what_is_too_much_is_cut_and_said_to_be(module_box: Sandbox) -> None:
    result = module_box.execute(["head", "-c", str(KEPT + MIB), "/dev/zero"])
    assert (result.exit_code, result.stdout_truncated) == (0, True)
    assert result.stdout == bytes(KEPT)
    assert (result.stderr, result.stderr_truncated) == (b"", False)


def test_stdin_is_empty(module_box: Sandbox) -> None:
    assert module_box.execute(["cat"]).stdout == b""


def test_cwd(module_box: Sandbox) -> None:
    assert module_box.execute(["pwd"]).stdout == b"/root\n"
    module_box.execute(["mkdir", "-p", "/tmp/a folder; $(false)"]).check()
    result = module_box.execute("pwd", cwd="/tmp/a folder; $(false)")
    assert result.stdout == b"/tmp/a folder; $(false)\n"


@pytest.mark.parametrize("cwd", ["/nowhere", "/etc/hostname", "-"])
def test_a_cwd_that_cannot_be_entered(module_box: Sandbox, cwd: str) -> None:
    result = module_box.execute("echo ran", cwd=cwd)
    assert result.exit_code == 126
    assert result.stdout == b""
    assert cwd in result.stderr_text


def test_env_is_given_as_it_is(module_box: Sandbox) -> None:
    env = {
        "SPACES": " a  b ",
        "LINES": "one\ntwo\n",
        "QUOTES": "'\"$(id)`id`",
        "EMPTY": "",
        "U": "ü",
    }
    for name, value in env.items():
        result = module_box.execute(["sh", "-c", f'printf %s "${name}"'], env=env)
        assert result.stdout.decode() == value, name
    names = module_box.execute(["env"], env={"PATH": "/usr/bin:/bin"}).stdout_text
    assert "PATH=/usr/bin:/bin\n" in names
    assert "HOME=/root\n" in names


def test_a_command_that_does_not_exist(module_box: Sandbox) -> None:
    result = module_box.execute(["no-such-program", "--flag"])
    assert result.exit_code == 127
    assert "no-such-program" in result.stderr_text


def test_commands_that_cannot_be(module_box: Sandbox) -> None:
    for command in (["echo", "x" * (129 << 10)], ["echo", *["x" * 65536] * 40], [""], ["a\0b"]):
        with pytest.raises(InvalidArgumentError):
            module_box.execute(command)
    with pytest.raises(InvalidArgumentError):
        module_box.execute([])
    with pytest.raises(InvalidArgumentError):
        module_box.execute("true", env={"A=B": "c"})
    with pytest.raises(InvalidArgumentError):
        module_box.execute("true", timeout=-1)
    largest = module_box.execute(["printf", "%s", "x" * (127 << 10)])
    assert len(largest.stdout) == 127 << 10


def test_a_time_out_is_a_result_and_leaves_no_process(module_box: Sandbox) -> None:
    result = module_box.execute(
        "trap '' TERM INT HUP\n"
        "echo so far; echo bad so far >&2\n"
        "sleep 98765 & setsid sleep 98765 & (setsid sh -c 'trap \"\" TERM; sleep 98765' &)\n"
        "(env -i /bin/sleep 98765 &)\n"
        "while :; do sleep 98765; done",
        timeout=2,
    )
    assert result.timed_out
    assert (result.exit_code, result.ok) == (None, False)
    assert (result.stdout, result.stderr) == (b"so far\n", b"bad so far\n")
    assert timedelta(seconds=2) <= result.duration < timedelta(seconds=40)
    assert living(module_box, "98765") == ""
    with pytest.raises(CommandFailedError, match="its time was up"):
        result.check()


def test_in_time_is_no_time_out(module_box: Sandbox) -> None:
    result = module_box.execute("exit 4", timeout=timedelta(minutes=1))
    assert (result.exit_code, result.timed_out) == (4, False)


def test_a_background_child_with_its_own_output_outlives_its_command(module_box: Sandbox) -> None:
    module_box.execute("sleep 87654 >/dev/null 2>&1 & true").check()
    found = living(module_box, "87654")
    assert found
    module_box.execute(f"kill {found.strip().removeprefix('/proc/')}").check()


def test_several_commands_run_at_once(module_box: Sandbox) -> None:
    module_box.execute(
        "rm -f /tmp/chain-*; for i in 0 1 2 3; do mkfifo /tmp/chain-$i; done"
    ).check()
    # Each hands on to the next, so that none can end unless all run; the last one begins.
    lines = [f"cat /tmp/chain-{i} >/tmp/chain-{i + 1}; echo {i}" for i in range(3)]
    lines += ["cat /tmp/chain-3", "echo went round >/tmp/chain-0; echo 4"]
    with ThreadPoolExecutor(len(lines)) as pool:
        results = list(pool.map(lambda line: module_box.execute(line, timeout=60), lines))
    assert [one.stdout for one in results] == [b"0\n", b"1\n", b"2\n", b"went round\n", b"4\n"]


def test_commands_go_on_while_application_snapshots_are_taken(
    client: Client, module_box: Sandbox
) -> None:
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(
            module_box.execute, "for i in $(seq 40); do echo $i | tee -a /tmp/long; sync; done"
        )
        taken = pool.submit(lambda: [module_box.snapshot(level="application") for _ in range(3)])
        count = 0
        while not taken.done() or count < 3:
            assert module_box.execute(f"echo {count}").check().stdout_text == f"{count}\n"
            count += 1
        assert long.result().check().stdout_text.split() == [str(i) for i in range(1, 41)]
    for snapshot in taken.result():
        assert snapshot.consistency is SnapshotLevel.APPLICATION
        client.snapshots.delete(snapshot.id)


async def test_a_cancelled_call_takes_its_command_along(
    client: Client, module_box: Sandbox
) -> None:
    module_box.execute("rm -f /tmp/begun; mkfifo /tmp/begun").check()
    async with AsyncClient(client.address) as asking:
        line = "setsid sleep 76543 & echo >/tmp/begun; sleep 76543"
        call = asyncio.create_task(asking.sandboxes.execute(module_box.id, line))
        await asking.sandboxes.execute(module_box.id, ["cat", "/tmp/begun"])
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
    wait_gone(module_box, "76543")


def test_a_client_out_of_time_takes_its_command_along(client: Client, module_box: Sandbox) -> None:
    with Client(client.address, timeout=1) as hasty, pytest.raises(DeadlineExceededError):
        hasty.sandboxes.execute(module_box.id, "sleep 65432")
    wait_gone(module_box, "65432")


def wait_gone(sandbox: Sandbox, word: str) -> None:
    """The daemon kills on its own time once it has noticed."""
    eventually(lambda: not living(sandbox, word), what=f"{word} still runs")


def test_no_commands_while_paused(module_box: Sandbox) -> None:
    module_box.pause()
    try:
        with pytest.raises(InvalidStateError, match="paused"):
            module_box.execute("true")
    finally:
        module_box.resume()
    assert module_box.execute("echo again").stdout == b"again\n"


def test_no_commands_without_a_guest(client: Client, tiny: Image) -> None:
    with client.sandboxes.create(image=tiny.id, memory=256, wait_for_ready=False) as sandbox:
        sandbox.stop(force=True)
        with pytest.raises(InvalidStateError, match="stopped"):
            sandbox.execute("true")
        sandbox.terminate()
        with pytest.raises(InvalidStateError, match="terminated"):
            sandbox.execute("true")
