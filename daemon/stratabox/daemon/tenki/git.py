"""GitOperation: clone, checkout, diff and log, by the git of a session's guest.

It runs as the user that commands run as. Where a call names no directory, it is done in the
repository that was cloned last, which the guest's own git configuration remembers.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from stratabox.daemon.tenki.data_plane_run import Runs
from stratabox.daemon.tenki.guest_paths import absolute
from stratabox.storage.model.errors import FailedError, InvalidArgumentError
from stratabox.tenki.v1 import data_plane_pb2 as pb

OUTPUT_BYTES = 16 << 20
_WORDS_BYTES = 64 << 10
_WORDS = 1000
_DEPTHS = 1 << 31
_KNOWN = {
    "clone": {"repo", "branch", "depth", "directory"},
    "checkout": {"ref", "create", "directory"},
    "diff": {"range", "base", "head", "path", "directory"},
    "log": {"max_count", "range", "path", "directory"},
}
_TALKS = {"clone", "checkout"}
"""What they have to say comes on standard error."""
_MISREAD = re.compile(
    "terminated|template runtime failed|build in progress|snapshot not yet durable|sync.pending"
    "|volume is|inbound access is disabled",
    re.IGNORECASE,
)
"""In a text that has these, clients see other things than git's failure."""

# $1 where the clone is to be, then git's words.
_CLONE = """
at=$1
shift
git "$@" || exit
git config --global stratabox.repository "$at"
"""
# $1 where or nothing, then git's words.
_IN_REPOSITORY = """
at=${1:-$(git config --global --get stratabox.repository)}
shift
[ -z "$at" ] || cd -- "$at" || exit 128
exec git "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Git:
    """Runs git in guests."""

    runs: Runs

    async def operate(self, session: str, operation: str, args: Mapping[str, str]) -> str:
        """Do one operation and return what git said.

        :raise InvalidArgumentError: for an operation or arguments that cannot be.
        :raise FailedError: GIT_FAILED, as "git clone failed (exit_code=128); … : its words".
        :raise StrataboxError: as `Runs.run`.
        """
        done = await self._run(session, command(operation, args))
        said, words = (each.decode(errors="replace") for each in (done.stdout, done.stderr))
        if done.exit.exit_code or done.exit.signal:
            raise failure(operation, done.exit, words)
        if len(done.stdout) > OUTPUT_BYTES:
            raise FailedError(
                f"git {operation} has more to say than {OUTPUT_BYTES} bytes: run it as a command",
                reason="OUTPUT_TOO_LONG",
            )
        return f"{said}{words}".strip() if operation in _TALKS else said

    async def _run(self, session: str, words: list[str]) -> _Done:
        start = pb.RunStart(session_id=session, cmd=words, env={"GIT_TERMINAL_PROMPT": "0"})
        stdout, stderr = bytearray(), bytearray()
        async with aclosing(self.runs.run(start, _nothing())) as frames:
            async for frame in frames:
                match frame.WhichOneof("payload"):
                    case "stdout":
                        stdout += frame.stdout[: OUTPUT_BYTES + 1 - len(stdout)]
                    case "stderr":
                        stderr += frame.stderr[: _WORDS_BYTES - len(stderr)]
                    case "exit":
                        return _Done(bytes(stdout), bytes(stderr), frame.exit)
        raise AssertionError("a command's last frame is its exit")


@dataclass(frozen=True)
class _Done:
    stdout: bytes
    stderr: bytes
    exit: pb.RunExit


def command(operation: str, args: Mapping[str, str]) -> list[str]:
    """What is run in the guest.

    :raise InvalidArgumentError: when it cannot be.
    """
    known = _KNOWN.get(operation)
    if known is None:
        raise InvalidArgumentError(
            f"there is no operation {operation[:40]!r}: use one of {', '.join(_KNOWN)}",
            field="operation",
        )
    for name in args:
        if name not in known:
            raise InvalidArgumentError(f"git {operation} takes no {name[:40]!r}", field="args")
    directory = args.get("directory", "")
    if operation == "clone":
        at = absolute(directory or repository_name(_given(args, "repo")))
        return ["sh", "-c", _CLONE, "sh", at, *_clone(args, at)]
    words = {"checkout": _checkout, "diff": _diff, "log": _log}[operation](args)
    at = absolute(directory) if directory else ""
    return ["sh", "-c", _IN_REPOSITORY, "sh", at, *words]


def _clone(args: Mapping[str, str], at: str) -> list[str]:
    words = ["clone"]
    if branch := args.get("branch"):
        words += ["--branch", _revision(branch, "branch")]
    if args.get("depth"):
        words += ["--depth", _number(args["depth"], "depth")]
    return [*words, "--", args["repo"], at]


def _checkout(args: Mapping[str, str]) -> list[str]:
    ref = _revision(_given(args, "ref"), "ref")
    return ["checkout", *(["-b"] if args.get("create") == "true" else []), ref, "--"]


def _diff(args: Mapping[str, str]) -> list[str]:
    revisions = [args[name] for name in ("range", "base", "head") if args.get(name)]
    return ["diff", "--no-color", *_limited(revisions, args)]


def _log(args: Mapping[str, str]) -> list[str]:
    words = ["log", "--no-color"]
    if args.get("max_count"):
        words.append(f"--max-count={_number(args['max_count'], 'max_count')}")
    return [*words, *_limited([args["range"]] if args.get("range") else [], args)]


def _limited(revisions: list[str], args: Mapping[str, str]) -> list[str]:
    path = [args["path"]] if args.get("path") else []
    return [*(_revision(each, "range") for each in revisions), "--", *path]


def repository_name(repo: str) -> str:
    """The directory that git makes of a repository's address, when it is not told another."""
    name = repo.rstrip("/").removesuffix("/.git").rstrip("/")
    name = re.split("[/:]", name)[-1].removesuffix(".git")
    if not name or name in (".", ".."):
        raise InvalidArgumentError("repo has no name: say a directory", field="repo")
    return name


def _given(args: Mapping[str, str], name: str) -> str:
    if not args.get(name):
        raise InvalidArgumentError(f"{name} is missing", field=name)
    return args[name]


def _revision(name: str, field: str) -> str:
    if name.startswith("-"):  # git would take it for an option
        raise InvalidArgumentError(f"{field} cannot begin with -", field=field)
    return name


def _number(text: str, field: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and 0 < int(text) < _DEPTHS):
        raise InvalidArgumentError(f"{field} is no number", field=field)
    return text


def failure(operation: str, exit_: pb.RunExit, words: str) -> FailedError:
    """The error of an operation that git ended so, with the end of its words."""
    lines = [line for line in words.strip().splitlines() if not _MISREAD.search(line)]
    said = "\n".join(lines)[-_WORDS:]
    return FailedError(
        f"git {operation} failed (exit_code={exit_.exit_code}); check the repository, ref and"
        f" access token: {said or 'it does not say why'}",
        reason="GIT_FAILED",
    )


async def _nothing() -> AsyncIterator[pb.RunRequest]:
    return
    yield
