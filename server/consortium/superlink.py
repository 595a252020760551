"""Flower's SuperLink as the coordinator runs it: how it is started and reached, and which nodes it knows."""

from collections.abc import Sequence
from pathlib import Path

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from common.consortium import Member
from common.environment import tool
from common.errors import ServiceError
from server.consortium.edge import Edge

__all__ = ["executor_command", "register_nodes", "superlink_command", "write_connection"]


def superlink_command(edge: Edge, database: Path, secret: Path, health: str) -> list[str]:
    """Return the SuperLink's command line, with the certificates that `write_edge` wrote.

    Parameters
    ----------
    edge : Edge
        In front of it.
    database : Path
        What it remembers: nodes, runs, and what travels.
    secret : Path
        A file with the secret by which it knows its executor.
    health : str
        ``host:port`` at which it answers gRPC's health service.
    """
    host, _, port = edge.superlink.rpartition(":")
    keys = edge.folder
    return [
        *(tool("flower-superlink"), "--host", host.strip("[]"), "--port", port, "--database", str(database)),
        *("--ssl-ca-certfile", str(keys / "authority.pem"), "--ssl-certfile", str(keys / "superlink.pem")),
        *("--ssl-keyfile", str(keys / "superlink.key"), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--disable-runtime-dependency-installation", "--health-server-address", health),
    ]


def executor_command(edge: Edge, secret: Path) -> list[str]:
    """Return the command line of what starts the ServerApp."""
    return [
        *(tool("flower-superexec"), "--runtime-api-address", edge.superlink),
        *("--root-certificates", str(edge.folder / "authority.pem"), "--superexec-auth-secret-file", str(secret)),
    ]


def write_connection(home: Path, address: str, authority: Path | None) -> None:
    """Tell Flower's commands which SuperLink there is.

    Parameters
    ----------
    home : Path
        Their ``FLWR_HOME``.
    address : str
        The SuperLink's.
    authority : Path or None
        Certificate of the authority that it is known by; None where it has no TLS.
    """
    trust = "insecure = true" if authority is None else f'root-certificates = "{authority}"'
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\n{trust}\n'
    )


def register_nodes(edge: Edge, members: Sequence[Member]) -> list[str]:
    """Tell the SuperLink the node keys that it does not know yet, and return the names of their sites.

    Nodes whose site has left stay registered: the edge does not let them in.

    Raises
    ------
    ServiceError
        It does not answer, or refuses.
    """
    client = ControlHttpClient.from_server_address(
        server_address=edge.superlink,
        insecure=False,
        root_certificates=(edge.folder / "authority.pem").read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        known = {node.public_key for node in client.ListNodes(ListNodesRequest()).nodes_info}
        new = [member for member in members if member.node.encode() not in known]
        for member in new:
            client.RegisterNode(RegisterNodeRequest(public_key=member.node.encode(), name=member.site))
    except httpx.HTTPError as error:
        raise ServiceError(f"the SuperLink at {edge.superlink} does not register nodes: {error}") from None
    finally:
        client.close()
    return [member.site for member in new]
