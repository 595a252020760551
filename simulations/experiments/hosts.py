"""`python -m simulations.experiments.hosts`: every hospital on a host of its own, and all that leaves it.

The processes are those of `wardround-lab localnet`. Coordinator and hospitals have a network namespace each, joined by
cables of their own to the coordinator's. A hospital's default route and its DNS server are at the other end of its
cable, where nothing is forwarded: what tries to go elsewhere gets nowhere, and is seen. Every packet that comes out of
a hospital is counted there by where it goes to.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console

from client.data.store import Site
from client.membership import joined
from common.console import plain_errors
from common.errors import NotPreparedError, RoundError
from common.study import Study
from server.record import run_folder
from simulations.capture import NEIGHBOURS, Capture, To, capture
from simulations.engines.control import until
from simulations.localnet import Hosts, localnet
from simulations.namespaces import HERE, cable, default_route, impossible, namespace

__all__ = ["app", "elsewhere"]

_STUDY: dict[str, bool | int | float | str] = {
    "study.id": "hosts",
    "study.title": "Hospitals on hosts of their own",
    "sites.held-out": "",
    "privacy.figures": "withheld",  # training rounds only: all else goes the same way
    "data.patients-per-class": 5,
}

#: The DNS server of every host, and somebody else, of networks for documentation (RFC 5737): nobody is there.
_DNS, _SOMEBODY = To("udp", "192.0.2.53", 53), To("tcp", "198.51.100.7", 443)

#: Runs a command alone: with a network in which there is nothing, and with that DNS server.
_ALONE = f"""\
ip link set lo up
mount -t tmpfs tmpfs /run
servers=$(readlink -m /etc/resolv.conf)
mkdir -p "$(dirname "$servers")"
test -e "$servers" || : >"$servers"
echo nameserver {_DNS.address} >/run/servers
mount --bind /run/servers "$servers"
exec "$@"
"""

#: What a program does that wants to talk to somebody: it asks for a name, and it connects to an address.
_TALK = f"""\
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"canary", {_DNS[1:]!r})
one = socket.socket()
one.settimeout(0.5)
one.connect_ex({_SOMEBODY[1:]!r})
"""

_WATCH_SECONDS = 10.0  # a node without a message asks its gateway every 3 s
_SETTLE_SECONDS = 5.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
_progress = Console(stderr=True)

_Counts = dict[str, int]


@app.command(epilog="Example: python -m simulations.experiments.hosts --sites 2 --rounds 3 --json hosts.json")
@plain_errors
def main(
    sites: Annotated[int, typer.Option(min=1, max=200, help="Hospitals.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    alone: Annotated[bool, typer.Option("--alone", hidden=True)] = False,
) -> None:
    """Run a study with every hospital in a network namespace of its own, and count what leaves each.

    nginx, ip and unshare must be installed. Without the superuser's rights the kernel has to allow user namespaces.

    Exit code 1: theta is not that of the in-process run, anything went elsewhere than to the edge, anything left a
    hospital whose gateway was killed, or a packet was missed.
    """
    if not alone:
        rights = [] if os.geteuid() == 0 else ["--map-root-user"]
        if why := impossible(*rights):
            raise NotPreparedError(f"no network namespace can be made here: {why}")
        again = [sys.executable, "-m", "simulations.experiments.hosts", *sys.argv[1:], "--alone"]
        os.execvp("unshare", ["unshare", *rights, "--net", "--mount", "sh", "-ec", _ALONE, "sh", *again])
    from simulations.engines.inprocess import run_in_process
    from simulations.prepare import prepare

    study = Study().override({**_STUDY, "sites.quorum": sites, "data.sites": sites, "study.rounds": rounds})
    data = prepare(study, progress=_progress.print)
    with redirect_stdout(sys.stderr):
        theta = (run_folder(run_in_process(study)[0]) / "theta.safetensors").read_bytes()
    result = _measure(study, data, theta)
    _show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if found := [word for site in result["sites"].values() for word in ("elsewhere", "after", "missed") if site[word]]:
        raise RoundError(f"something left a hospital, or was missed: {', '.join(sorted(set(found)))}")


def elsewhere(found: Capture, edge: To) -> dict[str, int]:
    """Return how many packets went neither to the edge nor to a neighbour, by where they went."""
    return {str(to): count for to, count in found.packets().items() if to not in (edge, NEIGHBOURS)}


def _measure(study: Study, data: Sequence[Site], theta: bytes) -> dict[str, Any]:
    with ExitStack() as stack:
        hosts, captures = {}, {}
        for number, site in enumerate(data):
            host = hosts[site.name] = stack.enter_context(namespace(site.name))
            near, far = f"198.18.{number}.1", f"198.18.{number}.2"
            cable(HERE, host, (f"site{number}", "uplink"), (f"{near}/30", f"{far}/30"))
            default_route(host, near)
            captures[site.name] = stack.enter_context(capture(f"site{number}"))
        for host in hosts.values():
            subprocess.run([*host, sys.executable, "-I", "-c", _TALK], check=True, timeout=60)
        on_purpose = {}
        for name, one in captures.items():
            until(partial(_saw, one), 10, lambda: "what was sent elsewhere on purpose was not seen")
            on_purpose[name] = one.packets()
            one.forget()
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wardround-", ignore_cleanup_errors=True)))
        began = time.monotonic()
        net = stack.enter_context(localnet(folder, study, data, _progress.print, Hosts("198.18.0.1", hosts)))
        run = net.run(study)
        took = time.monotonic() - began
        if (run / "theta.safetensors").read_bytes() != theta:
            raise RoundError("theta is not that of the in-process run: please report this")
        address, port = joined(net.sites[data[0].name], datetime.now(UTC)).manifest.edge.split(":")
        edge = To("tcp", address, int(port))
        after, alive = _kill(stack, hosts, captures)
        return {
            "rounds": study.study.rounds,
            "seconds": took,
            "edge": str(edge),
            "on_purpose": {name: {str(to): count for to, count in seen.items()} for name, seen in on_purpose.items()},
            "sites": {
                name: {
                    "to_the_edge": one.packets()[edge],
                    "bytes_to_the_edge": one.octets()[edge],
                    "neighbours": one.packets()[NEIGHBOURS],
                    "elsewhere": elsewhere(one, edge),
                    "alive": alive[name],
                    "after": after[name],
                    "missed": one.missed(),
                }
                for name, one in captures.items()
            },
        }


def _saw(one: Capture) -> bool:
    return {_DNS, _SOMEBODY} <= set(one.packets())


def _kill(stack: ExitStack, hosts: Iterable[str], captures: Mapping[str, Capture]) -> tuple[_Counts, _Counts]:
    """Kill every gateway; return what left each hospital afterwards and, in as long a time, before."""
    alive = _watched(captures)
    for name in hosts:
        processes = _processes(name)
        for process in [process for process, words in processes.items() if "up" in words]:
            os.kill(process, signal.SIGSTOP)  # it would start the gateway again
            stack.callback(os.kill, process, signal.SIGCONT)
        for process in [process for process, words in processes.items() if "gateway" in words]:
            os.kill(process, signal.SIGKILL)
    time.sleep(_SETTLE_SECONDS)  # the kernel closes their connections
    return _watched(captures), alive


def _watched(captures: Mapping[str, Capture]) -> _Counts:
    """Return how many packets, but for neighbours, leave each hospital in a while."""
    before = {name: _left(one) for name, one in captures.items()}
    time.sleep(_WATCH_SECONDS)
    return {name: _left(one) - before[name] for name, one in captures.items()}


def _left(found: Capture) -> int:
    packets = found.packets()
    return packets.total() - packets[NEIGHBOURS]


def _processes(name: str) -> dict[int, list[str]]:
    """Return the processes of a host, and the words of their commands."""
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True, timeout=20)
    return {
        int(process): Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
        for process in done.stdout.split()
    }


def _show(result: Mapping[str, Any]) -> None:
    for name, site in result["sites"].items():
        print(
            f"{name}: {site['to_the_edge']} packets to the edge ({result['edge']}), {site['bytes_to_the_edge']} bytes"
        )
        print(f"  {site['neighbours']} of ARP and neighbour discovery; elsewhere {site['elsewhere'] or 'nothing'}")
        print(f"  without a run {site['alive']} packets in {_WATCH_SECONDS:.0f} s; its gateway killed, {site['after']}")
    print(f"theta is that of the in-process run, byte for byte: {result['rounds']} rounds, {result['seconds']:.0f} s")


if __name__ == "__main__":
    app()
