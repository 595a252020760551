"""One run in which everything that a consortium consists of is killed, stopped, starved, cut off or replaced.

The faults are those of a list that was made before the code (numbers in brackets below); `docs/deploy.md` says which
test has the others. Deadlines and silences are some seconds here. After all of them, whatever happened:

-   the run ends with a result, each round once and with the quorum;
-   theta is what one plain optimiser makes of the history: nothing counted twice, late, or for another round;
-   each contribution is in its site's audit log, which holds against every head that the coordinator saw;
-   nothing of an error's text is anywhere but in memory, and no key can be read by others.
"""

import json
import signal
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import RegisterNodeRequest

from client.cli import app as at_site
from client.gateway.cli import audit_path
from common.contract import theta_digest
from server.cli import app as at_coordinator
from server.consortium.authority import open_authority
from server.consortium.heads import contradictions, heads_in, keep
from server.rounds import initial_theta
from tests.deploy.players import announcing, duplicating
from tests.deploy.run import (
    Here,
    clock_events,
    command,
    counted,
    everybody,
    last_failed,
    missing,
    short_of_time,
    waiting_for,
)
from tests.deploy.town import SITES, Town, history, limited, town_of, until
from tests.server.consortium.edge_log import calls
from tests.server.consortium.founded import NOW
from tests.server.consortium.test_edge import needs_nginx, nginx
from tests.server.rubbish import PATIENT
from tests.server.scripted import a_study
from tests.server.test_soak import chain

STUDY = a_study(
    {
        "study.rounds": 40,
        "sites.held-out": "",
        "data.sites": len(SITES),
        "sites.quorum": 2,
        "sites.deadline-seconds": 30.0,
        "sites.attempts": 1000,
        "sites.rest-after": 100,
        "sites.join-seconds": 60.0,
    }
)
FIRST, SECOND, THIRD = SITES
HOUR = 3600.0


def killed(step: str, here: Here) -> None:
    number = restart_node(here, SECOND, step)
    here.town.next_round(here.folder)
    until(lambda: here.town.dead(f"{SECOND} node"), here.town.logs)
    here.town.node(SECOND)
    until(lambda: len(here.lines) >= number, here.town.logs)
    assert missing(SECOND)(here.lines[number - 1])


def complaining(here: Here) -> None:
    restart_node(here, SECOND, "complains")
    (out,) = here.reach(missing(SECOND))["out"]
    assert (out["site"], out["code"]) == (SECOND, 104)


def asleep(here: Here) -> None:
    here.town.signal(f"{THIRD} node", signal.SIGSTOP)
    (out,) = here.reach(missing(THIRD), without=THIRD)["out"]
    assert (out["site"], out["why"]) == (THIRD, "no-reply")
    here.town.signal(f"{THIRD} node", signal.SIGCONT)
    here.reach(counted(THIRD))


def bad_network(here: Here) -> None:
    line = here.town.line
    try:
        line.seconds, line.rate = 0.01, 64000.0
        here.reach(everybody)
        line.seconds, line.rate, line.reset_every = 0.0, 0.0, 25
        with short_of_time(here):
            here.reach(everybody)
    finally:
        line.seconds, line.rate, line.reset_every = 0.0, 0.0, 0


def black_hole(here: Here) -> None:
    said = here.town.log_of(f"{FIRST} gateway").read_text().count("cannot be reached")
    here.town.line.hold()
    here.town.next_round(here.folder)
    here.until_said(FIRST, "cannot be reached", said + 1)
    here.town.line.release()
    here.reach(everybody)


def half_open(here: Here) -> None:
    here.town.line.forget()
    with short_of_time(here):
        here.reach(everybody)


def again_and_again(here: Here) -> None:
    restart_gateway(here.town, FIRST, duplicating)
    for _ in range(2):
        here.reach(counted(FIRST))
    events = (here.folder / "events.jsonl").read_text()
    assert '"event":"duplicate"' not in events
    assert '"event":"unasked"' not in events
    restart_gateway(here.town, FIRST)


def announced_only(here: Here) -> None:
    restart_gateway(here.town, THIRD, announcing)
    with short_of_time(here):
        here.town.next_round(here.folder)
        # Flower itself would wait for the parts for three minutes, whatever the deadline.
        until(lambda: '"code":3' in (here.folder / "events.jsonl").read_text(), here.town.logs)
    restart_gateway(here.town, THIRD)
    here.reach(counted(THIRD))


def full_audit_log(here: Here) -> None:
    town = here.town
    with limited(town.processes[f"{THIRD} gateway"], audit_path(town.world.sites[THIRD])):
        here.reach(missing(THIRD), without=THIRD)
        until(lambda: town.health(THIRD) == "NOT_SERVING", town.logs)
    here.reach(counted(THIRD))
    assert town.health(THIRD) == "SERVING"


