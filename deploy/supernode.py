"""Flower's SuperNode, which ends itself where the site's gateway sees it hang. ::

    python -m deploy.supernode 127.0.0.1:9097 --insecure --superlink 127.0.0.1:9095 ...

First where the gateway answers gRPC's health service, then what `flower-supernode` takes. Flower 1.41 waits for ever
for the parts of an answer whose ClientApp has gone, and goes on sending heartbeats: its process lives, and for the
consortium the site is online. Only the gateway can tell, because it is not asked for work any more. Whoever started
this process (`wardround-site up`, systemd, Docker, the kubelet) starts it again.
"""

import argparse
import os
import sys
import time
from threading import Thread

from flwr.supernode.cli import flower_supernode

from deploy.health import ask

__all__ = ["HANGS", "watch"]

#: Exit code of a SuperNode that hung: temporary failure, as sysexits.h has it.
HANGS = 75

#: How often the gateway is asked.
_LOOK_SECONDS = 15.0


def watch(gateway: str) -> None:
    """End this process once a gateway has said twice in a row that its node hangs.

    Once may be too early: where all of a site has slept, the gateway can wake up first. A gateway that does not answer
    has said nothing.

    Parameters
    ----------
    gateway : str
        ``host:port`` of its health service.
    """
    said = 0
    while said < 2:
        time.sleep(_LOOK_SECONDS)
        said = said + 1 if ask(gateway, "node") == "NOT_SERVING" else 0
    print(
        "the SuperNode hangs: it asks the gateway for no work and has none, and so it ends", file=sys.stderr, flush=True
    )
    os._exit(HANGS)  # its main thread would not hear of it


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.supernode",
        description="Flower's SuperNode, which ends itself where the site's gateway sees it hang (exit code 75).",
        epilog="Example: python -m deploy.supernode 127.0.0.1:9097 --insecure --superlink 127.0.0.1:9095. All options "
        "but --help are those of flower-supernode.",
        allow_abbrev=False,
    )
    parser.add_argument("gateway", help="HOST:PORT where the gateway answers gRPC's health service")
    options, flowers = parser.parse_known_args()
    sys.argv[1:] = flowers
    Thread(target=watch, args=(options.gateway,), daemon=True).start()
    flower_supernode()


if __name__ == "__main__":
    _main()
