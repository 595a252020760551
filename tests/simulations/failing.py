"""What happens to the processes of two sites while a run goes on, and what must hold afterwards."""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from client.cli import app as at_site
from client.gateway.audit import Entry, Head, check, read_lines
from client.gateway.cli import audit_path
from client.membership import store
from common.study import Study
from deploy.supernode import HANGS
from server.cli import app as at_coordinator
from server.consortium.heads import heads_in
from simulations.localnet import Localnet
from tests.deploy.run import command
from tests.deploy.town import history, until
from tests.processes import command_of, processes
from tests.server.consortium import edge_log

__all__ = ["FIRST", "SECOND", "calls", "run_with_faults"]

FIRST, SECOND = "hospital-0", "hospital-1"

#: What becomes of a site that does not answer: its deadline comes first, or that the SuperLink takes its node for gone.
UNREACHED = ("no-reply", 0), ("error", 5)

NODE, EXECUTOR, WORKER = "deploy.supernode", "flower-superexec", "wardround-site worker"


def approvals(site: Path) -> list[dict[str, str]]:
    return list(json.loads(command(at_site, "approvals", "--site", site, "--json")))


def said(net: Localnet, name: str) -> str:
    """Return all that a site, or the coordinator, has said."""
    return (net.folder / f"{name}.log").read_text(errors="replace")


def calls(net: Localnet) -> list[dict[str, str]]:
    """Return what came to the edge from sites."""
    return [call for call in edge_log.calls(net.folder / "consortium" / "edge") if "/v1/" in call["call"]]


class Here:
    """A run, and the processes of its sites."""

    def __init__(self, net: Localnet, folder: Path, run: "Future[Path]") -> None:
        self.net, self.folder, self.run = net, folder, run

    @property
    def lines(self) -> list[dict[str, Any]]:
        return history(self.folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until something is so, which it must be before the run is over."""
        until(lambda: condition() or self.run.done(), self.why)
        assert condition(), self.why()

    def why(self) -> str:
        return "\n".join([*(self.net.log(name) for name in (FIRST, SECOND)), *map(str, self.lines)])

    def process(self, site: str, what: str) -> int:
        (one,) = processes(what, str(self.net.sites[site]))
        return one

    def clients(self, site: str) -> set[int]:
        """Return a site's ClientApps: processes that live for one message."""
        port = command_of(self.process(site, NODE)).partition("--port ")[2].split()[0]
        return set(processes("flwr-clientapp", f"127.0.0.1:{port} "))

    def asking(self, site: str) -> int:
        """Return how many ClientApps are connected to a site's worker; one more, for those that are not."""
        socket = command_of(self.process(site, WORKER)).partition("--socket ")[2].split()[0]
        return Path("/proc/net/unix").read_text().count(f" {socket}\n")

    @contextmanager
    def training(self, site: str) -> Iterator[int]:
        """Let something happen while a site trains: its worker stands still; give the number of that process."""
        worker, before = self.process(site, WORKER), self.asking(site)
        os.kill(worker, signal.SIGSTOP)
        try:
            self.until(lambda: self.asking(site) > before)
            yield worker
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)

    def missed(self, site: str, seen: int) -> tuple[str, int]:
        """Wait until a site does not count in an attempt, after some events that were seen; return why."""

        def out() -> list[tuple[str, int]]:
            events = [event for event in self.events[seen:] if event["event"] == "rejected" and event["site"] == site]
            return [(event["why"], event["code"]) for event in events if "code" in event]  # none: it may not join

        self.until(out)
        return out()[0]

    def counts(self, *sites: str) -> None:
        """Wait for a round with some sites."""
        seen = len(self.lines)
        self.until(lambda: any(set(sites) <= set(line["sites"]) for line in self.lines[seen:]))

    def audit(self, site: str) -> list[Entry]:
        """Return a site's audit log, checked against every head that the edge saw."""
        heads = heads_in((self.net.folder / "consortium" / "edge" / "access.log").read_bytes().splitlines())
        seen = [Head(head.seq, head.digest) for head in heads if head.site == site]
        lines, _ = read_lines(audit_path(self.net.sites[site]))
        key = store.identity(self.net.sites[site]).public_key()
        entries = [entry for entry, _ in check(lines, key, seen)]
        return [entry for entry in entries if entry.event.run == int(self.folder.name)]

    def trained(self, site: str) -> Counter[int]:
        """Return for each round how many meta-gradients left a site."""
        events = [entry.event for entry in self.audit(site)]
        return Counter(event.round for event in events if (event.outcome, event.kind) == ("sent", "train"))


