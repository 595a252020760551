"""`wardround-study up`: all processes of the coordinator, as one."""

import asyncio
import os
import secrets
import shutil
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from common.console import plain_errors
from common.consortium import Manifest
from common.environment import flower_environment
from common.errors import NotPreparedError, WardroundError
from common.paths import home
from deploy.addresses import must_be_free
from deploy.supervise import House, Part, printer, supervise
from server.consortium.authority import changing, open_authority
from server.consortium.edge import Edge, write_edge
from server.files import write_atomic

__all__ = ["nginx", "up"]

#: How often the manifest is looked at, in seconds.
_LOOK_SECONDS = 1.0

#: How often the edge's files are written anew where nothing has changed: certificates end.
_RENEW = timedelta(days=1)


@plain_errors
def up(
    superlink: Annotated[
        str, typer.Option(help="HOST:PORT of the SuperLink, on an address that only this machine reaches.")
    ] = "127.0.0.1:8000",
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT of the edge.")] = "0.0.0.0:8443",
    health: Annotated[
        str, typer.Option(help="HOST:PORT at which the SuperLink answers gRPC's health service (this machine only).")
    ] = "127.0.0.1:8001",
    consortium: Annotated[
        Path | None,
        typer.Option("--consortium", help="The consortium's folder.", show_default="$WARDROUND_HOME/consortium"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one object a line.")] = False,
) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C: edge (nginx), SuperLink and its executor, and keep them running.

    The edge is written from the manifest, and the node keys of its sites are registered. When a command changes the
    manifest, both are done again within seconds and nginx is reloaded: nobody need restart this.

    Events go to stdout, what the processes say to stderr. A process that ends is started again after 1, 2, 5, 10 and
    20 seconds; none outlives this command. All of it runs as one user here; the units and containers of deploy/ have
    one for each.

    Exit code 1: there is no consortium or no nginx, another one of these runs, or a process ends whenever it is
    started. Exit code 0: it was told to end.
    """
    from server.consortium.superlink import executor_command, superlink_command, write_connection  # with Flower

    folder = (consortium or home() / "consortium").resolve()
    edge, flower = Edge(folder / "edge", listen, superlink), folder / "superlink"
    program = nginx()
    manifest, _ = _write(folder, edge)
    must_be_free({"--superlink": superlink, "--health": health, "--listen": listen})
    flower.mkdir(mode=0o700, exist_ok=True)
    secret = flower / "executor.secret"
    write_atomic(secret, secrets.token_bytes(32), 0o600)
    write_connection(flower, superlink, edge.folder / "authority.pem")
    for name in ("NO_PROXY", "no_proxy"):  # the SuperLink is never reached through a proxy
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), superlink.rpartition(":")[0].strip("[]")]))
    environment = flower_environment(FLWR_HOME=str(flower))
    # As root its workers would be nobody, who cannot enter the edge's folder.
    settings = "daemon off;" + ("user root;" if os.geteuid() == 0 else "")
    command = [program, "-e", "stderr", "-c", str(edge.folder / "nginx.conf"), "-g", settings]
    parts = [
        Part("superlink", superlink_command(edge, flower / "state.db", secret, health), environment, listens=superlink),
        Part("executor", executor_command(edge, secret), environment, after="superlink"),
        Part("edge", command, environment, listens=listen, after="superlink"),
    ]
    say = printer(as_json)
    say("coordinator", "starting", f"Flower's commands reach it with FLWR_HOME={flower} and the connection here")
    supervise(parts, say, partial(_follow, folder, edge, manifest))


def nginx() -> str:
    """Return where nginx is.

    Raises
    ------
    NotPreparedError
        It is not installed.
    """
    found = shutil.which("nginx", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))
    if found is None:
        raise NotPreparedError("nginx is not installed: it is the consortium's edge (on Debian: apt install nginx)")
    return found


def _write(folder: Path, edge: Edge) -> tuple[Manifest, list[Path]]:
    """Write the edge's files from the manifest; return it and what was written."""
    now = _now()
    with changing(folder):
        authority = open_authority(folder, now)
        return authority.manifest(), write_edge(authority, edge, now)


async def _follow(folder: Path, edge: Edge, manifest: Manifest, house: House) -> None:
    """Keep edge and SuperLink at the manifest, as long as they run."""
    from server.consortium.superlink import register_nodes

    written, registered, said = _now(), -1, ""
    while True:
        try:
            await house.ready["superlink"].wait()
            if registered != manifest.epoch:
                new = await asyncio.to_thread(register_nodes, edge, manifest.sites)
                registered = manifest.epoch
                house.say("superlink", "registered", f"manifest epoch {registered}, new: {', '.join(new) or 'nobody'}")
            current = open_authority(folder, _now()).manifest()
            if current.epoch != manifest.epoch or _now() - written > _RENEW:
                manifest, files = _write(folder, edge)
                written = _now()
                await house.ready["edge"].wait()  # before it listens, the signal would end it
                house.hang_up("edge")
                house.say("edge", "reloaded", f"manifest epoch {manifest.epoch}")
                if edge.folder / "superlink.pem" in files:
                    house.say("superlink", "renewed", "it takes its new certificate when this command starts anew")
            said = ""
        except WardroundError as error:
            if str(error) != said:  # it is tried again and again
                said = str(error)
                house.say("coordinator", "failed", said)
        await asyncio.sleep(_LOOK_SECONDS)


def _now() -> datetime:
    return datetime.now(UTC)
