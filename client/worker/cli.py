"""`wardround-site worker`."""

from pathlib import Path
from typing import Annotated

import typer

from common.console import plain_errors
from common.paths import home

__all__ = ["socket_of", "worker"]


def socket_of(site: Path) -> Path:
    """Return where a site's worker listens, unless it is told otherwise."""
    return site / "worker" / "socket"


@plain_errors
def worker(
    site: Annotated[
        Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option(help="Where the ClientApp finds it.", show_default="worker/socket in the site's folder"),
    ] = None,
    approvals: Annotated[
        Path | None,
        typer.Option(
            help="The folder of this site's gateway: only studies that were approved there are answered.",
            show_default="the site's own, where it has a gateway",
        ),
    ] = None,
) -> None:
    """Keep this site's data and device at hand, and answer what the ClientApp hands over, until SIGTERM.

    Start the SuperNode with `--node-config 'worker="/path/of/the/socket"'`. The ClientApp, which Flower starts anew for
    every message, then needs neither PyTorch nor access to images: this installed release computes, not the bundle.

    Exit code 1: the socket's folder is open to others, the folder of --approvals is no gateway's, or a message was not
    answered in time.
    """
    from client.worker.serve import serve  # with Flower

    folder = (site or home() / "site").resolve()
    serve(folder, (socket or socket_of(folder)).absolute(), approvals)
