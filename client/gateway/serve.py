"""The gateway as a web server on this machine's loopback, to which the site's SuperNode connects."""

import asyncio
import ipaddress
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import uvicorn
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from client.gateway.fleet import LARGEST_REQUEST
from client.gateway.gateway import Gateway, Settings
from client.gateway.health import answering
from client.gateway.peer import owner, user_number
from common.errors import FleetError, WardroundError

__all__ = ["application", "serve"]

#: Longer than Flower's client keeps a connection that it does not use.
_KEEP_SECONDS = 120

_STOP_SECONDS = 5
_CONNECTIONS = 64


def serve(settings: Settings, listen: str, health: str, node_user: str | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Parameters
    ----------
    settings : Settings
        The gateway's.
    listen, health : str
        ``address:port`` of the loopback: for the SuperNode, and for questions about the gateway's health.
    node_user : str or None
        The only user whose processes may be the node; None for anybody on this machine.

    Raises
    ------
    FleetError
        An address is not one of the loopback or nobody can be asked there, or there is no such user.
    MembershipError, AuditError, StorageError
        As `client.gateway.gateway.Gateway` raises them.
    """
    host, port = _loopback(listen)
    _loopback(health)
    user = None if node_user is None else user_number(node_user)
    gateway = Gateway(settings, _say)
    config = uvicorn.Config(
        application(gateway, user),
        host=host,
        port=port,
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    _say(f"open for a SuperNode at {listen}, health at {health}")
    asyncio.run(_run(uvicorn.Server(config), gateway, health))
    _say("closed")


async def _run(server: uvicorn.Server, gateway: Gateway, health: str) -> None:
    async with answering(health, {"": lambda: server.started and gateway.health(), "node": gateway.node_works}):
        # uvicorn raises the signal that ended it once more when it has closed everything.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        await server.serve()


def application(gateway: Gateway, user: int | None) -> Starlette:
    """Return the web application, for the processes of one user or of all."""

    async def fleet(request: Request) -> Response:
        try:
            if user is not None and user != _caller(request):
                raise FleetError("refused: the gateway answers the node's user only", 403)
            if request.headers.get("content-type") != PROTOBUF_MEDIA_TYPE:
                raise FleetError("refused: Flower's calls are protobuf", 415)
            answer = await gateway.answer(request.path_params["call"], await _body(request), request.is_disconnected)
        except FleetError as error:
            return PlainTextResponse(f"{error}\n", error.status)
        except WardroundError as error:
            return PlainTextResponse(f"{error}\n", 503)
        except ClientDisconnect:
            return PlainTextResponse("gone\n", 400)
        return Response(answer, media_type=PROTOBUF_MEDIA_TYPE)

    async def other(_: Request) -> Response:
        return PlainTextResponse("refused: the gateway answers Flower's fleet calls and nothing else\n", 403)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with gateway:
            yield

    routes = [
        Route("/v1/fleet/{call}", fleet, methods=["POST"]),
        Route("/{rest:path}", other, methods=["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _caller(request: Request) -> int | None:
    theirs, ours = request.client, request.scope.get("server")
    return owner((theirs.host, theirs.port), (ours[0], ours[1])) if theirs and ours else None


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LARGEST_REQUEST:
            raise FleetError(f"refused: a call has at most {LARGEST_REQUEST} bytes", 413)
    return bytes(body)


def _loopback(listen: str) -> tuple[str, int]:
    match = re.fullmatch(r"\[?([0-9A-Fa-f.:]+?)\]?:([0-9]{1,5})", listen)
    try:
        if match and ipaddress.ip_address(match[1]).is_loopback and 0 < int(match[2]) < 65536:
            return match[1], int(match[2])
    except ValueError:
        pass
    raise FleetError(
        f"not an address of this machine's loopback: {listen!r}; say 127.0.0.1:PORT, because nobody else is to reach "
        "the gateway, which speaks for this site"
    )


def _say(line: str) -> None:
    # Some of what is said comes from the coordinator: it shall not move a terminal's cursor.
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    with suppress(OSError):  # a log that cannot be written is no reason to stop
        print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} gateway: {shown}", file=sys.stderr, flush=True)
