"""Commands about who belongs to the consortium."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.canonical import sha256_hex
from common.console import plain_errors
from common.consortium import Kit, SignedRequest, matches, warning
from common.consortium.keys import ec_public, openssh_public
from common.errors import AuditError, MembershipError, StudyError
from common.paths import home
from common.study import Study
from server.consortium import members
from server.consortium.authority import Authority, changing, found, open_authority
from server.consortium.edge import Edge, write_edge
from server.consortium.heads import contradictions, heads_in, keep
from server.consortium.issue import SITE_DAYS, issue_site
from server.files import write_atomic

__all__ = ["admit", "edge", "enrol", "found_command", "heads", "renew", "revoke", "sites", "withdraw"]

Folder = Annotated[
    Path | None,
    typer.Option("--consortium", help="The consortium's folder.", show_default="$WARDROUND_HOME/consortium"),
]
Site = Annotated[str, typer.Argument(help="A site's name.", metavar="SITE")]
To = Annotated[Path | None, typer.Option("--to", help="The kit to write.", show_default="SITE.kit.json")]
Days = Annotated[int, typer.Option(min=1, max=825, help="How long the certificate lasts.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@plain_errors
def found_command(
    name: Annotated[str, typer.Argument(help="What the consortium is called, as in 'lung-north'.")],
    edge: Annotated[str, typer.Option(help="HOST:PORT that sites will connect to.")],
    quorum: Annotated[int, typer.Option(min=1, help="Admit no study that aggregates from fewer sites.")] = 3,
    consortium: Folder = None,
    as_json: Json = False,
) -> None:
    """Make a new consortium: its certificate authority, and its manifest. Exit code 1: there is one already."""
    folder = _folder(consortium)
    with changing(folder):
        authority = found(folder, name, edge, quorum, _now())
    if as_json:
        print(json.dumps({"folder": str(folder), "consortium": name, "fingerprint": authority.fingerprint}, indent=1))
        return
    print(f"founded {name} in {folder}: back this folder up, and keep it secret")
    print(f"tell every site this fingerprint, by another way than its kit: {authority.fingerprint}")


@plain_errors
def enrol(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="The request file that the site sent.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="The request's fingerprint, as the site told it. Needed for a new site.")
    ] = None,
    days: Days = SITE_DAYS,
    to: To = None,
    consortium: Folder = None,
    as_json: Json = False,
) -> None:
    """Check a site's request, take it into the manifest, and write its kit, which holds no secret.

    A member's request for new keys is signed by its identity and needs no fingerprint.

    Exit code 1: the request is not in order, or not the one whose fingerprint the site told.
    """
    try:
        asked = SignedRequest.read(request.read_bytes()).checked()
    except OSError as error:
        raise MembershipError(f"{request} cannot be read: {error.strerror}", "missing") from None
    now, folder = _now(), _folder(consortium)
    with changing(folder):
        authority = open_authority(folder, now)
        manifest = authority.manifest()
        if not members.is_known(manifest, asked) or fingerprint is not None:
            if fingerprint is None:
                raise MembershipError(
                    f"{asked.site} is new: ask the site for its request's fingerprint (`wardround-site init` showed "
                    "it), by another way than the request came, and say it with --fingerprint",
                    "fingerprint",
                )
            if not matches(fingerprint, asked.fingerprint):
                raise MembershipError(
                    "the request is not the one with this fingerprint: somebody may have made it in the site's name",
                    "fingerprint",
                )
        if asked.made > now:
            raise MembershipError(
                "the request was made in the future: the site's clock is ahead of this one's; set them", "clock"
            )
        certificate = issue_site(authority.issuer, asked.site, ec_public(asked.tls), now, days)
        signed = authority.publish(members.with_site(manifest, asked, certificate, now))
        kit = authority.kit(asked.site, certificate, signed)
        _write_kit(authority, kit, to, as_json)


@plain_errors
def renew(site: Site, days: Days = SITE_DAYS, to: To = None, consortium: Folder = None, as_json: Json = False) -> None:
    """Issue a new certificate for a site's keys, and write its kit. The old certificate counts no longer.

    Exit code 1: there is no such site.
    """
    now, folder = _now(), _folder(consortium)
    with changing(folder):
        authority = open_authority(folder, now)
        manifest = authority.manifest()
        member = members.must_have(manifest, site)
        certificate = issue_site(authority.issuer, site, ec_public(member.tls), now, days)
        signed = authority.publish(members.renew(manifest, site, certificate, now))
        _write_kit(authority, authority.kit(site, certificate, signed), to, as_json)


@plain_errors
def revoke(site: Site, consortium: Folder = None, as_json: Json = False) -> None:
    """Take a site out of the manifest: its certificate and keys count no longer. Exit code 1: there is no such site."""
    folder = _folder(consortium)
    with changing(folder):
        authority = open_authority(folder, _now())
        manifest = members.remove(authority.manifest(), site, _now())
        authority.publish(manifest)
    if as_json:
        print(json.dumps({"revoked": site, "epoch": manifest.epoch}, indent=1))
    else:
        print(f"{site} is out, manifest epoch {manifest.epoch}")


@plain_errors
def admit(
    bundle: Annotated[list[Path] | None, typer.Option(help="A Flower App Bundle (.fab), repeatable.")] = None,
    study: Annotated[list[Path] | None, typer.Option(help="A study file, repeatable.")] = None,
    consortium: Folder = None,
    as_json: Json = False,
) -> None:
    """Let sites be asked to run a bundle or a study. Each site still decides for itself.

    Exit code 1: a study aggregates from too few sites. Exit code 2: a bad study file.
    """
    try:
        digests = [sha256_hex(path.read_bytes()) for path in bundle or []]
        studies = [Study.from_toml(path.read_text(encoding="utf-8")) for path in study or []]
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"a bundle or study file cannot be read: {error}") from None
    if not digests and not studies:
        raise MembershipError("say what to admit: --bundle FILE, --study FILE", "nothing")
    folder = _folder(consortium)
    with changing(folder):
        authority = open_authority(folder, _now())
        manifest = members.allow(authority.manifest(), digests, studies, _now())
        authority.publish(manifest)
    _say_admitted([*digests, *(one.digest for one in studies)], manifest.epoch, "admitted", as_json)


@plain_errors
def withdraw(
    digests: Annotated[list[str], typer.Argument(metavar="DIGEST...", help="As `wardround-study sites` shows them.")],
    consortium: Folder = None,
    as_json: Json = False,
) -> None:
    """Take bundles or studies out of the manifest. Exit code 1: one of them is not in it."""
    folder = _folder(consortium)
    with changing(folder):
        authority = open_authority(folder, _now())
        manifest = members.forbid(authority.manifest(), digests, _now())
        authority.publish(manifest)
    _say_admitted(digests, manifest.epoch, "withdrawn", as_json)


@plain_errors
def sites(
    consortium: Folder = None,
    node_keys: Annotated[
        Path | None, typer.Option(help="Write each site's SITE.pub here, for `flwr supernode register`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the consortium: its fingerprint, its sites and how long their certificates last, its bundles and studies.

    Exit code 1: a site's certificate has ended, or the folder is not in order.
    """
    now = _now()
    authority = open_authority(_folder(consortium), now)
    manifest = authority.manifest()
    if node_keys is not None:
        node_keys.mkdir(parents=True, exist_ok=True)
        for member in manifest.sites:
            write_atomic(node_keys / f"{member.site}.pub", openssh_public(member.node))
    days = {member.site: (member.expires - now).total_seconds() / 86400 for member in manifest.sites}
    if as_json:
        about = manifest.model_dump(mode="json", exclude={"sites"}) | {"fingerprint": authority.fingerprint}
        about["sites"] = {site: {"days": round(left, 2), "warning": warning(left)} for site, left in days.items()}
        print(json.dumps(about, indent=1))
    else:
        print(f"{manifest.consortium}: manifest epoch {manifest.epoch}, edge {manifest.edge}, quorum {manifest.quorum}")
        print(f"  fingerprint  {authority.fingerprint}")
        for site, left in days.items():
            soon = warning(left)
            print(f"  site    {site}: certificate for {left:.0f} days" + (f" (warning: {soon})" if soon else ""))
        for kind, digests in (("bundle", manifest.bundles), ("study", manifest.studies)):
            for digest in digests:
                print(f"  {kind:<6}  {digest}")
    raise typer.Exit(any(left < 0 for left in days.values()))


