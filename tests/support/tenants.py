"""Every call of every service, with the words that name a thing: for whoever tries another's.

Goes by the descriptors. A text field of a request is one that names things (`REFERENCES`), or one
that does not (`HARMLESS`); a test tells of one that is neither. What a call takes beside the name,
so that it gets as far as looking for it, is in `more`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

import stratabox.v1

REFERENCES = {
    "sandbox": "sandbox", "sandboxes": "sandbox", "start.sandbox": "sandbox",
    "header.sandbox": "sandbox", "sandbox.id": "sandbox", "snapshot": "snapshot",
    "snapshots": "snapshot", "since": "snapshot", "snapshot.id": "snapshot", "volume": "volume",
    "volume.id": "volume", "volumes.volume": "volume", "mount.volume": "volume",
    "volume_snapshot": "volume_snapshot", "job": "job", "id": "port",
}  # fmt: skip
"""Of a request, by its path → what it names."""
HARMLESS = {
    "argv", "shell", "cwd", "key", "value", "user", "term", "stdin", "data", "path", "owner",
    "group", "source", "target", "image", "page_token", "name", "address", "public_key",
    "public_keys", "allow", "tags", "idempotency_key", "user_data", "ssh_keys", "volume_name",
    "snapshot_name", "manifest_sha256", "workspace", "process", "release", "include",
}  # fmt: skip
"""Last words of paths: texts that name nothing of a workspace's, or only within a sandbox."""
OUTPUT = ("sandbox.", "snapshot.", "volume.")
"""Records in requests that change them: of these only the id is read, and what may be changed."""


@dataclass(frozen=True)
class Place:
    """A call, and where in its request something is named."""

    method: MethodDescriptor
    path: str

    @property
    def call(self) -> str:
        """As roles have it."""
        return f"{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def kind(self) -> str:
        """What is named."""
        return REFERENCES[self.path]

    def __str__(self) -> str:
        return f"{self.method.name} {self.path}"

    def request(self, reference: str, mine: dict[str, str]) -> Message:
        """One that names it so, and is right but for that."""
        made = empty(self.method)
        for other in _paths(self.method.input_type):
            if other in ("sandbox", "snapshot") and other != self.path:
                setattr(made, other, mine[other])
        if self.path == "sandbox" and self.method.name == "DetachVolume":
            _put(made, "volume", mine["volume"])
        if self.path == "sandbox" and self.method.name == "AttachVolume":
            _put(made, "mount.volume", mine["volume"])
        more(self.method.name, made)
        _put(made, self.path, reference)
        if self.path == "volumes.volume":
            _put(made, "volumes.path", "/v")
        return made


def methods() -> Iterator[MethodDescriptor]:
    """All of our own services."""
    for module in pkgutil.iter_modules(stratabox.v1.__path__):
        if module.name.endswith("_pb2"):
            found = importlib.import_module(f"stratabox.v1.{module.name}").DESCRIPTOR
            for service in found.services_by_name.values():
                yield from service.methods


def places() -> Iterator[Place]:
    """Wherever a call names a thing."""
    for method in methods():
        for path in _paths(method.input_type):
            if path in REFERENCES:
                yield Place(method, path)


def unknown() -> list[str]:
    """Text fields of requests of which nobody has said whether they name a thing."""
    return [
        f"{method.name} {path}"
        for method in methods()
        for path in _paths(method.input_type)
        if path not in REFERENCES
        and path.rpartition(".")[2] not in HARMLESS
        and not path.startswith(OUTPUT)
    ]


