"""The application: which path leads to which call, and what OpenAPI says of it."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Scope

from stratabox.daemon.rest import models
from stratabox.daemon.rest.errors import MEANINGS, RefusedError, reply, reply_to_any
from stratabox.daemon.rest.sandboxes import SandboxCalls
from stratabox.daemon.rest.snapshots import SnapshotCalls
from stratabox.storage.model.errors import StrataboxError

DOCUMENT = "/v1/openapi.json"
OPEN_PATHS = frozenset({DOCUMENT})
"""Answered without a key: the same for everybody, and about nobody."""
KEY_HEADER = "x-api-key"

_ALWAYS = (400, 401, 403, 429, 500, 503)
_BODY = (408, 413)
_NAMED = (404, 409)
_MADE = (404, 409, 422)
_SHOWN_ERRORS = 5
_DESCRIPTION = """\
Sandboxes are virtual machines: snapshots of them are taken while they run, and become as many new
ones as you like. Every error has the body `{"error": {"code", "message", "details"}}`.
"""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One endpoint."""

    verb: str
    path: str
    name: str
    """Of the function that answers."""
    rpc: str
    """The gRPC method that does the same: it takes the same role."""
    reply: Any
    status: int = 200
    fails: tuple[int, ...] = _NAMED


_SANDBOXES = "stratabox.v1.SandboxesService"
_SNAPSHOTS = "stratabox.v1.SnapshotsService"
_SANDBOX = "/v1/sandboxes/{sandbox_id}"
_SNAPSHOT = "/v1/snapshots/{snapshot_id}"

SANDBOX_CALLS = (
    Call(verb="POST", path="/v1/sandboxes", name="create_sandbox", reply=models.Sandbox,
         rpc=f"{_SANDBOXES}/CreateSandbox", status=201, fails=(*_BODY, *_MADE)),
    Call(verb="GET", path="/v1/sandboxes/list", name="list_sandboxes",
         reply=list[models.Sandbox], rpc=f"{_SANDBOXES}/ListSandboxes", fails=(422,)),
    Call(verb="GET", path=_SANDBOX, name="get_sandbox", reply=models.Sandbox,
         rpc=f"{_SANDBOXES}/GetSandbox"),
    Call(verb="DELETE", path=_SANDBOX, name="delete_sandbox", reply=models.Deleted,
         rpc=f"{_SANDBOXES}/DeleteSandbox"),
    Call(verb="POST", path=f"{_SANDBOX}/execute", name="execute_command", reply=models.Executed,
         rpc=f"{_SANDBOXES}/ExecuteCommand", fails=(*_BODY, *_MADE)),
    Call(verb="POST", path=f"{_SANDBOX}/snapshot", name="snapshot_sandbox", status=201,
         reply=models.Snapshot, rpc=f"{_SNAPSHOTS}/CreateSnapshot", fails=(*_BODY, *_MADE)),
    Call(verb="POST", path=f"{_SANDBOX}/clone", name="clone_sandbox", reply=models.Clone,
         rpc=f"{_SANDBOXES}/CloneSandbox", status=201, fails=(*_BODY, *_MADE)),
    Call(verb="POST", path=f"{_SANDBOX}/pause", name="pause_sandbox", reply=models.Sandbox,
         rpc=f"{_SANDBOXES}/PauseSandbox"),
    Call(verb="POST", path=f"{_SANDBOX}/resume", name="resume_sandbox", reply=models.Sandbox,
         rpc=f"{_SANDBOXES}/ResumeSandbox"),
)  # fmt: skip
SNAPSHOT_CALLS = (
    Call(verb="GET", path="/v1/snapshots/list", name="list_snapshots",
         reply=list[models.Snapshot], rpc=f"{_SNAPSHOTS}/ListSnapshots", fails=(422,)),
    Call(verb="GET", path=_SNAPSHOT, name="get_snapshot", reply=models.Snapshot,
         rpc=f"{_SNAPSHOTS}/GetSnapshot"),
    Call(verb="DELETE", path=_SNAPSHOT, name="delete_snapshot", reply=models.Deleted,
         rpc=f"{_SNAPSHOTS}/DeleteSnapshot"),
    Call(verb="POST", path=f"{_SNAPSHOT}/restore", name="restore_snapshot", reply=models.Sandbox,
         rpc=f"{_SNAPSHOTS}/RestoreSnapshot", status=201, fails=(*_BODY, *_MADE)),
)  # fmt: skip
CALLS = (*SANDBOX_CALLS, *SNAPSHOT_CALLS)
"""Every endpoint; docs/compatibility.md has a row for each."""