@plain_errors
def edge(
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink, on a private address.")],
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT to listen on.")] = "0.0.0.0:8443",
    to: Annotated[
        Path | None, typer.Option("--to", help="The folder to write.", show_default="the consortium's, edge")
    ] = None,
    consortium: Folder = None,
    as_json: Json = False,
) -> None:
    """Write the nginx configuration of the edge from the manifest, and certificates for edge and SuperLink.

    Run it again after every change of the manifest, then reload nginx. Certificates last 90 days; those with fewer than
    30 left are replaced. Exit code 1: an address cannot be one, or the folder is not in order.
    """
    now, folder = _now(), _folder(consortium)
    with changing(folder):
        authority = open_authority(folder, now)
        place = Edge((to or folder / "edge").resolve(), listen, superlink)
        written = write_edge(authority, place, now)
        manifest = authority.manifest()
    if as_json:
        print(json.dumps({"epoch": manifest.epoch, "written": [str(path) for path in written]}, indent=1))
        return
    print(f"wrote {', '.join(path.name for path in written)} in {place.folder} for manifest epoch {manifest.epoch}")
    print(f"check: nginx -t -c {place.folder}/nginx.conf; then the same without -t, or `-s reload`")


@plain_errors
def heads(
    site: Annotated[str | None, typer.Argument(help="Only this site's, all of them.", metavar="SITE")] = None,
    log: Annotated[
        list[Path] | None,
        typer.Option(help="The edge's access.log, repeatable.", show_default="that of the consortium's edge"),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Write SITE's heads, for `audit verify --heads`.")] = None,
    consortium: Folder = None,
    as_json: Json = False,
) -> None:
    """Keep the heads of the sites' audit logs that came with their answers, and show each site's last one.

    They are read from the edge's log and kept in the consortium's folder: run this before a log is rotated away. A site
    whose log was cut or rewritten contradicts one of them.

    Exit code 1: the heads of a site are not of one log, or there is no log to read.
    """
    folder = _folder(consortium)
    try:
        lines = [line for path in log or [folder / "edge" / "access.log"] for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise AuditError(f"the edge's log cannot be read ({error.strerror}): say where it is with --log") from None
    with changing(folder):
        found = [head for head in keep(folder / "heads.jsonl", heads_in(lines)) if site in (None, head.site)]
    last = {head.site: str(head) for head in found}
    wrong = contradictions(found)
    if to is not None:
        if site is None:
            raise AuditError("say whose heads to write: `wardround-study heads SITE --to FILE`", "site")
        write_atomic(to, "".join(f"{head}\n" for head in found).encode())
    if as_json:
        print(json.dumps({"heads": last, "wrong": wrong}, indent=1))
    else:
        print("\n".join([*(f"{name}  {head}" for name, head in sorted(last.items())), *wrong]))
    raise typer.Exit(bool(wrong))


def _write_kit(authority: Authority, kit: Kit, to: Path | None, as_json: bool) -> None:
    path = to or Path(f"{kit.site}.kit.json")
    write_atomic(path, kit.json_bytes())
    manifest = kit.manifest.manifest
    if as_json:
        about = {"kit": str(path), "site": kit.site, "epoch": manifest.epoch, "fingerprint": authority.fingerprint}
        print(json.dumps(about, indent=1))
        return
    print(f"wrote {path}: send it to {kit.site}; it holds no secret (manifest epoch {manifest.epoch})")
    print(f"tell the site this fingerprint by another way, if it joins for the first time: {authority.fingerprint}")


def _say_admitted(digests: list[str], epoch: int, what: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({what: digests, "epoch": epoch}, indent=1))
        return
    for digest in digests:
        print(f"{what} {digest}")
    print(f"manifest epoch {epoch}")


def _folder(given: Path | None) -> Path:
    return given or home() / "consortium"


def _now() -> datetime:
    return datetime.now(UTC)
