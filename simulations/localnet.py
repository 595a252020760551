"""A whole consortium on this machine's loopback, by the commands of a real one.

`wardround-study up` runs the coordinator: nginx as the edge, Flower's SuperLink. `wardround-site up` runs each site,
which has keys of its own: a gateway, a worker with the images, and a stock SuperNode. Nothing but the network between
hospitals is missing.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flwr.cli.build import build_fab_from_disk

from client.data.store import Site
from client.gateway import approvals
from client.gateway.audit import check, read_lines
from client.gateway.cli import audit_path
from client.membership import store
from common.canonical import sha256_hex
from common.consortium.keys import ec_public
from common.environment import flower_environment, tool
from common.meta import head_size, make_learner
from common.models import build
from common.study import Study
from server.consortium import members
from server.consortium.authority import Authority, found
from server.consortium.issue import SITE_DAYS, issue_site
from server.consortium.up import nginx
from simulations.engines.control import APP, Control, free_ports, running, until

__all__ = ["Hosts", "Localnet", "letters", "localnet", "place"]

_START_SECONDS = 180.0
#: Flower's own pauses between questions, in seconds; a loopback can be asked more often.
_BRISK = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}

Say = Callable[[str], None]
Running = AbstractContextManager["subprocess.Popen[bytes]"]


@dataclass(frozen=True)
class Hosts:
    """Where the processes run: all of them on the loopback, or each site on a host of its own.

    Attributes
    ----------
    edge : str
        The address at which sites find the edge.
    before : mapping of str to sequence of str
        What goes in front of a site's command, by its name.
    """

    edge: str = "127.0.0.1"
    before: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Localnet:
    """A consortium whose processes run.

    Attributes
    ----------
    folder : Path
        Everything that belongs to it, what each of its commands said too.
    home : Path
        The coordinator's ``WARDROUND_HOME``: its runs.
    sites : dict of str to Path
        Folders of the sites, by name: keys, manifest, approvals, audit log.
    sockets : Path
        Folder of the sockets of their workers. A path of a socket is short.
    hosts : Hosts
        Where the processes run.
    """

    folder: Path
    home: Path
    sites: dict[str, Path]
    sockets: Path
    hosts: Hosts

    def run(self, study: Study, progress: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
        """Run a study with ``flwr run`` and return its run's folder.

        Raises
        ------
        RoundError
            It did not end well; the reason is in the text.
        """
        plan, began = self.folder / "study.toml", time.time()
        control = Control(self.folder / "consortium" / "superlink")
        plan.write_text(study.toml())
        number = control.run(plan)
        for name in self.sites:
            until((self.sockets / name).exists, _START_SECONDS, partial(self.log, name))
        folder = self.home / "runs" / str(number)
        control.follow(number, folder, progress, since=began)
        return folder

    def says(self, name: str, words: str) -> bool:
        """Say whether the coordinator or a site has said something."""
        return words in (self.folder / f"{name}.log").read_text(errors="replace")

    def log(self, name: str) -> str:
        """Return the end of what the coordinator or a site has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]


@contextmanager
def localnet(
    folder: Path, study: Study, data: Sequence[Site], say: Say = lambda _: None, hosts: Hosts | None = None
) -> Iterator[Localnet]:
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
    hosts : Hosts
        Where the processes run; on the loopback where it is not given.

    Raises
    ------
    NotPreparedError
        nginx is not installed.
    RoundError
        A process did not start; its log is in the text.
    """
    nginx()  # better known before anything is made
    ports = iter(free_ports(3 + 3 * len(data)))
    hosts = hosts or Hosts()
    superlink, listen = f"127.0.0.1:{next(ports)}", f"{hosts.edge}:{next(ports)}"
    authority = found(folder / "consortium", "localnet", listen, study.sites.quorum, _now())
    with ExitStack() as stack:
        sockets = Path(stack.enter_context(TemporaryDirectory(prefix="wardround-")))  # nobody else's: mode 0700
        home = folder / "coordinator"
        say("the SuperLink, and the edge in front of it")
        command = ["wardround-study", "up", "--consortium", str(authority.folder)]
        command += ["--superlink", superlink, "--listen", listen, "--health", f"127.0.0.1:{next(ports)}"]
        stack.enter_context(_up(hosts, folder, "coordinator", *command, WARDROUND_HOME=str(home)))
        say("keys, certificates and a manifest; every site approves the bundle and the study")
        net = Localnet(folder, home, _consortium(authority, folder, study, data), sockets, hosts)
        known = f"superlink registered: manifest epoch {authority.manifest().epoch},"
        until(partial(net.says, "coordinator", known), _START_SECONDS, partial(net.log, "coordinator"))
        say("a gateway, a worker and a node at every site")
        started = []
        for (name, site), images in zip(net.sites.items(), data, strict=True):
            command = ["wardround-site", "up", "--site", str(site), "--images", str(images.folder)]
            command += ["--socket", str(sockets / name), "--listen", f"127.0.0.1:{next(ports)}"]
            command += ["--health", f"127.0.0.1:{next(ports)}"]
            started.append(stack.enter_context(_up(hosts, folder, name, *command, "--node-port", str(next(ports)))))
        stack.callback(_end, started)
        for name in net.sites:
            until(partial(net.says, name, "the node is number"), _START_SECONDS, partial(net.log, name))
        yield net


def _consortium(authority: Authority, folder: Path, study: Study, data: Sequence[Site]) -> dict[str, Path]:
    """Do what `init`, `enrol`, `join`, `admit`, `update` and `approve` do; return the sites' folders."""
    now, sites = _now(), {}
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


def _up(hosts: Hosts, folder: Path, name: str, command: str, *arguments: str, **more: str) -> Running:
    """Return one of the two commands, not started yet."""
    environment = flower_environment(NO_PROXY=f"localhost,127.0.0.1,{hosts.edge}", **_BRISK, **more)
    return running(folder / f"{name}.log", environment, *hosts.before.get(name, ()), tool(command), *arguments)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Tell all of them to end, so that they end at the same time."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