def stopped(*processes: int) -> set[int]:
    """Let processes stand still, and return those that had not just ended."""
    still = set()
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
            still.add(process)
    return still


def unread(process: int) -> bool:
    """Say whether a process has written to another one of this machine what that one has not read."""
    sockets = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # it has just been closed
            sockets.add(os.readlink(path))
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = {line[1] for line in table if f"socket:[{line[9]}]" in sockets}
    return any(line[2] in ends and int(line[4].partition(":")[2], 16) for line in table)


def admit(net: Localnet, study: Study) -> None:
    """Admit a study. One site approves it; the other one has not heard of it, and does not want the bundle any more."""
    plan, consortium = net.folder / "other.toml", net.folder / "consortium"
    plan.write_text(study.toml())
    command(at_coordinator, "admit", "--study", plan, "--consortium", consortium)
    for site in net.sites.values():
        command(at_site, "update", consortium / "manifest.json", "--site", site)
    command(at_site, "approve", plan, "--site", net.sites[FIRST])
    (bundle,) = [one for one in approvals(net.sites[SECOND]) if one["kind"] == "bundle"]
    command(at_site, "reject", bundle["digest"], "--site", net.sites[SECOND])


def not_approved(here: Here, before: int) -> None:
    """Nothing reaches the second site's node until it approves; then it takes part."""
    site = here.net.sites[SECOND]
    here.until(lambda: "started" in {event["event"] for event in here.events})
    refused = [(event["site"], event["reason"]) for event in here.events if event["event"] == "rejected"]
    assert set(refused) == {(SECOND, "the site has not approved the bundle or the study that it was asked to run")}
    assert said(here.net, SECOND).count("Receiving") == before
    waiting = [one for one in approvals(site) if one["state"] != "approved"]
    assert {one["kind"] for one in waiting} == {"bundle", "study"}
    with here.training(FIRST):  # one site is the quorum, and no round is to go by
        for one in waiting:
            command(at_site, "approve", one["digest"], "--site", site)
    here.counts(FIRST, SECOND)


def node_killed(here: Here) -> None:
    seen = len(here.events)
    with here.training(FIRST):
        os.kill(here.process(FIRST, NODE), signal.SIGKILL)
    # The gateway answers for it as soon as it has started again.
    assert here.missed(FIRST, seen) in UNREACHED
    assert "supernode ended: signal 9" in said(here.net, FIRST)
    here.counts(FIRST, SECOND)
    # Without the gateway's care the SuperLink says 412 for a minute.
    assert {call["status"] for call in calls(here.net)} == {"200"}


def worker_killed(here: Here) -> None:
    """Its ClientApp waits for the next one, so the round need not be without the site."""
    with here.training(FIRST) as worker:
        os.kill(worker, signal.SIGKILL)
    here.until(lambda: "worker ended: signal 9" in said(here.net, FIRST))
    here.counts(FIRST, SECOND)


