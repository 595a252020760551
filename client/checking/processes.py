"""Do the site's own processes answer when they are asked for their health, by gRPC's own service?"""

import socket as socketlib
from pathlib import Path

from client.finding import Finding
from deploy.health import ask

__all__ = ["gateway", "worker"]

_PATIENCE_SECONDS = 5.0

_START = "`wardround-site up`, or start its unit"


def gateway(health: str) -> Finding:
    """Ask the gateway at the ``host:port`` of its health service."""
    host, _, port = health.rpartition(":")
    try:
        socketlib.create_connection((host.strip("[]"), int(port)), _PATIENCE_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        return Finding("gateway", "warn", f"no gateway listens at {health}", _START)
    match ask(health, seconds=_PATIENCE_SECONDS):
        case "SERVING":
            if ask(health, "node", _PATIENCE_SECONDS) == "NOT_SERVING":
                text = f"the gateway at {health} is serving, but no SuperNode has asked it for work for a minute"
                return Finding("gateway", "warn", text, _START)
            return Finding("gateway", "ok", f"the gateway at {health} is serving")
        case "NOT_SERVING":
            text = f"the gateway at {health} cannot write the audit log: nothing leaves"
            remedy = "make room on the disk, and check who owns the folder of the audit log"
            return Finding("gateway", "fail", text, remedy)
        case why:
            text = f"what listens at {health} does not answer as a gateway does ({why})"
            return Finding("gateway", "fail", text, "end it, and start the gateway; or say another --health")


def worker(socket: Path) -> Finding:
    """Ask the worker behind a socket."""
    try:
        with socketlib.socket(socketlib.AF_UNIX) as probe:
            probe.connect(str(socket))
    except PermissionError:
        return Finding("worker", "warn", f"this user may not ask the worker at {socket}", "ask as the worker's user")
    except OSError:
        return Finding("worker", "warn", f"no worker listens at {socket}", _START)
    match ask(f"unix:{socket}", seconds=_PATIENCE_SECONDS):
        case "SERVING":
            return Finding("worker", "ok", f"the worker at {socket} is serving")
        case "NOT_SERVING":
            return Finding("worker", "fail", f"the worker at {socket} is not serving", "look into its log")
        case why:
            text = f"the worker at {socket} does not answer ({why})"
            return Finding("worker", "fail", text, "end it: whoever supervises it starts another")