def wrong_clock(here: Here) -> None:
    for seconds, words in ((6, "s ahead of the edge's"), (-310, "s behind the edge's"), (86400, "86400 s ahead of")):
        here.town.set_clocks(seconds, THIRD)
        here.until_said(THIRD, f"{words}")
        assert "set this machine's clock by NTP" in here.town.log(f"{THIRD} gateway")
    here.town.set_clocks(-60, THIRD)  # which Flower allows
    here.reach(counted(THIRD))
    here.town.set_clocks(0, THIRD)
    here.reach(counted(THIRD))


def coordinators_clock(here: Here) -> None:
    """Set it while a round waits for a site, then so that sites refuse what is asked, and then that Flower does."""
    town = here.town
    with waiting_for(here, THIRD) as number:
        town.set_clocks(HOUR, "coordinator")
    until(lambda: len(here.lines) >= number, town.logs)
    before, line = here.lines[number - 2 :]
    assert everybody(line)
    assert line["at"] - before["at"] > HOUR
    number = town.next_round(here.folder)
    here.until_said(FIRST, "s ahead of this site's clock")
    until(lambda: last_failed(here, number) == {123}, town.logs)
    town.set_clocks(-HOUR, "coordinator")
    until(lambda: last_failed(here, number) == {"unsent"}, town.logs)
    town.set_clocks(0, "coordinator")
    until(lambda: len(here.lines) >= number, town.logs)
    assert everybody(here.lines[-1])
    assert clock_events(here) == ["3600 s ahead", "7200 s back", "3600 s ahead"]


def whole_machines_clock(here: Here) -> None:
    """Set the SuperLink's too: ahead, it takes the run for dead, and the sites' calls for old; back, for ones to come.

    nginx goes on by the true time here, so the gateways cannot say that it is the clock.
    """
    town, seen = here.town, len(clock_events(here))
    with short_of_time(here):
        for ahead in (HOUR, -HOUR):
            before = turned_away(town, FIRST)
            with waiting_for(here, THIRD) as number:
                town.set_clocks(ahead, "coordinator", "superlink")
                until(lambda: turned_away(town, FIRST) > before, town.logs)  # noqa: B023
                until(lambda: ahead < 0 or town.dead("coordinator"), town.logs)  # noqa: B023
                town.set_clocks(0, "coordinator", "superlink")
            until(lambda: town.online() == list(SITES), town.logs)
            if town.dead("coordinator"):
                town.coordinator(resume=here.run)
            until(lambda: len(here.lines) >= number or town.dead("coordinator"), town.logs)
            if town.dead("coordinator"):  # a run that lived by the other time for long is dead by the true one
                town.coordinator(resume=here.run)
            here.reach(everybody)
    assert clock_events(here)[seen] == "3600 s ahead"


def new_keys(here: Here) -> None:
    """Do what the documents say, with the commands that people type, and start no process anew."""
    site, consortium = here.town.world.sites[THIRD], here.town.world.authority.folder
    request, kit = here.town.folder / "request.json", here.town.folder / "kit.json"
    command(at_site, "rotate", "--site", site, "--to", request)
    command(at_coordinator, "enrol", request, "--to", kit, "--consortium", consortium)
    new_edge(here.town)
    # From here until the site has joined, the edge refuses its old certificate.
    here.until_said(THIRD, "not in the manifest")
    member = open_authority(consortium, NOW).manifest().member(THIRD)
    assert member is not None
    here.town.control("RegisterNode", RegisterNodeRequest(public_key=member.node.encode(), name=THIRD))
    said = here.town.log_of(f"{THIRD} gateway").read_text().count("the node is number")
    command(at_site, "join", kit, "--site", site)
    here.until_said(THIRD, "keys and certificate were read anew")
    here.until_said(THIRD, "the node is number", said + 1)
    here.reach(counted(THIRD))


def serverapp_killed(here: Here) -> None:
    # What is announced and never sent keeps a site's gateway waiting for twice the time that a round has.
    with short_of_time(here):
        here.town.next_round(here.folder)
        here.town.kill("coordinator")
    here.town.coordinator(resume=here.run)
    here.reach(everybody)


def superlink_killed(here: Here) -> None:
    here.town.next_round(here.folder)
    here.town.kill("superlink")
    here.town.superlink()
    here.reach(everybody)
    assert not here.town.dead("coordinator")


def full_database(here: Here) -> None:
    with short_of_time(here), limited(here.town.processes["superlink"], here.town.database):
        here.town.next_round(here.folder)
        until(lambda: here.town.dead("coordinator"), here.town.logs)
    here.town.coordinator(resume=here.run)
    here.reach(everybody)


def lost_database(here: Here) -> None:
    town = here.town
    unknown = "has yet to register its node key"
    before = {site: town.log_of(f"{site} gateway").read_text().count(unknown) for site in SITES}
    town.kill("coordinator")
    town.kill("superlink")
    for file in town.folder.glob("state.db*"):
        file.unlink()
    town.superlink()
    for site in SITES:
        here.until_said(site, unknown, before[site] + 1)
        until(lambda: answers(town, site)["POST /v1/fleet/activate-node", "412"], town.logs)  # noqa: B023
        town.register(site)
    until(lambda: town.online() == list(SITES), town.logs)
    town.coordinator(resume=here.run)
    here.reach(everybody)


