"""A consortium for tests, with sites that made their keys in folders of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from client.membership import store
from common.consortium import Kit, Request, SignedRequest
from common.consortium.keys import ec_public, new_node_key, new_tls_key, public_pem
from common.signing import generate_key
from common.signing import public_pem as identity_pem
from server.consortium import members
from server.consortium.authority import Authority, found
from server.consortium.issue import SITE_DAYS, issue_site

__all__ = ["NOW", "World", "enrol", "new_request", "new_world"]

#: Real time, because TLS libraries look at their own clock.
NOW = datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class World:
    """A consortium and its sites.

    Attributes
    ----------
    authority : Authority
        The coordinator's.
    sites : mapping
        From a site's name to its folder.
    kits : mapping
        From a site's name to the kit it joined with.
    """

    authority: Authority
    sites: Mapping[str, Path]
    kits: Mapping[str, Kit]


def new_world(folder: Path, *names: str, edge: str = "localhost:8443") -> World:
    """Found a consortium and let some sites join."""
    authority = found(folder / "consortium", "testers", edge, 2, NOW)
    sites = {name: folder / name for name in names}
    kits = {name: enrol(authority, store.create(site, name, NOW)) for name, site in sites.items()}
    for name, site in sites.items():
        store.join(site, kits[name], authority.fingerprint, NOW)
    return World(authority, sites, kits)


def enrol(authority: Authority, signed: SignedRequest, *, days: float = SITE_DAYS, now: datetime = NOW) -> Kit:
    """Take a request into the manifest, whoever made it, and return the kit."""
    request = signed.checked()
    certificate = issue_site(authority.issuer, request.site, ec_public(request.tls), now, days)
    manifest = members.with_site(authority.manifest(), request, certificate, now)
    return authority.kit(request.site, certificate, authority.publish(manifest))


def new_request(site: str = "st-mary", *, later: timedelta = timedelta()) -> tuple[SignedRequest, object]:
    """Return a request made in memory, and its identity."""
    identity, tls, node = generate_key(), new_tls_key(), new_node_key()
    request = Request(
        site=site,
        identity=identity_pem(identity.public_key()).decode(),
        tls=public_pem(tls),
        node=public_pem(node),
        made=NOW + later,
    )
    return SignedRequest.make(request, identity, tls, node), identity
