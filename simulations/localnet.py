"""A whole consortium on this machine's loopback, by the processes of a real one.

The coordinator has its authority, nginx as the edge and Flower's SuperLink; each site has keys of its own, a gateway,
a worker with the images, and a stock SuperNode without any of these. Nothing but the network between hospitals is
missing.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_disk

from client.data.store import Site
from client.gateway import approvals
from client.gateway.audit import check, read_lines
from client.gateway.cli import audit_path
from client.membership import joined, reach, store
from common.canonical import sha256_hex
from common.consortium.keys import ec_public, openssh_public
from common.environment import flower_environment, tool
from common.errors import NotPreparedError
from common.meta import head_size, make_learner
from common.models import build
from common.study import Study
from server.consortium import members
from server.consortium.authority import found, open_authority
from server.consortium.edge import Edge, write_edge
from server.consortium.issue import SITE_DAYS, issue_site
from simulations.engines.control import APP, Control, free_ports, running, until, write_connection

__all__ = ["Localnet", "letters", "localnet", "place"]

_START_SECONDS = 90.0
#: Flower's own pauses between questions, in seconds; a loopback can be asked more often.
_BRISK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}

Say = Callable[[str], None]
Running = AbstractContextManager["subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Localnet:
    """A consortium whose processes run.

    Attributes
    ----------
    folder : Path
        Everything that belongs to it, each process's log too.
    home : Path
        The coordinator's ``WARDROUND_HOME``: its runs.
    sites : dict of str to Path
        Folders of the sites, by name: keys, manifest, approvals, audit log.
    sockets : Path
        Folder of the sockets of their workers. A path of a socket is short.
    """

    folder: Path
    home: Path
    sites: dict[str, Path]
    sockets: Path

    def run(self, study: Study, progress: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
        """Run a study with ``flwr run`` and return its run's folder.

        Raises
        ------
        RoundError
            It did not end well; the reason is in the text.
        """
        plan, began, control = self.folder / "study.toml", time.time(), Control(self.home)
        plan.write_text(study.toml())
        number = control.run(plan)
        for name in self.sites:
            until((self.sockets / name).exists, _START_SECONDS, partial(self.log, f"{name}-worker"))
        folder = self.home / "runs" / str(number)
        control.follow(number, folder, progress, since=began)
        return folder

    def register(self, name: str) -> None:
        """Tell the SuperLink a site's node key."""
        key = self.folder / f"{name}.pub"
        key.write_bytes(openssh_public(joined(self.sites[name], _now()).member.node))
        Control(self.home).flwr("supernode", "register", str(key), "here", "--name", name)

    def log(self, name: str) -> str:
        """Return the end of a process's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]


@contextmanager
def localnet(folder: Path, study: Study, data: Sequence[Site], say: Say = lambda _: None) -> Iterator[Localnet]:
    """Found a consortium for one study, start its processes, and stop them at the end.

    Parameters
    ----------
    folder : Path
        Empty; without blanks, for nginx reads it.
    study : Study
        Admitted by the coordinator and approved by every site, with the bundle of this installation.
    data : sequence of Site
        Each site's images.
    say : callable
        Gets a line for every step.

    Raises
    ------
    NotPreparedError
        nginx is not installed.
    RoundError
        A process did not start; its log is in the text.
    """
    if shutil.which("nginx") is None:
        raise NotPreparedError("nginx is not installed: it is the consortium's edge (on Debian: apt install nginx)")
    ports = iter(free_ports(2 + 2 * len(data)))
    say("keys, certificates and a manifest; every site approves the bundle and the study")
    edge = Edge(folder / "edge", f"127.0.0.1:{next(ports)}", f"127.0.0.1:{next(ports)}")
    address = f"localhost:{edge.listen.split(':')[1]}"
    sites = _consortium(folder, address, study, data)
    with ExitStack() as stack:
        sockets = Path(stack.enter_context(TemporaryDirectory(prefix="wardround-")))  # nobody else's: mode 0700
        net = Localnet(folder, folder / "coordinator", sites, sockets)
        net.home.mkdir()
        write_edge(open_authority(folder / "consortium", _now()), edge, _now())
        write_connection(net.home, edge.superlink, edge.folder / "authority.pem")
        doors = dict(zip(sites, islice(ports, len(data)), strict=True))
        say("the SuperLink, and the edge in front of it; a gateway and a worker at every site")
        started = [stack.enter_context(one) for one in _coordinator(net, edge)]
        for name, door in doors.items():
            command = [tool("wardround-site"), "gateway", "--site", str(sites[name]), "--listen", f"127.0.0.1:{door}"]
            started.append(stack.enter_context(_at(net, name, "gateway", *command)))
        for name, images in zip(sites, data, strict=True):
            command = [tool("wardround-site"), "worker", "--site", str(images.folder), "--socket", str(sockets / name)]
            again = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "worker"]
            started.append(stack.enter_context(_at(net, name, "worker", *again, *command)))
        stack.callback(_end, started)
        for name, site in sites.items():
            until(partial(_reaches, site), _START_SECONDS, partial(net.log, "superlink"))
            until(partial(_is_open, doors[name]), _START_SECONDS, partial(net.log, f"{name}-gateway"))
        with ThreadPoolExecutor(len(data)) as pool:
            list(pool.map(net.register, sites))
        say("a node at every site")
        nodes = []
        for name, port in zip(sites, ports, strict=True):
            command = [tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{doors[name]}"]
            command += ["--port", str(port), "--node-config", f'worker="{sockets / name}"']
            nodes.append(stack.enter_context(_at(net, name, "node", *command)))
        stack.callback(_end, nodes)
        for name in sites:
            until(partial(_is_in, net, name), _START_SECONDS, partial(net.log, f"{name}-node"))
        yield net


def _consortium(folder: Path, address: str, study: Study, data: Sequence[Site]) -> dict[str, Path]:
    """Do what `found`, `init`, `enrol`, `join`, `admit`, `update` and `approve` do; return the sites' folders."""
    authority, now = found(folder / "consortium", "localnet", address, study.sites.quorum, _now()), _now()
    sites = {}
    for images in data:
        site = sites[images.name] = folder / images.name
        request = store.create(site, images.name, now).checked()
        certificate = issue_site(authority.issuer, request.site, ec_public(request.tls), now, SITE_DAYS)
        manifest = members.with_site(authority.manifest(), request, certificate, now)
        kit = authority.kit(request.site, certificate, authority.publish(manifest))
        store.join(site, kit, authority.fingerprint, now)
    network = build(study.model, classes=head_size(study.algorithm, study.episodes), seed=study.study.seed)
    size = sum(tensor.numel() for tensor in make_learner(study.algorithm).theta(network).values())
    bundle = build_fab_from_disk(APP)
    signed = authority.publish(members.allow(authority.manifest(), [sha256_hex(bundle)], [study], now))
    for site in sites.values():
        store.update(site, signed, now)
        approvals.decide(site, approvals.note_bundle(site, bundle, now), "approved", now)
        approvals.decide(site, approvals.note_study(site, study, now), "approved", now, size)
    return sites


