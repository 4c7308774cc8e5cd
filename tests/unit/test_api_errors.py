"""Every error of ours crosses the wire as itself; every bug only as "internal error"."""

from __future__ import annotations

import base64
import importlib
import logging
import pkgutil
import string
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from google.protobuf import duration_pb2, timestamp_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import stratabox.daemon
import stratabox.storage
from stratabox.daemon.api import convert
from stratabox.daemon.api.errors import streaming, unary
from stratabox.daemon.lifecycle.common.events import Happening
from stratabox.daemon.rpc.errors import CODES, DOMAIN, code_of, status_of
from stratabox.storage.model import errors
from stratabox.storage.model.errors import InternalError, NotFoundError, StrataboxError
from stratabox.storage.model.states import ImageState, Level, SandboxState, SnapshotState
from stratabox.v1 import records_pb2


def modules() -> Iterator[str]:
    for package in (stratabox.storage, stratabox.daemon):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # The launcher for libvirt needs an extra that need not be installed.
            if not module.name.endswith(("__main__", ".libvirt")):
                yield module.name


def descendants(kind: type[StrataboxError]) -> Iterator[type[StrataboxError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def ours() -> list[type[StrataboxError]]:
    for name in modules():
        importlib.import_module(name)
    found = {
        kind
        for kind in descendants(StrataboxError)
        if kind.__module__.startswith(("stratabox.daemon", "stratabox.storage"))
    }
    return sorted(found, key=lambda kind: kind.__qualname__)


def info_of(status: status_pb2.Status) -> error_details_pb2.ErrorInfo:
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    return info


# -- the table ------------------------------------------------------------------------------------


def test_every_class_of_the_model_has_its_row() -> None:
    kinds = {kind for kind in ours() if kind.__module__ == errors.__name__}
    assert set(CODES) == kinds
    assert len(kinds) == 13


def test_every_error_anywhere_has_a_code_a_reason_and_a_name() -> None:
    found = ours()
    assert set(CODES) < set(found)
    for kind in found:
        assert any(ancestor in CODES for ancestor in kind.__mro__), kind
        assert kind.__name__.endswith("Error"), kind
        assert kind.default_reason == kind.default_reason.upper(), kind
        assert kind.default_reason.replace("_", "").isalpha(), kind


def test_the_codes_are_those_of_the_style_guide() -> None:
    assert {kind.__name__: code.name for kind, code in CODES.items()} == {
        "NotFoundError": "NOT_FOUND",
        "AlreadyExistsError": "ALREADY_EXISTS",
        "InvalidArgumentError": "INVALID_ARGUMENT",
        "DeniedError": "FAILED_PRECONDITION",
        "FailedError": "FAILED_PRECONDITION",
        "ConflictError": "ABORTED",
        "NoSpaceError": "RESOURCE_EXHAUSTED",
        "UnavailableError": "UNAVAILABLE",
        "UnauthenticatedError": "UNAUTHENTICATED",
        "ForbiddenError": "PERMISSION_DENIED",
        "RateLimitedError": "RESOURCE_EXHAUSTED",
        "CorruptError": "DATA_LOSS",
        "InternalError": "INTERNAL",
    }


def test_a_class_without_a_row_takes_its_ancestors() -> None:
    lost = type("LostError", (NotFoundError,), {})
    assert code_of(lost("x")) is grpc.StatusCode.NOT_FOUND
    assert code_of(StrataboxError("x")) is grpc.StatusCode.INTERNAL


def test_an_error_keeps_its_words() -> None:
    error = NotFoundError("no such box", reason="SANDBOX_NOT_FOUND", box=1, nothing=None)
    assert (str(error), error.message) == ("no such box", "no such box")
    assert (error.reason, error.metadata) == ("SANDBOX_NOT_FOUND", {"box": "1"})
    assert NotFoundError("x").reason == "NOT_FOUND"


# -- one status -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CODES))
def test_a_status_says_all_but_the_internal_ones(kind: type[StrataboxError]) -> None:
    error = kind("the sentence", reason="THE_REASON", sandbox="s", limit=3)
    status = status_of(error)
    info = info_of(status)
    assert status.code == CODES[kind].value[0]
    assert (info.reason, info.domain) == ("THE_REASON", DOMAIN)
    if kind is InternalError:
        assert status.message == "internal error"
        assert dict(info.metadata) == {}
    else:
        assert status.message == "the sentence"
        assert dict(info.metadata) == {"sandbox": "s", "limit": "3"}


@pytest.mark.parametrize("letter", ["x", "é", "名", "🦀"])
def test_what_is_huge_is_cut_at_a_character(letter: str) -> None:
    status = status_of(NotFoundError(letter * 10**6, thing=letter * 10**6, other="kept"))
    info = info_of(status)
    for text in (status.message, info.metadata["thing"]):
        assert text.endswith(letter + " ...")
        assert set(text.removesuffix(" ...")) == {letter}
        assert 500 < len(text.encode()) <= 3072
    assert info.metadata["other"] == "kept"


def test_what_is_no_unicode_goes_over_all_the_same() -> None:
    status = status_of(NotFoundError("file '\udc80'", path="\udc80"))
    assert status.message == "file '?'"
    assert info_of(status).metadata["path"] == "?"


# -- over the wire --------------------------------------------------------------------------------


class Service:
    """Raises what it is told to."""

    error: BaseException | None = None
    closed = 0

    @unary
    async def one(self, request: bytes, context: object) -> bytes:
        if self.error:
            raise self.error
        return request

    @streaming
    async def many(self, request: bytes, context: object) -> AsyncIterator[bytes]:
        try:
            yield b"1"
            yield b"2"
            if self.error:
                raise self.error
        finally:
            self.closed += 1


@asynccontextmanager
async def talking(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "test",
                {
                    "one": grpc.unary_unary_rpc_method_handler(service.one),
                    "many": grpc.unary_stream_rpc_method_handler(service.many),
                },
            )
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def failure(channel: grpc.aio.Channel) -> tuple[grpc.StatusCode, status_pb2.Status | None]:
    call: Any = channel.unary_unary("/test/one")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"")
    return caught.value.code(), rpc_status.from_call(caught.value)  # type: ignore[arg-type]


async def test_errors_cross_the_wire() -> None:
    service = Service()
    async with talking(service) as channel:
        for kind, code in CODES.items():
            service.error = kind("the sentence", reason="THE_REASON", sandbox="s")
            assert await failure(channel) == (code, status_of(service.error))


async def test_a_bug_says_only_that_it_is_one(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    async with talking(service) as channel:
        for bug in (KeyError("secret"), InternalError("secret", key="secret"), OSError("secret")):
            caplog.clear()
            service.error = bug
            code, status = await failure(channel)
            assert code is grpc.StatusCode.INTERNAL
            assert status
            assert "secret" not in str(status)
            assert info_of(status).reason == "INTERNAL"
            assert "secret" in caplog.text, "the log has the whole story"
            assert {record.levelno for record in caplog.records} == {logging.ERROR}


async def test_errors_of_ours_are_not_logged_as_bugs(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    service.error = NotFoundError("no")
    async with talking(service) as channel:
        await failure(channel)
    assert not caplog.records


def trailer_bytes(status: status_pb2.Status) -> int:
    """What an answer takes: the message, percent-encoded, and the whole status in base64."""
    details = base64.b64encode(status.SerializeToString())
    return len(quote(status.message, safe=string.printable)) + len(details)


@pytest.mark.parametrize(("letter", "details"), [("名", 1), ("x", 20), ("名", 20)])
def test_huge_errors_fit_into_trailers(letter: str, details: int) -> None:
    """gRPC drops a part of the answers beyond 8 KiB, and all of those beyond 16 KiB."""
    huge = {f"detail{number}": letter * 10**6 for number in range(details)}
    assert trailer_bytes(status_of(NotFoundError(letter * 10**6, **huge))) < 8192 - 512


async def test_a_huge_error_crosses_the_wire() -> None:
    service = Service()
    service.error = NotFoundError("x" * 10**6, thing="y" * 10**6)
    async with talking(service) as channel:
        for _ in range(10):
            assert await failure(channel) == (
                grpc.StatusCode.NOT_FOUND,
                status_of(service.error),
            )


async def test_a_stream_ends_well_or_by_the_map() -> None:
    service = Service()
    async with talking(service) as channel:
        call: Any = channel.unary_stream("/test/many")
        assert [message async for message in call(b"")] == [b"1", b"2"]
        service.error = NotFoundError("gone", reason="SANDBOX_NOT_FOUND")
        seen: list[bytes] = []

        async def read() -> None:
            async for message in call(b""):
                seen.append(message)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
    assert seen == [b"1", b"2"]
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "gone"
    assert service.closed == 2


# -- converting -----------------------------------------------------------------------------------


def test_every_word_of_ours_has_its_number() -> None:
    for state in SandboxState:
        records_pb2.SandboxState.Value(f"SANDBOX_STATE_{state.upper()}")
    for snapshot_state in SnapshotState:
        records_pb2.SnapshotState.Value(f"SNAPSHOT_STATE_{snapshot_state.upper()}")
    for image_state in ImageState:
        records_pb2.ImageState.Value(f"IMAGE_STATE_{image_state.upper()}")
    assert set(convert._HAPPENINGS) == set(Happening)
    for level in (None, *Level):
        assert convert.level_from(convert.level(level)) is level


def test_words_that_are_none_are_refused() -> None:
    unknown: Any = 999
    unset: Any = 0
    for call in (
        lambda: convert.level_from(unknown),
        lambda: convert.sandbox_states([unknown]),
        lambda: convert.sandbox_states([unset]),
        lambda: convert.snapshot_states([unknown]),
        lambda: convert.snapshot_states([unset]),
    ):
        with pytest.raises(errors.InvalidArgumentError):
            call()


def test_times_outside_the_calendar_are_refused() -> None:
    now = datetime.now(UTC)
    message = convert.timestamp(now)
    assert message
    assert convert.time_from(message, "f") == now
    assert convert.timestamp(None) is None
    assert convert.duration(None) is None
    for seconds, nanos in ((2**62, 0), (-(2**62), 0), (0, -1), (0, 10**9), (-62135596801, 0)):
        with pytest.raises(errors.InvalidArgumentError, match="expires_at"):
            convert.time_from(timestamp_pb2.Timestamp(seconds=seconds, nanos=nanos), "expires_at")


def test_spans_are_bounded() -> None:
    assert convert.seconds_from(duration_pb2.Duration(seconds=1, nanos=500_000_000), "f") == 1.5
    for seconds, nanos in ((-1, 0), (0, -1), (2**62, 0), (366 * 86400, 1_000_000)):
        with pytest.raises(errors.InvalidArgumentError, match="timeout"):
            convert.seconds_from(duration_pb2.Duration(seconds=seconds, nanos=nanos), "timeout")


def test_an_error_inside_a_reply() -> None:
    message = convert.failure(NotFoundError("no", reason="IMAGE_NOT_FOUND", image="i"))
    assert (message.reason, message.message) == ("IMAGE_NOT_FOUND", "no")
    assert dict(message.metadata) == {"image": "i"}
    assert convert.failure(InternalError("secret")).message == "internal error"
