"""Do the site's own processes answer when they are asked for their health?"""

import socket as socketlib
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.finding import Finding

__all__ = ["gateway", "worker"]

_PATIENCE_SECONDS = 5.0

_START = "`wardround-site up`, or start its unit"


def gateway(listen: str) -> Finding:
    """Ask the gateway that listens at ``host:port``."""
    try:
        answer = httpx.get(f"http://{listen}/health", trust_env=False, timeout=_PATIENCE_SECONDS)
    except httpx.ConnectError:
        return Finding("gateway", "warn", f"no gateway listens at {listen}", _START)
    except (httpx.HTTPError, httpx.InvalidURL):
        return Finding("gateway", "fail", f"what listens at {listen} does not answer", "end it, and start the gateway")
    word = answer.text.strip()
    if (answer.status_code, word) in ((200, "open"), (200, "paused")):
        return Finding("gateway", "ok", f"the gateway at {listen} is {word}")
    if answer.status_code == 503:
        remedy = "make room on the disk, and check who owns the folder of the audit log"
        return Finding("gateway", "fail", f"the gateway at {listen} says: {word[:200]}", remedy)
    return Finding("gateway", "fail", f"what listens at {listen} is no gateway", "end it, or say another --listen")


def worker(socket: Path) -> Finding:
    """Ask the worker behind a socket, by gRPC's own health service."""
    try:
        with socketlib.socket(socketlib.AF_UNIX) as probe:
            probe.connect(str(socket))
    except PermissionError:
        return Finding("worker", "warn", f"this user may not ask the worker at {socket}", "ask as the worker's user")
    except OSError:
        return Finding("worker", "warn", f"no worker listens at {socket}", _START)
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        try:
            status = ask(health_pb2.HealthCheckRequest(), timeout=_PATIENCE_SECONDS).status
        except grpc.RpcError as error:
            text = f"the worker at {socket} does not answer ({error.code().name})"
            return Finding("worker", "fail", text, "end it: whoever supervises it starts another")
    if status == health_pb2.HealthCheckResponse.SERVING:
        return Finding("worker", "ok", f"the worker at {socket} is serving")
    return Finding("worker", "fail", f"the worker at {socket} is not serving", "look into its log")
