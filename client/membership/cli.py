"""Commands about a site's keys and its place in a consortium."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from client.files import write_whole
from client.finding import as_dicts, lines, worst
from client.membership import store
from client.membership.check import examine
from common.console import plain_errors
from common.consortium import Kit, SignedManifest, SignedRequest, load_certificate
from common.errors import MembershipError
from common.paths import home

__all__ = ["init", "join", "keys", "rotate", "update"]

SiteFolder = Annotated[
    Path | None, typer.Option("--site", help="The site's own folder.", show_default="$WARDROUND_HOME/site")
]
To = Annotated[Path | None, typer.Option("--to", help="The request file to write.", show_default="NAME.request.json")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@plain_errors
def init(
    name: Annotated[str, typer.Argument(help="The site's name in the consortium, as in 'st-mary'.")],
    site: SiteFolder = None,
    to: To = None,
    as_json: Json = False,
) -> None:
    """Make this site's keys, and the request file for the coordinator. Private keys stay in the site's folder.

    Exit code 1: the site has keys already, or the name cannot be one.
    """
    _hand_over(store.create(site or home() / "site", name, _now()), to, as_json, first=True)


@plain_errors
def rotate(site: SiteFolder = None, to: To = None, as_json: Json = False) -> None:
    """Make new TLS and node keys, and a request for them. The old ones stay in use until `join` with the new kit.

    The request is signed with the site's identity, so no fingerprint need be compared. Exit code 1: the site has not
    joined, or its identity is not in order.
    """
    _hand_over(store.rotate(site or home() / "site", _now()), to, as_json, first=False)


@plain_errors
def join(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="The file that the coordinator sent.")],
    site: SiteFolder = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="The consortium's fingerprint, as the coordinator told it. Needed the first time."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a kit and become, or stay, a member with it.

    Exit code 1: the kit is not in order, not for this site, older than what was seen, or nobody compared fingerprints.
    """
    _say_joined(store.join(site or home() / "site", Kit.read(_read(kit)), fingerprint, _now()), as_json)


@plain_errors
def update(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The coordinator's manifest.json.")],
    site: SiteFolder = None,
    as_json: Json = False,
) -> None:
    """Take a newer manifest: other sites, bundles and studies. Keys and certificate stay.

    Exit code 1: it is older than what was seen, not signed by the coordinator, or this site is no longer in it.
    """
    _say_joined(store.update(site or home() / "site", SignedManifest.read(_read(manifest)), _now()), as_json)


@plain_errors
def keys(site: SiteFolder = None, as_json: Json = False) -> None:
    """Check this site's keys, certificate and manifest, and say when they end.

    Exit code 1: the site cannot connect with them. A warning (30, 7 and 1 days before the end) is no failure.
    """
    findings = examine(site or home() / "site", _now())
    print(json.dumps(as_dicts(findings), indent=1) if as_json else "\n".join(lines(findings)))
    raise typer.Exit(worst(findings) == "fail")


def _hand_over(signed: SignedRequest, to: Path | None, as_json: bool, *, first: bool) -> None:
    request = signed.request
    path = to or Path(f"{request.site}.request.json")
    write_whole(path, signed.json_bytes())
    if as_json:
        print(json.dumps({"request": str(path), "site": request.site, "fingerprint": request.fingerprint}, indent=1))
        return
    print(f"wrote {path}: send it to the coordinator; it holds no secret")
    if first:
        print(f"tell the coordinator this fingerprint by another way: {request.fingerprint}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MembershipError(f"{path} cannot be read: {error.strerror}", "missing") from None


def _say_joined(member: store.Joined, as_json: bool) -> None:
    ends = load_certificate(member.kit.certificate).not_valid_after_utc
    if as_json:
        about = {"site": member.kit.site, "consortium": member.manifest.consortium, "epoch": member.manifest.epoch}
        about |= {"edge": member.manifest.edge, "certificate_ends": ends.isoformat(), "keys": str(member.keys)}
        print(json.dumps(about, indent=1))
        return
    print(f"{member.kit.site} belongs to {member.manifest.consortium}, manifest epoch {member.manifest.epoch}")
    print(f"  edge         {member.manifest.edge}")
    print(f"  certificate  until {ends:%Y-%m-%d}")
    print(f"  keys         {member.keys}")


def _now() -> datetime:
    return datetime.now(UTC)
