"""Which methods there are and who answers each; the rest of Tenki's is said not to be served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from stratabox.daemon.rpc.errors import leaving
from stratabox.daemon.tenki import errors
from stratabox.tenki.v1 import data_plane_pb2, sandbox_pb2

PACKAGE = "tenki.sandbox.v1"
CONTROL: ServiceDescriptor = sandbox_pb2.DESCRIPTOR.services_by_name["SandboxService"]
DATA_PLANE: ServiceDescriptor = data_plane_pb2.DESCRIPTOR.services_by_name[
    "SandboxSessionDataPlaneService"
]


class TenkiServices:
    """Tenki's services.

    :param control: objects whose methods of the right names answer; each one's by one of them.
    :param data_plane: likewise.
    """

    def __init__(self, *, control: Sequence[object], data_plane: Sequence[object]) -> None:
        self.handlers = {
            CONTROL.full_name: handlers(CONTROL, control),
            DATA_PLANE.full_name: handlers(DATA_PLANE, data_plane),
        }

    @property
    def names(self) -> Sequence[str]:
        """Their full names."""
        return list(self.handlers)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Have a server answer them."""
        generic = [
            grpc.method_handlers_generic_handler(name, dict(methods))
            for name, methods in self.handlers.items()
        ]
        server.add_generic_rpc_handlers((*generic, Unserved()))


def handlers(service: ServiceDescriptor, parts: Sequence[object]) -> Mapping[str, Any]:
    """The methods of a service that there is somebody to answer for."""
    found: dict[str, Any] = {}
    for method in service.methods:
        for part in parts:
            answer = getattr(part, method.name, None)
            if answer is not None:
                assert method.name not in found, f"{method.name} is answered twice"
                found[method.name] = _handler(method, answer)
    return found


class Unserved(grpc.GenericRpcHandler):
    """Answers what Tenki's clients may ask for and nobody here answers."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """A method that says so; None for what is not Tenki's."""
        method = handler_call_details.method.removeprefix("/")
        if not method.startswith(f"{PACKAGE}."):
            return None

        async def answer(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            error = errors.UnservedError(method[:200])
            await context.abort_with_status(leaving(errors.status_of(error)))

        return grpc.stream_stream_rpc_method_handler(answer)


def _handler(method: MethodDescriptor, answer: Any) -> Any:
    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    reply = GetMessageClass(method.output_type)
    return make(
        answer,
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=reply.SerializeToString,
    )
