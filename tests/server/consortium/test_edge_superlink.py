"""Flower's own SuperLink behind the edge, its nodes registered from the manifest."""

import os
import signal
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.membership import Joined, joined, reach
from common.consortium.keys import load_node_private
from common.environment import flower_environment, tool
from server.consortium.edge import Edge, write_edge
from server.consortium.superlink import register_nodes
from simulations.engines.control import until
from tests.ports import free_port
from tests.server.consortium.edge_log import calls
from tests.server.consortium.founded import NOW, new_world
from tests.server.consortium.test_edge import needs_nginx, nginx


@contextmanager
def superlink(folder: Path, port: int, environment: dict[str, str]) -> Iterator[None]:
    """Run flower-superlink with the keys that `wardround-study edge` wrote."""
    command = [
        *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(folder / "authority.pem"), "--ssl-certfile", str(folder / "superlink.pem")),
        *("--ssl-keyfile", str(folder / "superlink.key"), "--enable-supernode-auth"),
        "--disable-runtime-dependency-installation",
    ]
    with (folder / "superlink.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def fleet(member: Joined, edge: str) -> FleetHttpClient:
    """Return Flower's own client, which shows the site's certificate here as the gateway will."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(member.keys / "authority.pem")
    context.load_cert_chain(member.keys / "certificate.pem", member.keys / "tls.key")
    key = load_node_private((member.keys / "node.key").read_bytes())
    version, signed = RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(key, key.public_key())
    return FleetHttpClient(f"https://{edge}", verify=context, interceptors=(version, signed))


@needs_nginx
@pytest.mark.slow
def test_an_enrolled_site_is_a_node_of_the_superlink_and_another_is_not(tmp_path: Path) -> None:
    world = new_world(tmp_path, "st-mary", "uni-2", edge=f"localhost:{free_port()}")
    address = world.authority.manifest().edge
    edge = Edge(tmp_path / "edge", f"127.0.0.1:{address.split(':')[1]}", f"127.0.0.1:{free_port()}")
    write_edge(world.authority, edge, NOW)
    flower = tmp_path / "flower"
    flower.mkdir()
    environment = flower_environment(FLWR_HOME=str(flower), HOME=str(tmp_path))
    one, two = (joined(world.sites[name], NOW) for name in ("st-mary", "uni-2"))

    with superlink(edge.folder, int(edge.superlink.split(":")[1]), environment):
        assert nginx(edge).returncode == 0
        try:
            until(lambda: reach(one).finding.state == "ok", 60, (edge.folder / "superlink.log").read_text)
            assert register_nodes(edge, [one.member]) == ["st-mary"]
            assert register_nodes(edge, [one.member]) == []

            with fleet(one, address) as client:
                request = ActivateNodeRequest(public_key=one.member.node.encode(), heartbeat_interval=30)
                node = client.ActivateNode(request).node_id
                assert not client.PullMessages(PullMessagesRequest(node=Node(node_id=node))).messages_list
                client.DeactivateNode(DeactivateNodeRequest(node_id=node))

            # A site that the edge lets in, with the number of another one's node.
            with fleet(two, address) as client, pytest.raises(httpx.HTTPStatusError) as error:
                client.PullMessages(PullMessagesRequest(node=Node(node_id=node)))
            assert error.value.response.status_code == 401
            refused = ("uni-2", "POST /v1/fleet/pull-messages", "401")
            logged = partial(calls, edge.folder)
            until(lambda: refused in {(c["site"], c["call"], c["status"]) for c in logged()}, 60, lambda: str(logged()))

            # In the manifest, but its node is not registered at the SuperLink.
            request = ActivateNodeRequest(public_key=two.member.node.encode(), heartbeat_interval=30)
            with fleet(two, address) as client, pytest.raises(httpx.HTTPStatusError) as error:
                client.ActivateNode(request)
            assert error.value.response.status_code != 200
            assert "refused:" not in error.value.response.text, "the edge let it through, and the SuperLink refused"
        finally:
            nginx(edge, "-s", "stop")
