"""Commands of the gateway: run it, decide what may run here, stop everything."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from client.gateway import approvals as store
from client.gateway import switch
from client.gateway.approvals import Item
from client.gateway.bundle import difference, read_bundle
from common.console import plain_errors
from common.errors import ApprovalError
from common.paths import home
from common.study import Study

__all__ = ["DAILY", "HEALTH", "LISTEN", "approvals", "approve", "diff", "gateway", "pause", "reject", "resume"]

#: Where a gateway listens, where it is asked for its health, and how many bytes may leave for one study in a day,
#: unless it is told otherwise.
LISTEN, HEALTH, DAILY = "127.0.0.1:9095", "127.0.0.1:9097", 10 * 2**30

SiteFolder = Annotated[
    Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
What = Annotated[
    str,
    typer.Argument(metavar="WHAT", help="A digest or its beginning, as `approvals` shows it, or a .fab or .toml file."),
]


@plain_errors
def gateway(
    site: SiteFolder = None,
    listen: Annotated[str, typer.Option(help="An address of this machine's loopback.")] = LISTEN,
    health: Annotated[str, typer.Option(help="Another one, for gRPC's health service.")] = HEALTH,
    proxy: Annotated[
        str | None,
        typer.Option(help="The hospital's HTTP proxy, as in http://proxy:3128.", show_default="$HTTPS_PROXY"),
    ] = None,
    node_user: Annotated[
        str | None,
        typer.Option("--node-user", help="The user that runs the SuperNode; nobody else is answered (Linux)."),
    ] = None,
    daily_bytes: Annotated[
        int, typer.Option("--daily-bytes", min=1, help="Bytes that may leave for one study in a day (UTC).")
    ] = DAILY,
) -> None:
    """Run this site's gateway in the foreground, until SIGTERM: the only process here that talks to the consortium.

    The SuperNode connects to it as to a SuperLink, without a key: `python -m deploy.supernode 127.0.0.1:9097 --insecure
    --superlink 127.0.0.1:9095`. Nothing is shown to the node that this site has not approved, and nothing leaves that
    is not in the one form that the study declares. Exit code 1: the site is no member, or its audit log cannot be
    written.
    """
    from client.gateway.gateway import Settings  # with Flower and a web server
    from client.gateway.serve import serve

    serve(Settings((site or home() / "site").resolve(), proxy, daily_bytes), listen, health, node_user)


@plain_errors
def pause(site: SiteFolder = None) -> None:
    """Let nothing leave this site from now on, also not what is on its way. It stays so until `resume`."""
    switch.pause(_site(site))
    print("paused: nothing leaves this site until `wardround-site resume`")


@plain_errors
def resume(site: SiteFolder = None) -> None:
    """Let answers leave again; those that waited leave too, where their message has not ended."""
    switch.resume(_site(site))
    print("open: what is approved and of the declared form may leave")


@plain_errors
def approvals(site: SiteFolder = None, as_json: Json = False) -> None:
    """Show the bundles and studies that this site was asked to run, and what was decided. What waits does not run."""
    found = store.items(_site(site))
    if as_json:
        print(json.dumps([item.model_dump() for item in found], indent=1))
        return
    for item in found:
        print(f"{item.state:<8}  {item.kind:<6}  {item.digest}  {_about(_site(site), item)}, seen {item.seen[:19]}Z")
    waiting = sum(item.state == "waiting" for item in found)
    print(f"{waiting} waiting: `wardround-site diff DIGEST` shows one, `approve` or `reject` decides")


@plain_errors
def approve(what: What, site: SiteFolder = None, as_json: Json = False) -> None:
    """Let a bundle or a study run here, from now on and until it is rejected.

    It must also be in the manifest. Exit code 1: there is no such thing, or its network cannot be built here.
    """
    folder = _site(site)
    item = _item(folder, what)
    size = _elements(store.approved_study(folder, item.digest)[0]) if item.kind == "study" else 0
    if item.kind == "bundle":
        store.bundle_bytes(folder, item.digest)
    _decided(folder, store.decide(folder, item, "approved", _now(), size), as_json)


@plain_errors
def reject(what: What, site: SiteFolder = None, as_json: Json = False) -> None:
    """Let a bundle or a study not run here, also where it was approved before."""
    folder = _site(site)
    _decided(folder, store.decide(folder, _item(folder, what), "rejected", _now()), as_json)


@plain_errors
def diff(what: What, site: SiteFolder = None) -> None:
    """Show what a bundle changes since the one that was approved last, or all values of a study.

    First the files, then the text. What a terminal would not show as it is stands as <U+202E>.
    """
    folder = _site(site)
    item = _item(folder, what)
    if item.kind == "study":
        print(store.approved_study(folder, item.digest)[0].toml(), end="")
        return
    old = store.last_approved_bundle(folder, item.digest)
    before = read_bundle(store.bundle_bytes(folder, old.digest)) if old else {}
    print(f"bundle {item.digest}\nsince  {old.digest if old else 'nothing: no other bundle was approved here'}")
    for line in difference(before, read_bundle(store.bundle_bytes(folder, item.digest))):
        print(line)


def _item(site: Path, what: str) -> Item:
    path = Path(what)
    if path.suffix not in (".fab", ".toml"):
        return store.find(site, what)
    try:
        data = path.read_bytes()
        if path.suffix == ".fab":
            return store.note_bundle(site, data, _now())
        return store.note_study(site, Study.from_toml(data.decode()), _now())
    except (OSError, UnicodeDecodeError):
        raise ApprovalError(f"{path} cannot be read: check its path", "unknown") from None


def _elements(study: Study) -> int:
    """Return the number of elements of a study's theta, which answers must have."""
    from common.meta import head_size, make_learner  # imports torch
    from common.models import build

    classes = head_size(study.algorithm, study.episodes)
    network = build(study.model, classes=classes, seed=study.study.seed, released=False)  # its size is all that counts
    return sum(tensor.numel() for tensor in make_learner(study.algorithm).theta(network).values())


def _about(site: Path, item: Item) -> str:
    if item.kind == "bundle":
        return f"{item.size} bytes"
    study = store.approved_study(site, item.digest)[0].study
    return f"{study.id}, {study.rounds} rounds"


def _decided(site: Path, item: Item, as_json: bool) -> None:
    if as_json:
        print(json.dumps(item.model_dump(), indent=1))
    else:
        print(f"{item.state}: {item.kind} {item.digest}, {_about(site, item)}")


def _site(given: Path | None) -> Path:
    return given or home() / "site"


def _now() -> datetime:
    return datetime.now(UTC)