def letters(site: Path) -> int:
    """Return how many answers left a site, by its audit log, whose every line is checked."""
    lines, _ = read_lines(audit_path(site))
    return sum(entry.event.outcome == "sent" for entry, _ in check(lines, store.identity(site).public_key()))


@contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    """Give a folder for a consortium: one that stays, or one that is gone afterwards."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with TemporaryDirectory(prefix="wardround-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _coordinator(net: Localnet, edge: Edge) -> list[Running]:
    """Return the SuperLink and nginx, not started yet."""
    keys, port = edge.folder, edge.superlink.split(":")[1]
    superlink = [
        *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", port, "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(keys / "authority.pem"), "--ssl-certfile", str(keys / "superlink.pem")),
        *("--ssl-keyfile", str(keys / "superlink.key"), "--disable-runtime-dependency-installation"),
        *("--database", str(net.home / "state.db")),
    ]
    nginx = ["nginx", "-c", str(keys / "nginx.conf"), "-g", "daemon off;" + ("user root;" if not os.geteuid() else "")]
    home = {"FLWR_HOME": str(net.home), "HOME": str(net.home), "WARDROUND_HOME": str(net.home)}
    return [
        running(net.folder / "superlink.log", flower_environment(**home, **_BRISK), *superlink),
        running(net.folder / "edge.log", os.environ, *nginx),
    ]


def _at(net: Localnet, name: str, part: str, *command: str) -> Running:
    """Return a process at a site, not started yet."""
    home = net.folder / f"{name}-node"
    home.mkdir(exist_ok=True)
    environment = flower_environment(FLWR_HOME=str(home), HOME=str(home), NO_PROXY="localhost,127.0.0.1", **_BRISK)
    return running(net.folder / f"{name}-{part}.log", environment, *command)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Tell all of them to end, so that they end at the same time."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _reaches(site: Path) -> bool:
    return reach(joined(site, _now())).finding.state == "ok"


def _is_in(net: Localnet, name: str) -> bool:
    return "the node is number" in net.log(f"{name}-gateway")


def _is_open(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).text == "open\n"
    return False


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
