"""The real thing on the loopback: SuperLink, nginx as the edge, a gateway, a stock SuperNode, and this app's bundle."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from client.data.store import Site
from client.membership import joined, reach, store
from common.canonical import sha256_hex
from common.consortium.keys import openssh_public
from common.environment import flower_environment, tool
from common.study import Study
from deploy.health import ask
from server.consortium.edge import Edge, write_edge
from server.consortium.superlink import write_connection
from simulations.engines.control import Control, running, until
from tests.client.hospitals import prepared, tiny_study
from tests.server.consortium.founded import NOW, World, new_world
from tests.server.consortium.test_edge import free_port, needs_nginx, nginx

ROOT = Path(__file__).parents[3]

#: One site is a consortium here; nothing but the number of processes depends on it.
ALONE: dict[str, bool | int | float | str] = {
    "sites.quorum": 1,
    "sites.held-out": "",
    "study.rounds": 1,
    "sites.join-seconds": 60.0,
}


class Real:
    """A consortium of one site whose processes are Flower's and ours."""

    def __init__(self, folder: Path, world: World, data: Site) -> None:
        self.folder, self.world, self.data = folder, world, data
        self.site = world.sites["st-mary"]
        address = world.authority.manifest().edge
        self.edge = Edge(folder / "edge", f"127.0.0.1:{address.split(':')[1]}", f"127.0.0.1:{free_port()}")
        self.door, self.health, self.home = free_port(), f"127.0.0.1:{free_port()}", folder / "coordinator"
        write_edge(world.authority, self.edge, NOW)
        for name in ("coordinator", "node"):
            (folder / name).mkdir()
        write_connection(self.home, self.edge.superlink, self.edge.folder / "authority.pem")
        self.control = Control(self.home)
        brisk = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
        self.theirs = flower_environment(
            FLWR_HOME=str(self.home), HOME=str(self.home), WARDROUND_HOME=str(self.home / "wardround"), **brisk
        )
        # The node has no key, no certificate, and another home.
        self.ours = flower_environment(
            FLWR_HOME=str(folder / "node"), HOME=str(folder / "node"), NO_PROXY="localhost,127.0.0.1", **brisk
        )

    def superlink(self, stack: ExitStack) -> None:
        keys, port = self.edge.folder, self.edge.superlink.split(":")[1]
        command = [
            *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", port, "--enable-supernode-auth"),
            *("--ssl-ca-certfile", str(keys / "authority.pem"), "--ssl-certfile", str(keys / "superlink.pem")),
            *("--ssl-keyfile", str(keys / "superlink.key"), "--disable-runtime-dependency-installation"),
            *("--database", str(self.home / "state.db")),
        ]
        stack.enter_context(running(self.folder / "superlink.log", self.theirs, *command))
        assert nginx(self.edge).returncode == 0
        stack.callback(nginx, self.edge, "-s", "stop")
        member = joined(self.site, NOW)
        until(lambda: reach(member).finding.state == "ok", 240, lambda: self.log("superlink"))
        (self.folder / "site.pub").write_bytes(openssh_public(member.member.node))
        self.control.flwr("supernode", "register", str(self.folder / "site.pub"), "here", "--name", "st-mary")

    def gateway(self) -> "AbstractContextManager[subprocess.Popen[bytes]]":
        command = [sys.executable, "-c", "from client.cli import app; app()", "gateway", "--site", str(self.site)]
        command += ["--listen", f"127.0.0.1:{self.door}", "--health", self.health]
        return running(self.folder / "gateway.log", {**self.ours, "PYTHONPATH": str(ROOT)}, *command)

    def node(self) -> "AbstractContextManager[subprocess.Popen[bytes]]":
        command = [tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{self.door}"]
        command += ["--port", str(free_port()), "--node-config", f'site="{self.data.folder}"']
        return running(self.folder / "node.log", self.ours, *command)

    def gateway_and_node(self, stack: ExitStack) -> "tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]":
        """Start both, and wait until the node is one of the SuperLink's."""
        gateway = stack.enter_context(self.gateway())
        until(lambda: ask(self.health) == "SERVING", 240, lambda: self.log("gateway"))
        node = stack.enter_context(self.node())
        until(lambda: "the node is number" in self.log("gateway"), 240, lambda: self.log("node"))
        return gateway, node

    def site_says(self, *arguments: str) -> str:
        command = [sys.executable, "-c", "from client.cli import app; app()", *arguments, "--site", str(self.site)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, study: Path) -> Path:
        return self.home / "wardround" / "runs" / str(self.control.run(study))

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def calls(self) -> list[dict[str, str]]:
        """Return what came to the edge from sites."""
        lines = (self.edge.folder / "access.log").read_text().splitlines()
        return [call for call in map(json.loads, lines) if "/v1/" in call["call"]]


def admitted(folder: Path, fab: bytes, study: Study) -> World:
    """Return a consortium of one site, whose coordinator has admitted a bundle and a study."""
    world = new_world(folder, "st-mary", edge=f"localhost:{free_port()}")
    manifest = world.authority.manifest()
    allowed = {"bundles": (sha256_hex(fab),), "studies": (study.digest,), "epoch": manifest.epoch + 1}
    store.update(world.sites["st-mary"], world.authority.publish(manifest.model_copy(update=allowed)), NOW)
    return world


@needs_nginx
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_stock_node_trains_through_the_gateway_once_the_site_has_approved(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    study = tiny_study(ALONE)
    fab = build_fab_from_disk(ROOT)
    plan = tmp_path / "study.toml"
    plan.write_text(study.toml())
    here = Real(tmp_path, admitted(tmp_path, fab, study), prepared(study)[0])

    with ExitStack() as stack:
        here.superlink(stack)
        gateway, node = here.gateway_and_node(stack)

        with subtests.test("nothing that is not approved reaches the node"):
            failure = here.run(plan) / "failure.txt"
            until(failure.exists, 240, lambda: here.log("gateway") + here.log("superlink"))
            assert "has not approved" in failure.read_text()
            waiting = json.loads(here.site_says("approvals", "--json"))
            assert {one["state"] for one in waiting} == {"waiting"}
            assert {(one["kind"], one["digest"]) for one in waiting} == {
                ("bundle", sha256_hex(fab)), ("study", study.digest),
            }  # fmt: skip
            assert not (tmp_path / "node" / "apps").exists()
            assert "Receiving" not in here.log("node")

        with subtests.test("what is approved runs"):
            for one in waiting:
                here.site_says("approve", one["digest"])
            until(
                (here.run(plan) / "result.json").exists,
                400,
                lambda: here.log("gateway") + here.log("node") + here.log("superlink"),
            )
            lines = json.loads(here.site_says("audit", "show", "--last", "1000", "--json"))
            events = [(line["event"]["outcome"], line["event"]["kind"]) for line in lines]
            assert events[0] == ("refused", "message")
            for kind in ("join", "train", "evaluate"):
                assert ("sent", kind) in events
            assert events.count(("admitted", "code")) == 1

        with subtests.test("only fleet calls left, and each answer that did is in the log"):
            calls = here.calls()
            assert {call["status"] for call in calls} == {"200"}
            assert sum("push-messages" in call["call"] for call in calls) == sum(event[0] == "sent" for event in events)
            assert {call["call"].split("/")[-1] for call in calls} <= {
                "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
                "get-fab", "push-object", "pull-object", "confirm-message-received",
            }  # fmt: skip

        with subtests.test("a pause stops everything at once, and resuming lets the node go on"):
            here.site_says("pause")
            before = len(here.calls())
            time.sleep(4)  # the node asks every 3 s
            assert len(here.calls()) == before
            here.site_says("resume")
            until(lambda: len(here.calls()) > before, 240, lambda: here.log("gateway"))

        with subtests.test("a node that was killed is let in again at once"):
            os.killpg(node.pid, signal.SIGKILL)
            node.wait(30)
            known = here.log("gateway").count("the node is number")
            stack.enter_context(here.node())
            until(lambda: here.log("gateway").count("the node is number") > known, 240, lambda: here.log("node"))
            # Without the gateway's care the SuperLink says 412 for a minute.
            assert {call["status"] for call in here.calls()} == {"200"}

        with subtests.test("a dead gateway is the end of all traffic"):
            gateway.kill()
            gateway.wait(30)
            before = len(here.calls())
            time.sleep(4)  # the node asks every 3 s
            assert len(here.calls()) == before
