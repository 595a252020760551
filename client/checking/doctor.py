"""Everything that can be checked before a site takes part, one line each."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from client.checking import images, machine, processes
from client.finding import Finding
from client.gateway.approvals import items
from client.gateway.audit import check, read_lines
from client.gateway.cli import audit_path
from client.gateway.switch import paused
from client.membership import examine, joined, reach
from client.membership.store import identity
from common.errors import ApprovalError, AuditError, MembershipError, StorageError
from common.study import Study

__all__ = ["diagnose"]


def diagnose(
    site: Path, plans: list[Study], now: datetime, *, health: str, socket: Path, connect: bool = True
) -> Iterator[Finding]:
    """Look at everything, the quickest first.

    Parameters
    ----------
    site : Path
        The site's folder.
    plans : list of Study
        Studies that the site means to take part in.
    now : datetime
        The time.
    health, socket
        Where the gateway and the worker are asked for their health.
    connect : bool
        Ask the edge, and compare clocks with it.
    """
    yield from machine.versions()
    yield machine.switches()
    yield machine.disk(site)
    yield machine.memory()
    yield from machine.devices()
    yield from examine(site, now)
    if connect:
        yield from _edge(site, now)
    yield from _audit(site)
    yield from _gateway(site)
    yield processes.gateway(health)
    yield processes.worker(socket)
    yield from images.catalogue(site)
    for plan in plans:
        yield from images.study(plan, site)


def _edge(site: Path, now: datetime) -> Iterator[Finding]:
    try:
        reached = reach(joined(site, now))
    except MembershipError:
        return  # `examine` has said it
    yield reached.finding
    if reached.skew is not None:
        yield machine.clock(reached.skew)


def _audit(site: Path) -> Iterator[Finding]:
    path = audit_path(site)
    if not path.exists():
        return
    try:
        count = sum(1 for _ in check(read_lines(path)[0], identity(site).public_key()))
    except (AuditError, MembershipError, StorageError) as error:
        yield Finding("audit", "fail", str(error), "keep the file, and find out who changed it")
    else:
        yield Finding("audit", "ok", f"{count} lines of the audit log are as they were written")


def _gateway(site: Path) -> Iterator[Finding]:
    if not (site / "gateway").exists():  # no gateway ever ran here
        return
    if paused(site):
        yield Finding("switch", "warn", "this site is paused: nothing leaves", "`wardround-site resume`")
    try:
        waiting = sum(item.state == "waiting" for item in items(site))
    except ApprovalError as error:
        yield Finding("approvals", "fail", str(error))
        return
    text = f"{waiting} bundles and studies wait for this site's approval"
    yield Finding("approvals", "warn" if waiting else "ok", text, "`wardround-site approvals`" if waiting else "")
