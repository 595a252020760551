"""Are a site's keys, certificate and manifest in order?"""

from datetime import datetime
from pathlib import Path

from client.finding import Finding
from client.membership.store import joined, member_folder
from common.consortium import days_left, load_certificate, warning
from common.errors import MembershipError

__all__ = ["examine"]


def examine(site: Path, now: datetime) -> list[Finding]:
    """Look at everything that makes a site a member: modes, keys, certificates, manifest."""
    try:
        member = joined(site, now)
    except MembershipError as error:
        return [Finding("keys", "fail", str(error), "")]
    certificate, authority = load_certificate(member.kit.certificate), load_certificate(member.kit.authority)
    findings = [
        Finding("keys", "ok", f"{member.kit.site}: identity, TLS and node key are 0600 and in the manifest"),
        _ends("certificate", "the site's certificate", days_left(certificate, now), "site"),
        _ends("authority", "the consortium's certificate", days_left(authority, now), "consortium"),
        Finding(
            "manifest",
            "ok",
            f"{member.manifest.consortium}, epoch {member.manifest.epoch} of {member.manifest.issued:%Y-%m-%d}, "
            f"{len(member.manifest.sites)} sites, {len(member.manifest.studies)} studies",
        ),
    ]
    waiting = [path for path in member_folder(site).iterdir() if path.is_dir() and path != member.keys]
    if waiting:
        text = "new keys wait for their kit"
        findings.append(Finding("rotation", "warn", text, "have the request enrolled, then `wardround-site join KIT`"))
    return findings


def _ends(what: str, name: str, days: float, whose: str) -> Finding:
    soon = warning(days)
    if not soon:
        return Finding(what, "ok", f"{name} ends in {days:.0f} days")
    remedy = {
        "site": "ask the coordinator for `wardround-study renew`, then join with the new kit",
        "consortium": "the coordinator begins a new consortium and enrols all sites anew",
    }[whose]
    return Finding(what, "warn", f"{name} {soon}", remedy)
