"""Tenki's data plane of one session without an SDK, frame by frame.

Never in one process with Tenki's SDKs, which bring messages of the same names.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from stratabox.tenki.v1 import data_plane_pb2 as pb
from support.tenki import Refused, Tenki, refused


@dataclass
class Ran:
    """All that was heard of a command."""

    kinds: list[str] = field(default_factory=list)
    pid: int = 0
    stdout: bytes = b""
    stderr: bytes = b""
    granted: int = 0
    exit: pb.RunExit = field(default_factory=pb.RunExit)


class Stream:
    """One call in both directions; `send` from the test, `heard` from the server."""

    def __init__(self, method: Any, envelope: Any, metadata: Any) -> None:
        self._envelope = envelope
        self._outgoing: queue.Queue[Any] = queue.Queue()
        self.call = method(iter(self._outgoing.get, None), metadata=metadata, timeout=300)

    def send(self, frame: Any) -> None:
        self._outgoing.put(self._envelope(frame=frame))

    def end(self) -> None:
        self._outgoing.put(None)

    def __iter__(self) -> Iterator[Any]:
        for message in self.call:
            yield message.frame

    def next(self) -> Any:
        return next(self.call).frame

    def printed(self) -> bytes:
        """What the command prints next, whatever else is told before."""
        while True:
            frame = self.next()
            if frame.WhichOneof("payload") == "stdout":
                return bytes(frame.stdout)
            assert frame.WhichOneof("payload") in ("keepalive", "stderr"), frame

    def cancel(self) -> None:
        self.call.cancel()
        self._outgoing.put(None)


class DataPlane:
    """What is done in one session."""

    def __init__(self, tenki: Tenki, session: str) -> None:
        self.session = session
        self._stub = tenki.data_plane
        self._metadata = tenki.credential(session)

    def started(self, *cmd: str, **fields: Any) -> Stream:
        """A command that was asked for."""
        given: dict[str, Any] = {"session_id": self.session, "stream_stdin": True} | fields
        stream = self.stream("Run")
        stream.send(pb.RunRequest(start=pb.RunStart(cmd=cmd, **given)))
        return stream

    def stream(self, method: str) -> Stream:
        envelope = getattr(pb, f"SandboxSessionDataPlaneService{method}Request")
        return Stream(getattr(self._stub, method), envelope, self._metadata)

    def run(self, *cmd: str, stdin: bytes = b"", **fields: Any) -> Ran:
        """A command, to its end."""
        stream = self.started(*cmd, **fields)
        for at in range(0, len(stdin), 1 << 20):
            stream.send(pb.RunRequest(stdin=stdin[at : at + (1 << 20)]))
        stream.send(pb.RunRequest(stdin_close=True))
        ran = heard(stream)
        stream.end()
        return ran

    def sh(self, line: str, **fields: Any) -> str:
        """What a line of the shell prints; it must succeed."""
        ran = self.run("sh", "-c", line, **fields)
        assert (ran.exit.exit_code, ran.stderr) == (0, b""), ran
        return ran.stdout.decode().rstrip("\n")

    def file(self, method: str, **fields: Any) -> Any:
        """One call about a file."""
        request = getattr(pb, f"{method}Request")(session_id=self.session, **fields)
        envelope = getattr(pb, f"SandboxSessionDataPlaneService{method}Request")
        answer = getattr(self._stub, method)(envelope(request=request), metadata=self._metadata)
        return answer.response

    def read_stream(self, path: str, **fields: Any) -> list[pb.ReadFileStreamResponse]:
        request = pb.ReadFileStreamRequest(session_id=self.session, path=path, **fields)
        envelope = pb.SandboxSessionDataPlaneServiceReadFileStreamRequest(request=request)
        return [
            each.response for each in self._stub.ReadFileStream(envelope, metadata=self._metadata)
        ]

    def write_stream(self, pieces: Iterator[bytes], **fields: Any) -> Any:
        """The call that writes a file; its `result` is the answer."""
        envelope = pb.SandboxSessionDataPlaneServiceWriteFileStreamRequest
        start = pb.WriteFileStreamStart(session_id=self.session, **fields)

        def requests() -> Iterator[Any]:
            yield envelope(frame=pb.WriteFileStreamRequest(start=start))
            for piece in pieces:
                yield envelope(frame=pb.WriteFileStreamRequest(data=piece))

        return self._stub.WriteFileStream.future(requests(), metadata=self._metadata)


def heard(stream: Stream, *, started: bool = False) -> Ran:
    """All that is heard of a command, and that it comes in the right order.

    :param started: what it says first has been heard.
    """
    ran = Ran()
    for frame in stream:
        kind = frame.WhichOneof("payload")
        assert not ran.kinds or ran.kinds[-1] != "exit", "exit is the last"
        ran.kinds.append(kind)
        match kind:
            case "started":
                ran.pid = frame.started.pid
            case "stdout":
                ran.stdout += frame.stdout
            case "stderr":
                ran.stderr += frame.stderr
            case "flow":
                ran.granted += frame.flow.stdin_grant_bytes
            case "exit":
                ran.exit = frame.exit
    assert ran.kinds[-1] == "exit"
    return ran


def refusal(call: Callable[[], object]) -> Refused:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refused(caught)
