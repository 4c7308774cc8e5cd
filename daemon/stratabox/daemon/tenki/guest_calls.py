"""Calls of the control plane that are done inside of a session: git, and keys for ssh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.tenki import finding
from stratabox.daemon.tenki.errors import unary
from stratabox.daemon.tenki.git import Git
from stratabox.daemon.tenki.parts import Parts
from stratabox.daemon.tenki.ssh_keys import SshKeys
from stratabox.tenki.v1 import sandbox_pb2

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class GuestCalls:
    """Message in, one call, message out."""

    parts: Parts
    git: Git
    keys: SshKeys

    @unary
    async def GitOperation(
        self, request: sandbox_pb2.GitOperationRequest, context: Context
    ) -> sandbox_pb2.GitOperationResponse:
        """Run git."""
        await finding.running(self.parts, request.session_id)
        output = await self.git.operate(request.session_id, request.operation, request.args)
        return sandbox_pb2.GitOperationResponse(output=output)

    @unary
    async def UpdateSSHAuthorizedKeys(
        self, request: sandbox_pb2.UpdateSSHAuthorizedKeysRequest, context: Context
    ) -> sandbox_pb2.UpdateSSHAuthorizedKeysResponse:
        """Replace the keys by which the session's user may log in."""
        await finding.running(self.parts, request.session_id)
        await self.keys.update(request.session_id, request.ssh_authorized_keys)
        return sandbox_pb2.UpdateSSHAuthorizedKeysResponse()
