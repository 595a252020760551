"""Ask a process for its health, by gRPC's own service: what units, containers and pods do. ::

    python -m deploy.health 127.0.0.1:9097
    python -m deploy.health unix:/run/wardround/worker/socket

It imports next to nothing: it is started every minute.
"""

import argparse
import os
import sys
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["ask"]

_PATIENCE_SECONDS = 5.0
_AGAIN_SECONDS = 0.2


def ask(address: str, service: str = "", seconds: float = _PATIENCE_SECONDS) -> str:
    """Return what a process says of its health.

    Parameters
    ----------
    address : str
        ``host:port``, or ``unix:`` and a socket's path.
    service : str
        Of what; empty for all of it.
    seconds : float
        How long to wait for the answer.

    Returns
    -------
    str
        ``SERVING``, ``NOT_SERVING``, or gRPC's word for why there is no answer: ``UNAVAILABLE`` where nobody listens.
    """
    # Never through the hospital's proxy.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=seconds)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "SERVING" if answer.status == health_pb2.HealthCheckResponse.SERVING else "NOT_SERVING"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deploy.health", description=_main.__doc__)
    parser.add_argument("address", help="HOST:PORT, or unix:PATH")
    parser.add_argument("service", nargs="?", default="", help="of what; all of it where it is not given")
    parser.add_argument(
        "--wait", type=int, metavar="PID", help="ask until it is serving, as long as that process lives"
    )
    options = parser.parse_args()
    while True:
        # Before the question: a process that has just ended may have answered.
        again = options.wait is not None and _lives(options.wait)
        said = ask(options.address, options.service)
        if said == "SERVING" or not again:
            break
        time.sleep(_AGAIN_SECONDS)
    print(said)
    sys.exit(said != "SERVING")


if __name__ == "__main__":
    _main()