def site_asleep(here: Here) -> None:
    """Like a machine that is suspended. Meanwhile the other site, whose answer is there, loses its executor.

    The SuperLink takes a node for gone 60 s after its last heartbeat. The site falls asleep right after one: the
    deadline of the round comes first. Its ClientApp sleeps already: it would give up on the worker
    after 20 s, before the site is asleep.
    """

    def heartbeats() -> int:
        of_it = [call["call"] for call in calls(here.net) if call["site"] == SECOND]
        return sum(call.endswith("send-node-heartbeat") for call in of_it)

    seen, asleep = len(here.events), set[int]()
    with here.training(SECOND) as worker:
        try:
            asleep |= stopped(*here.clients(SECOND))
            before = heartbeats()
            here.until(lambda: heartbeats() > before)
            asleep |= stopped(*processes(str(here.net.sites[SECOND])), *here.clients(SECOND))
            assert worker in asleep
            here.until(lambda: len(here.lines) + 1 in here.trained(FIRST))
            os.kill(here.process(FIRST, EXECUTOR), signal.SIGKILL)
            assert here.missed(SECOND, seen) == ("no-reply", 0)
        finally:
            for process in asleep:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
    here.until(lambda: [event for event in here.events if (event["event"], event.get("site")) == ("late", SECOND)])
    assert "executor ended: signal 9" in said(here.net, FIRST)
    here.counts(FIRST, SECOND)


def node_asleep(here: Here) -> None:
    """Nothing else of its site stands still. What becomes of its answer is chance: it is late, or the node hangs."""
    seen, node = len(here.events), here.process(SECOND, NODE)
    try:
        with here.training(SECOND):
            os.kill(node, signal.SIGSTOP)
        wakes = time.monotonic() + 90
        assert here.missed(SECOND, seen) in UNREACHED
        with here.training(FIRST):  # alone it would do round after round
            time.sleep(max(0.0, wakes - time.monotonic()))
    finally:
        os.kill(node, signal.SIGCONT)
    here.counts(FIRST, SECOND)


def node_hangs(here: Here) -> None:
    """Flower's waits for ever for the parts of an answer whose ClientApp has gone, and its heartbeats go on."""
    seen, node, before = len(here.events), here.process(SECOND, NODE), here.clients(SECOND)
    alone = here.asking(SECOND)
    try:
        with here.training(SECOND):
            (client,) = here.clients(SECOND) - before
            os.kill(node, signal.SIGSTOP)
        here.until(lambda: here.asking(SECOND) == alone and unread(client))
        os.kill(client, signal.SIGKILL)
    finally:
        os.kill(node, signal.SIGCONT)
    assert here.missed(SECOND, seen) in UNREACHED
    here.until(lambda: f"supernode ended: exit code {HANGS}" in said(here.net, SECOND))
    here.counts(FIRST, SECOND)


def run_with_faults(net: Localnet, study: Study) -> None:
    """Run a study in which these happen, and check what must hold."""
    admit(net, study)
    runs = net.home / "runs"
    before, received = set(runs.iterdir()), said(net, SECOND).count("Receiving")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(net.run, study)
        until(lambda: set(runs.iterdir()) - before or run.done(), lambda: net.log("coordinator"))
        here = Here(net, (set(runs.iterdir()) - before).pop(), run)
        not_approved(here, received)
        for fault in (node_killed, worker_killed, site_asleep, node_asleep, node_hangs):
            fault(here)
        run.result(600)
    lines = here.lines
    assert [line["round"] for line in lines] == list(range(1, study.study.rounds + 1))
    assert {event["event"] for event in here.events} & {"duplicate", "unasked"} == set()
    for site in net.sites:
        counted = Counter(line["round"] for line in lines if site in line["sites"])
        # Not there by the deadline, or not all of it.
        missed = Counter(
            event["round"] for event in here.events
            if event["event"] == "rejected" and event["site"] == site and event.get("code") in (0, 3)
        )  # fmt: skip
        assert counted <= here.trained(site) <= counted + missed
    # What one site alone has sent is all that such a round steps by, once.
    alone = [line for line in lines if len(line["sites"]) == 1]
    norms = {
        (site, entry.event.round): entry.event.norm
        for site in net.sites
        for entry in here.audit(site)
        if (entry.event.outcome, entry.event.kind) == ("sent", "train")
    }
    assert alone
    for line in alone:
        (site,) = line["sites"]
        assert line["gradient_norm"] == pytest.approx(norms[site, line["round"]], rel=1e-5)
