"""A whole consortium on this machine's loopback, by the processes of a real one.

The coordinator has its authority, nginx as the edge and Flower's SuperLink; each site has keys of its own, a gateway,
and a stock SuperNode without any. Nothing but the network between hospitals is missing.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_disk

import common
from client.data.store import Site
from client.gateway import approvals
from client.gateway.audit import check, read_lines
from client.gateway.cli import audit_path
from client.membership import joined, reach, store
from common.canonical import sha256_hex
from common.consortium.keys import ec_public, openssh_public
from common.environment import flower_environment, tool
from common.errors import NotPreparedError, RoundError
from common.meta import head_size, make_learner
from common.models import build
from common.study import Study
from server.consortium import members
from server.consortium.authority import found, open_authority
from server.consortium.edge import Edge, write_edge
from server.consortium.issue import SITE_DAYS, issue_site
from server.runs import read_json

__all__ = ["Localnet", "letters", "localnet", "place"]

_START_SECONDS = 90.0
_POLL_SECONDS = 0.2
#: Flower's own pauses between questions, in seconds; a loopback can be asked more often.
_BRISK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}

Say = Callable[[str], None]


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
    """

    folder: Path
    home: Path
    sites: dict[str, Path]

    def run(self, study: Study, progress: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
        """Run a study with ``flwr run`` and return its run's folder.

        Raises
        ------
        RoundError
            It did not end well; the reason is in the text.
        """
        plan = self.folder / "study.toml"
        plan.write_text(study.toml())
        answer = self._flwr("run", str(_app()), "here", "--run-config", str(plan), "--format", "json")
        folder, seen = self.home / "runs" / str(json.loads(answer)["run-id"]), 0
        while read_json(folder / "status.json").get("state") != "finished":
            if (folder / "history.jsonl").exists():
                lines = (folder / "history.jsonl").read_bytes().split(b"\n")[:-1]
                for line in lines[seen:]:
                    progress(json.loads(line))
                seen = len(lines)
            if (folder / "failure.txt").exists():
                raise RoundError((folder / "failure.txt").read_text())
            time.sleep(_POLL_SECONDS)
        return folder

    def register(self) -> None:
        """Tell the SuperLink each site's node key."""
        for name, site in self.sites.items():
            key = self.folder / f"{name}.pub"
            key.write_bytes(openssh_public(joined(site, _now()).member.node))
            self._flwr("supernode", "register", str(key), "here", "--name", name)

    def log(self, name: str) -> str:
        """Return the end of a process's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def _flwr(self, *arguments: str) -> str:
        done = subprocess.run(
            [tool("flwr"), *arguments],
            env=_coordinators(self.home), cwd=_app(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RoundError(f"flwr {arguments[0]} failed:\n{(done.stdout + done.stderr).strip()[-3000:]}")
        return done.stdout


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
    ports = iter(_free_ports(2 + 2 * len(data)))
    say("keys, certificates and a manifest; every site approves the bundle and the study")
    edge = Edge(folder / "edge", f"127.0.0.1:{next(ports)}", f"127.0.0.1:{next(ports)}")
    address = f"localhost:{edge.listen.split(':')[1]}"
    net = Localnet(folder, folder / "coordinator", _consortium(folder, address, study, data))
    net.home.mkdir()
    write_edge(open_authority(folder / "consortium", _now()), edge, _now())
    (net.home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{edge.superlink}"\n'
        f'root-certificates = "{edge.folder / "authority.pem"}"\n'
    )
    with ExitStack() as stack:
        say("the SuperLink, and the edge in front of it")
        stack.enter_context(_superlink(net, edge))
        for site in net.sites.values():
            _until(partial(_reaches, site), net, "superlink")
        net.register()
        say("a gateway and a node at every site")
        doors = [next(ports) for _ in data]
        for (name, site), door in zip(net.sites.items(), doors, strict=True):
            command = [tool("wardround-site"), "gateway", "--site", str(site), "--listen", f"127.0.0.1:{door}"]
            stack.enter_context(_process(net.folder / f"{name}-gateway.log", _sites(folder, name), *command))
        for name, images, door in zip(net.sites, data, doors, strict=True):
            _until(partial(_is_open, door), net, f"{name}-gateway")
            command = [tool("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{door}"]
            command += ["--port", str(next(ports)), "--node-config", f'site="{images.folder}"']
            stack.enter_context(_process(net.folder / f"{name}-node.log", _sites(folder, name), *command))
        for name in net.sites:
            _until(partial(_is_in, net, name), net, f"{name}-node")
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
    bundle = build_fab_from_disk(_app())
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


@contextmanager
def _superlink(net: Localnet, edge: Edge) -> Iterator[None]:
    keys, port = edge.folder, edge.superlink.split(":")[1]
    command = [
        *(tool("flower-superlink"), "--host", "127.0.0.1", "--port", port, "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(keys / "authority.pem"), "--ssl-certfile", str(keys / "superlink.pem")),
        *("--ssl-keyfile", str(keys / "superlink.key"), "--disable-runtime-dependency-installation"),
        *("--database", str(net.home / "state.db")),
    ]
    nginx = ["nginx", "-c", str(keys / "nginx.conf"), "-g", "daemon off;" + ("user root;" if not os.geteuid() else "")]
    with (
        _process(net.folder / "superlink.log", _coordinators(net.home), *command),
        _process(net.folder / "edge.log", dict(os.environ), *nginx),
    ):
        yield


@contextmanager
def _process(log: Path, environment: dict[str, str], *command: str) -> Iterator[None]:
    with log.open("wb") as out:
        one = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=log.parent, start_new_session=True)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(one.pid, number)
            with suppress(subprocess.TimeoutExpired):
                one.wait(10)


def _until(condition: Callable[[], bool], net: Localnet, log: str) -> None:
    end = time.monotonic() + _START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise RoundError(f"the consortium did not start in {_START_SECONDS:.0f} s ({log}):\n{net.log(log)}")
        time.sleep(_POLL_SECONDS)


def _reaches(site: Path) -> bool:
    return reach(joined(site, _now())).finding.state == "ok"


def _is_in(net: Localnet, name: str) -> bool:
    return "the node is number" in net.log(f"{name}-gateway")


def _is_open(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).text == "open\n"
    return False


def _coordinators(home: Path) -> dict[str, str]:
    return flower_environment(FLWR_HOME=str(home), HOME=str(home), WARDROUND_HOME=str(home), **_BRISK)


def _sites(folder: Path, name: str) -> dict[str, str]:
    home = folder / f"{name}-node"
    home.mkdir(exist_ok=True)
    return flower_environment(FLWR_HOME=str(home), HOME=str(home), NO_PROXY="localhost,127.0.0.1", **_BRISK)


def _app() -> Path:
    return Path(common.__file__).parents[1]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