def revoked(here: Here) -> None:
    before = here.town.log_of(f"{THIRD} gateway").read_text().count("not in the manifest")
    command(at_coordinator, "revoke", THIRD, "--consortium", here.town.world.authority.folder)
    new_edge(here.town)
    here.until_said(THIRD, "not in the manifest", before + 1)
    here.reach(missing(THIRD), without=THIRD)


FAULTS: dict[str, Callable[[Here], None]] = {
    "(1) a node is killed when it has the message": partial(killed, "taken"),
    "(1) a node is killed when it has its answer": partial(killed, "answered"),
    "(1) a node is killed when a part of its answer has left": partial(killed, "half sent"),
    "a node answers with an error that names a patient": complaining,
    "(2, 8) a node sleeps longer than the deadline, and answers late": asleep,
    "(6) slow, late, and reset again and again": bad_network,
    "(6) a black hole": black_hole,
    "(6) connections that are half open": half_open,
    "(7) whatever a site sends arrives again and again": again_and_again,
    "(8) a site says that it answers, and nothing comes": announced_only,
    "(14) the disk of a site's audit log is full": full_audit_log,
    "(15) a site's clock is wrong": wrong_clock,
    "(15) the ServerApp's clock is set by hours in a round": coordinators_clock,
    "(15) the coordinator's machine has its clock set by an hour in a round": whole_machines_clock,
    "(16) a site changes its keys": new_keys,
    "(3) the ServerApp is killed in a round, and goes on as another run": serverapp_killed,
    "(4) the SuperLink is killed in a round, and starts anew on its database": superlink_killed,
    "(14) the disk of the SuperLink is full": full_database,
    "(5, 17) the SuperLink has lost its database, and knows no node": lost_database,
    "(17) a site is revoked": revoked,
}


@needs_nginx
@pytest.mark.slow
@pytest.mark.waits
@pytest.mark.timeout(1500)
def test_whatever_fails_the_run_goes_on_and_nothing_counts_twice(tmp_path: Path, subtests: pytest.Subtests) -> None:
    with town_of(tmp_path, STUDY) as town:
        town.tell(number=0)
        here = Here(town, town.coordinator())
        here.reach(everybody)
        for name, happens in FAULTS.items():
            over = False
            with subtests.test(name):
                happens(here)
                over = True
            if not over:
                return  # what follows would fail, too, after minutes each
        town.tell(number=STUDY.study.rounds, without=THIRD)
        until((here.folder / "result.json").exists, town.logs)
        check_what_must_hold(town, here.folder)


def answers(town: Town, site: str) -> Counter[tuple[str, str]]:
    """Return how often the edge has answered each of a site's calls with each status."""
    return Counter((call["call"], call["status"]) for call in calls(town.edge.folder) if call["site"] == site)


def turned_away(town: Town, site: str) -> int:
    """Return how many of a site's calls the SuperLink has not known, or not taken for its own."""
    return sum(times for (_, status), times in answers(town, site).items() if status == "401")


def restart_node(here: Here, site: str, what: str) -> int:
    """Start a node anew, to which something happens in the next round; return the round's number."""
    number = len(here.lines) + 1
    said = here.town.log_of(f"{site} gateway").read_text().count("the node is number")
    here.town.kill(f"{site} node")
    here.town.node(site, (number, what))
    here.until_said(site, "the node is number", said + 1)
    return number


def restart_gateway(town: Town, site: str, *change: Callable[[], None]) -> None:
    town.kill(f"{site} gateway")
    town.gateway(site, *change)
    until(lambda: town.health(site) == "SERVING", town.logs)


def new_edge(town: Town) -> None:
    consortium = town.world.authority.folder
    where = ("--superlink", town.edge.superlink, "--listen", town.edge.listen, "--to", town.edge.folder)
    command(at_coordinator, "edge", *where, "--consortium", consortium)
    assert nginx(town.edge, "-s", "reload").returncode == 0


def check_what_must_hold(town: Town, folder: Path) -> None:
    lines, result = history(folder), json.loads((folder / "result.json").read_text())
    assert [line["round"] for line in lines] == list(range(1, STUDY.study.rounds + 1))
    assert all(len(line["sites"]) >= STUDY.sites.quorum for line in lines)
    layout = {name: tuple(tensor.shape) for name, tensor in initial_theta(STUDY).items()}
    assert result["theta"] == theta_digest(chain(STUDY, lines)[-1], layout)

    for site in SITES:
        events = [entry.event for entry in town.audit(site)]
        left = {event.round for event in events if (event.outcome, event.kind) == ("sent", "train")}
        assert {line["round"] for line in lines if site in line["sites"]} <= left
    heads = heads_in((town.edge.folder / "access.log").read_bytes().splitlines())
    assert contradictions(keep(town.folder / "heads.jsonl", heads)) == []

    for place in (town.folder, folder):
        for file in place.rglob("*"):
            if file.is_file():
                assert PATIENT.encode() not in file.read_bytes(), file
                assert not (file.suffix == ".key" and file.stat().st_mode & 0o077), file
