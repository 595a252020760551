"""`wardround-site up`: all processes of a site, as one."""

import os
import secrets
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from client.data.catalogue import open_catalogue
from client.files import write_whole
from client.gateway.commands import DAILY, HEALTH, LISTEN
from client.membership import joined
from client.worker.cli import socket_of
from common.console import plain_errors
from common.environment import flower_environment, tool
from common.paths import home
from deploy.addresses import must_be_free
from deploy.supervise import Part, printer, supervise

__all__ = ["up"]


@plain_errors
def up(
    site: Annotated[
        Path | None,
        typer.Option(
            "--site", help="The folder with keys, approvals and audit log.", show_default="$WARDROUND_HOME/site"
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="The folder with catalogue and prepared pixels.", show_default="that of --site"),
    ] = None,
    listen: Annotated[str, typer.Option(help="Where the gateway waits for the SuperNode (loopback).")] = LISTEN,
    health: Annotated[str, typer.Option(help="Where the gateway answers gRPC's health service (loopback).")] = HEALTH,
    node_port: Annotated[
        int, typer.Option("--node-port", min=1, max=65535, help="Where the SuperNode waits for Flower's executor.")
    ] = 9094,
    socket: Annotated[
        Path | None,
        typer.Option(help="Where the ClientApp finds the worker.", show_default="worker/socket in that of --images"),
    ] = None,
    proxy: Annotated[
        str | None,
        typer.Option(help="The hospital's HTTP proxy, as in http://proxy:3128.", show_default="$HTTPS_PROXY"),
    ] = None,
    daily_bytes: Annotated[
        int, typer.Option("--daily-bytes", min=1, help="Bytes that may leave for one study in a day (UTC).")
    ] = DAILY,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one object a line.")] = False,
) -> None:
    """Run this site until SIGTERM or Ctrl-C: gateway, worker, SuperNode and Flower's executor, and keep them running.

    Events go to stdout, what the processes say to stderr. A process that ends is started again after 1, 2, 5, 10 and
    20 seconds; none outlives this command.

    The executor starts a ClientApp for every message: code that the coordinator ships. All of it runs as one user here,
    so an approved bundle could read what this user can, keys and images too. The units and containers of deploy/ have a
    user for each process.

    Exit code 1: the site has not joined, has no images or another one of these runs; or a process ends whenever it is
    started. Exit code 0: it was told to end.
    """
    folder = (site or home() / "site").resolve()
    pictures = (images or folder).resolve()
    door = (socket or socket_of(pictures)).absolute()
    joined(folder, datetime.now(UTC))
    with open_catalogue(pictures / "catalogue.sqlite"):
        pass
    addresses = {"--listen": listen, "--health": health, "--node-port": f"127.0.0.1:{node_port}"}
    must_be_free({**addresses, "--socket": str(door)})
    (folder / "node").mkdir(mode=0o700, exist_ok=True)
    write_whole(folder / "node" / "executor.secret", secrets.token_bytes(32), 0o600)
    leaving = ["--daily-bytes", str(daily_bytes), *(["--proxy", proxy] if proxy else [])]
    supervise(_parts(folder, pictures, listen, health, node_port, door, leaving), printer(as_json))


def _parts(
    site: Path, images: Path, listen: str, health: str, node_port: int, socket: Path, leaving: list[str]
) -> list[Part]:
    """Return the site's processes; the gateway ends last, so that the node can take its leave through it."""
    own, runtime = tool("wardround-site"), f"127.0.0.1:{node_port}"
    # Where Linux says whose process asks, nobody else of this machine can pass for the node.
    user = ["--node-user", str(os.getuid())] if Path("/proc/net/tcp").exists() else []
    secret = ["--superexec-auth-secret-file", str(site / "node" / "executor.secret")]
    node = ["--superlink", listen, "--isolation", "process", "--port", str(node_port)]
    node += ["--node-config", f'worker="{socket}"']
    environment = flower_environment()
    # These two talk to this machine only, and never through the hospital's proxy.
    apart = flower_environment(FLWR_HOME=str(site / "node"), NO_PROXY="*", no_proxy="*")
    return [
        Part(
            "gateway",
            [own, "gateway", "--site", str(site), "--listen", listen, "--health", health, *user, *leaving],
            environment,
            listens=listen,
        ),
        Part(
            "worker",
            [own, "worker", "--site", str(images), "--socket", str(socket), "--approvals", str(site)],
            environment,
            listens=str(socket),
        ),
        Part(
            "supernode",
            [sys.executable, "-I", "-m", "deploy.supernode", health, "--insecure", *node, *secret],
            apart,
            listens=runtime,
            after="gateway",
        ),
        Part(
            "executor",
            [tool("flower-superexec"), "--insecure", "--runtime-api-address", runtime, *secret],
            apart,
            after="supernode",
        ),
    ]
