"""SshService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpc.aio import ServicerContext

from stratabox.daemon.api.errors import unary
from stratabox.daemon.lifecycle.inside import keys
from stratabox.daemon.lifecycle.inside.callers import Callers
from stratabox.storage.model.ports import AuthorizedKey
from stratabox.v1 import ssh_pb2, ssh_pb2_grpc

Context = ServicerContext[Any, Any]


@dataclass(frozen=True, kw_only=True)
class SshServicer(ssh_pb2_grpc.SshServiceServicer):
    """Message in, one call, message out."""

    callers: Callers

    @unary
    async def SetAuthorizedKeys(
        self, request: ssh_pb2.SetAuthorizedKeysRequest, context: Context
    ) -> ssh_pb2.ListAuthorizedKeysResponse:
        """Replace the keys by which one user may log in."""
        return _keys(
            await self.callers.set_keys(request.sandbox, request.user, request.public_keys)
        )

    @unary
    async def ListAuthorizedKeys(
        self, request: ssh_pb2.ListAuthorizedKeysRequest, context: Context
    ) -> ssh_pb2.ListAuthorizedKeysResponse:
        """List the keys, by user."""
        return _keys(await self.callers.keys(request.sandbox, request.user))

    @unary
    async def GetHostKeys(
        self, request: ssh_pb2.GetHostKeysRequest, context: Context
    ) -> ssh_pb2.GetHostKeysResponse:
        """Learn the guest's host keys."""
        async with self.callers.dial_ssh(request.sandbox, "") as dialed:
            return ssh_pb2.GetHostKeysResponse(host_keys=dialed.host_keys)


def _keys(found: Sequence[AuthorizedKey]) -> ssh_pb2.ListAuthorizedKeysResponse:
    return ssh_pb2.ListAuthorizedKeysResponse(
        keys=(
            ssh_pb2.AuthorizedKey(
                user=each.user, public_key=each.key, fingerprint=keys.fingerprint(each.key)
            )
            for each in found
        )
    )