class Application:
    """The ASGI application, without a guard before it."""

    def __init__(self, sandboxes: SandboxCalls, snapshots: SnapshotCalls) -> None:
        self.asgi = FastAPI(
            title="Stratabox",
            version=metadata.version("stratabox"),
            description=_DESCRIPTION,
            openapi_url=DOCUMENT,
            docs_url=None,  # they load scripts from elsewhere
            redoc_url=None,
            redirect_slashes=False,
            strict_content_type=False,  # a body without a type can only be JSON
        )
        for path in {call.path for call in CALLS if call.path.endswith("/list")}:
            self.asgi.add_api_route(
                path, _no_id, methods=["DELETE"], include_in_schema=False, operation_id=path
            )
        for calls, handlers in ((SANDBOX_CALLS, sandboxes), (SNAPSHOT_CALLS, snapshots)):
            for call in calls:
                self._add(call, getattr(handlers, call.name))
        _leave_out_the_frameworks_errors(self.asgi.openapi())
        self.asgi.add_exception_handler(StrataboxError, _answer)
        self.asgi.add_exception_handler(OSError, _answer)
        self.asgi.add_exception_handler(RequestValidationError, _answer_invalid)
        self.asgi.add_exception_handler(HTTPException, _answer_http)

    def find(self, scope: Scope) -> tuple[Call | None, dict[str, str]]:
        """The call that a request makes, and what its path names; None: there is no such one."""
        for call, match in _at(scope["path"]):
            if scope["method"] == call.verb:
                names = match.groupdict()
                return call, {key.removesuffix("_id"): text for key, text in names.items()}
        return None, {}

    def _add(self, call: Call, handler: Callable[..., Awaitable[Response]]) -> None:
        lines = (handler.__doc__ or "").strip().splitlines()
        self.asgi.add_api_route(
            call.path,
            handler,
            methods=[call.verb],
            operation_id=call.name,
            summary=lines[0].rstrip("."),
            response_model=call.reply,
            status_code=call.status,
            responses=_headers(call)
            | {
                status: {"model": models.Error, "description": MEANINGS[status]}
                for status in sorted({*_ALWAYS, *call.fails})
            },
            dependencies=[Security(_KEY)],
            tags=[call.path.split("/")[2]],
        )


def _leave_out_the_frameworks_errors(document: dict[str, Any]) -> None:
    """FastAPI documents a 422 of its own wherever there is none of ours; nobody ever gets it."""
    for operations in document["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    for schema in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(schema, None)


def _headers(call: Call) -> dict[int | str, dict[str, Any]]:
    """What of a good answer is said by its headers."""
    if not call.path.endswith("/list"):
        return {}
    link = {"description": "Where the next page is (RFC 8288).", "schema": {"type": "string"}}
    return {call.status: {"headers": {"Link": link}}}


_KEY = APIKeyHeader(
    name=KEY_HEADER, auto_error=False, description="`stratabox key create` makes one."
)
_PATTERNS = [(call, compile_path(call.path)[0]) for call in CALLS]


def _at(path: str) -> list[tuple[Call, re.Match[str]]]:
    """The calls at a path. What is called as an endpoint is, is that endpoint and no id."""
    found = [(call, match) for call, pattern in _PATTERNS if (match := pattern.match(path))]
    return [each for each in found if each[0].path == path] or found


async def _no_id() -> Response:
    """What would end the sandbox "list"."""
    raise HTTPException(405)


async def _answer(request: Request, error: Exception) -> Response:
    return reply_to_any(error)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Say what of a request is not as the document says; never what was sent, it may be secret."""
    assert isinstance(error, RequestValidationError)
    wrong = []
    for each in error.errors()[:_SHOWN_ERRORS]:
        where = ".".join(str(part) for part in each["loc"])[:200]
        what = str(each["msg"])
        if each["type"] == "json_invalid":
            where, what = "body", "it is not JSON"
        if each["type"] == "extra_forbidden":
            what = "there is no such field"
            if where == "body.resources.storage":
                what += ": a clone's storage is its source's"
        wrong.append(f"{where}: {what}")
    return reply(
        RefusedError(
            400, "; ".join(wrong), reason="INVALID_ARGUMENT", field=wrong[0].partition(":")[0]
        )
    )


async def _answer_http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses."""
    assert isinstance(error, HTTPException)
    path, verb = request.url.path[:200], request.method
    verbs = sorted({call.verb for call, _ in _at(path)})
    if path in OPEN_PATHS:
        verbs = ["GET", "HEAD"]
    match error.status_code:
        case 404:
            what = RefusedError(404, f"there is no {path}: see {DOCUMENT}", reason="PATH_NOT_FOUND")
        case 405:
            what = RefusedError(
                405, f"{path} takes {', '.join(verbs)}, not {verb}", reason="METHOD_NOT_ALLOWED"
            )
        case _:
            what = RefusedError(error.status_code, str(error.detail), reason="INVALID_ARGUMENT")
    response = reply(what)
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(verbs)
    return response