def more(name: str, request: Any) -> None:
    """What a call takes beside what it names."""
    given: dict[str, Callable[[], object]] = {
        "ExecuteCommand": lambda: request.argv.append("true"),
        "Exec": lambda: request.start.argv.append(b"true"),
        "WriteConsole": lambda: setattr(request, "data", b"x"),
        "MoveFile": lambda: _set(request, source="/tmp/a", target="/tmp/b"),
        "MakeSymlink": lambda: _set(request, path="/tmp/a", target="/tmp/b"),
        "ChangeFile": lambda: _set(request, path="/tmp/a", mode=0o600),
        "WriteFile": lambda: _set(request.header, path="/tmp/a"),
        "WriteArchive": lambda: _set(request.header, path="/tmp"),
        "AddPort": lambda: _set(request.guest, port=80),
        "Dial": lambda: _set(request.start.endpoint, port=80),
        "UpdateSandbox": lambda: _named(request, request.sandbox),
        "UpdateSnapshot": lambda: _named(request, request.snapshot),
        "UpdateVolume": lambda: _named(request, request.volume),
        "ResizeVolume": lambda: _set(request, size_bytes=1 << 30),
        "AttachVolume": lambda: _set(request.mount, path="/v"),
        "SetAuthorizedKeys": lambda: _set(request, user="root"),
        "SignalProcess": lambda: _set(request, process="1", signal=1),
        "AttachProcess": lambda: _set(request, process="1"),
        "WaitProcess": lambda: _set(request, process="1"),
    }
    if name in given:
        given[name]()
    elif "path" in request.DESCRIPTOR.fields_by_name:
        _set(request, path="/tmp")


@dataclass(frozen=True)
class Answer:
    """What came back; the word that was asked for is left out of it."""

    code: grpc.StatusCode
    text: str
    reason: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    messages: tuple[bytes, ...] = ()


def ask(channel: grpc.Channel, key: str, method: MethodDescriptor, request: Message) -> Answer:
    """Make any call with one message, and return its first one, or why there is none."""
    call: Any = channel.stream_stream(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda message: message.SerializeToString(),
    )
    going = call(iter([request]), metadata=[("authorization", f"Bearer {key}")], timeout=300)
    try:
        first = next(going, b"")
    except grpc.RpcError as error:
        return _failure(error)
    finally:
        going.cancel()
    return Answer(grpc.StatusCode.OK, "", messages=(first,))


def empty(method: MethodDescriptor) -> Message:
    """A request that says nothing."""
    made: Message = GetMessageClass(method.input_type)()
    return made


def masked(answer: Answer, reference: str) -> Answer:
    """The same, whatever was asked for."""
    return Answer(
        answer.code,
        answer.text.replace(reference, "…"),
        answer.reason,
        tuple((name, value.replace(reference, "…")) for name, value in answer.metadata),
        answer.messages,
    )


def _failure(error: Any) -> Answer:
    info = ErrorInfo()
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
    pairs = tuple(sorted(info.metadata.items()))
    return Answer(error.code(), error.details(), info.reason, pairs)


def _paths(message: Descriptor, depth: int = 0, above: str = "") -> Iterator[str]:
    for field in message.fields:
        path = f"{above}{field.name}"
        if field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
            yield path
        inner = field.message_type
        if inner is not None and depth < 2 and not inner.full_name.startswith("google."):
            yield from _paths(inner, depth + 1, f"{path}.")


def _put(message: Any, path: str, value: str) -> None:
    first, _, rest = path.partition(".")
    repeated = message.DESCRIPTOR.fields_by_name[first].is_repeated
    if rest:
        held = getattr(message, first)
        inner = (held[0] if held else held.add()) if repeated else held
        _put(inner, rest, value)
    elif repeated:
        getattr(message, first)[:] = [value]
    else:
        setattr(message, first, value)


def _set(message: Any, **values: object) -> None:
    for name, value in values.items():
        field = message.DESCRIPTOR.fields_by_name[name]
        as_bytes = field.type == FieldDescriptor.TYPE_BYTES and isinstance(value, str)
        setattr(message, name, value.encode() if as_bytes and isinstance(value, str) else value)


def _named(request: Any, record: Any) -> None:
    record.name = "renamed"
    request.update_mask.paths.append("name")
