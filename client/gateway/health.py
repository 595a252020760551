"""gRPC's standard health service of the gateway: what units, containers, pods and the doctor ask."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2

from common.errors import FleetError

__all__ = ["answering"]

#: Questions at once; more are refused.
_CALLS = 8

_OPTIONS = [
    ("grpc.so_reuseport", 0),  # or two gateways could share the port, and one of them would answer for the other
    ("grpc.max_receive_message_length", 1024),
]


@asynccontextmanager
async def answering(address: str, services: Mapping[str, Callable[[], bool]]) -> AsyncIterator[None]:
    """Answer questions about the gateway's health while the context lasts.

    In the event loop that forwards, so that a gateway that hangs does not answer. The service ``liveness`` is for
    whoever would start it anew: that helps against hanging, and not against a full disk.

    Parameters
    ----------
    address : str
        ``address:port`` of the loopback.
    services : mapping of str to callable
        For each service, whether it does what it is for; called for every question. The empty name is the gateway.

    Raises
    ------
    FleetError
        Nothing can listen there.
    """
    known: dict[str, Callable[[], bool]] = {**services, "liveness": lambda: True}

    async def check(
        request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in known:
            await context.abort(grpc.StatusCode.NOT_FOUND, "")
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if known[request.service]() else states.NOT_SERVING)

    one = grpc.unary_unary_rpc_method_handler(
        check, health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    )
    handler = grpc.method_handlers_generic_handler(health.SERVICE_NAME, {"Check": one})
    server = grpc.aio.server(handlers=[handler], options=_OPTIONS, maximum_concurrent_rpcs=_CALLS)
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise FleetError(f"nothing can listen at {address}: --health takes another address") from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
