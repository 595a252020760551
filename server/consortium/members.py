"""How a manifest changes: pure functions from one to the next. Every change raises the epoch."""

from datetime import datetime
from typing import Any

from cryptography import x509
from pydantic import ValidationError

from common.consortium import Manifest, Member, Request, serial
from common.errors import MembershipError
from common.study import Study

__all__ = ["allow", "forbid", "is_known", "must_have", "remove", "renew", "with_site"]


def is_known(manifest: Manifest, request: Request) -> bool:
    """Say whether a request comes from a member: signed by the identity that the manifest has for its name.

    Raises
    ------
    MembershipError
        The name is taken by another identity, or the request is older than the keys in the manifest.
    """
    member = manifest.member(request.site)
    if member is None:
        return False
    if member.identity != request.identity:
        raise MembershipError(
            f"{request.site} is in the manifest with another identity: if the site lost its keys, "
            f"`wardround-study revoke {request.site}` first; otherwise the new site needs another name",
            "name-taken",
        )
    if request.made < member.requested:
        raise MembershipError(
            f"this request of {request.site} is of {request.made:%Y-%m-%d %H:%M}, and a newer one was enrolled: "
            "it would bring back keys that the site has replaced",
            "old-request",
        )
    return True


def with_site(manifest: Manifest, request: Request, certificate: x509.Certificate, now: datetime) -> Manifest:
    """Add a site, or replace a member's keys."""
    member = Member(
        site=request.site,
        identity=request.identity,
        tls=request.tls,
        node=request.node,
        serial=serial(certificate),
        expires=certificate.not_valid_after_utc,
        requested=request.made,
    )
    return _with_member(manifest, member, now)


def renew(manifest: Manifest, site: str, certificate: x509.Certificate, now: datetime) -> Manifest:
    """Replace a member's certificate; its keys stay."""
    changes = {"serial": serial(certificate), "expires": certificate.not_valid_after_utc}
    return _with_member(manifest, must_have(manifest, site).model_copy(update=changes), now)


def remove(manifest: Manifest, site: str, now: datetime) -> Manifest:
    """Take a site out."""
    must_have(manifest, site)
    return _next(manifest, now, sites=tuple(member for member in manifest.sites if member.site != site))


def must_have(manifest: Manifest, site: str) -> Member:
    """Return a site's entry.

    Raises
    ------
    MembershipError
        There is none.
    """
    member = manifest.member(site)
    if member is None:
        known = ", ".join(other.site for other in manifest.sites) or "nobody"
        raise MembershipError(f"{site} is not in the manifest; there are: {known}", "unknown-site")
    return member


def allow(manifest: Manifest, bundles: list[str], studies: list[Study], now: datetime) -> Manifest:
    """Let sites be asked to run some bundles (by SHA-256) and studies.

    Raises
    ------
    MembershipError
        A study may aggregate fewer sites than the manifest's quorum.
    """
    for study in studies:
        if study.sites.quorum < manifest.quorum:
            raise MembershipError(
                f"the study {study.study.id} aggregates from {study.sites.quorum} sites (sites.quorum), and the "
                f"consortium asks for {manifest.quorum}: raise it in the study",
                "quorum",
            )
    return _next(
        manifest,
        now,
        bundles=tuple(sorted({*manifest.bundles, *bundles})),
        studies=tuple(sorted({*manifest.studies, *(study.digest for study in studies)})),
    )


def forbid(manifest: Manifest, digests: list[str], now: datetime) -> Manifest:
    """Take bundles or studies out.

    Raises
    ------
    MembershipError
        One of them is not in the manifest.
    """
    for digest in digests:
        if digest not in {*manifest.bundles, *manifest.studies}:
            raise MembershipError(f"neither a bundle nor a study of the manifest: {digest}", "unknown-digest")
    return _next(
        manifest,
        now,
        bundles=tuple(digest for digest in manifest.bundles if digest not in digests),
        studies=tuple(digest for digest in manifest.studies if digest not in digests),
    )


def _with_member(manifest: Manifest, member: Member, now: datetime) -> Manifest:
    others = [other for other in manifest.sites if other.site != member.site]
    return _next(manifest, now, sites=tuple(sorted([*others, member], key=lambda one: one.site)))


def _next(manifest: Manifest, now: datetime, **changes: Any) -> Manifest:
    fields = {name: getattr(manifest, name) for name in type(manifest).model_fields} | changes
    try:
        return Manifest(**fields | {"epoch": manifest.epoch + 1, "issued": now.replace(microsecond=0)})
    except ValidationError as error:
        raise MembershipError(f"this change cannot be made: {error.errors()[0]['msg']}", "conflict") from None
