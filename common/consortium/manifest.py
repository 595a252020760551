"""The manifest: who belongs to a consortium, and what its sites may be asked to run. Who is absent is out."""

from collections.abc import Callable
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, StringConstraints, field_validator

from common.canonical import canonical_json, sha256_hex
from common.consortium.format import Digest, Moment, Name, Pem, Signature, Strict
from common.errors import MembershipError, SignatureError
from common.signing import sign, verify

__all__ = ["Manifest", "Member", "SignedManifest"]

_PURPOSE = "manifest"


class Member(Strict):
    """A site, and the keys it is known by.

    Attributes
    ----------
    site : str
        Its name: in every record of a run, and in Flower's list of nodes.
    identity, tls, node : str
        Its public keys (PEM).
    serial : str
        Serial number, in hex, of the one certificate of this site that counts. Every other one is revoked.
    expires : datetime
        When that ends.
    requested : datetime
        When the site made the request that these keys came with.
    """

    site: Name
    identity: Pem
    tls: Pem
    node: Pem
    serial: Annotated[str, StringConstraints(pattern=r"^[0-9A-F]{2,40}$")]
    expires: Moment
    requested: Moment


class Manifest(Strict):
    """One state of a consortium.

    Attributes
    ----------
    consortium : str
        Its name.
    epoch : int
        Rises with every change. A site takes no manifest with a lower one than it has seen.
    issued : datetime
        When it was signed.
    edge : str
        ``host:port`` that sites connect to.
    quorum : int
        No study is admitted whose aggregate may be of fewer sites.
    sites : tuple of Member
        By name.
    bundles, studies : tuple of str
        SHA-256 of the Flower App Bundles, and digests of the studies, that sites may be asked to run.
    """

    consortium: Name
    epoch: Annotated[int, Field(ge=1, lt=2**53)]
    issued: Moment
    edge: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]{1,253}:[0-9]{1,5}$")]
    quorum: Annotated[int, Field(ge=1, le=1000)]
    sites: Annotated[tuple[Member, ...], Field(strict=False)] = ()
    bundles: Annotated[tuple[Digest, ...], Field(strict=False)] = ()
    studies: Annotated[tuple[Digest, ...], Field(strict=False)] = ()

    @field_validator("sites")
    @classmethod
    def _distinct(cls, sites: tuple[Member, ...]) -> tuple[Member, ...]:
        if list(sites) != sorted(sites, key=lambda member: member.site):
            raise ValueError("sites are not in the order of their names")
        fields: tuple[Callable[[Member], str], ...] = (
            lambda member: member.site,
            lambda member: member.identity,
            lambda member: member.tls,
            lambda member: member.node,
            lambda member: member.serial,
        )
        if any(len(set(map(field, sites))) < len(sites) for field in fields):
            raise ValueError("two sites share a name, a key or a certificate")
        return sites

    @field_validator("bundles", "studies")
    @classmethod
    def _sorted(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        if list(digests) != sorted(set(digests)):
            raise ValueError("digests are not in order, or one stands twice")
        return digests

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON, in hex."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))

    def member(self, site: str) -> Member | None:
        """Return a site's entry; None where it does not belong, or no longer."""
        return next((member for member in self.sites if member.site == site), None)

    def must_follow(self, seen: "Manifest") -> None:
        """Check that this manifest may replace one that was seen before.

        Raises
        ------
        MembershipError
            It is older, of another consortium, or another one of the same epoch.
        """
        if self.consortium != seen.consortium:
            raise MembershipError(
                f"the manifest is of the consortium {self.consortium}, this site belongs to {seen.consortium}",
                "other-consortium",
            )
        if self.epoch < seen.epoch:
            raise MembershipError(
                f"the manifest has epoch {self.epoch}, and this site has seen {seen.epoch} already: an old manifest "
                "could bring back a site or a study that was taken out; ask the coordinator for the current kit",
                "epoch",
            )
        if self.epoch == seen.epoch and self != seen:
            raise MembershipError(
                f"two different manifests have the epoch {self.epoch}: the coordinator's folder was restored from a "
                "backup, or its key is in other hands; join nothing before that is cleared up",
                "epoch",
            )


class SignedManifest(Strict):
    """A manifest and the coordinator's signature."""

    manifest: Manifest
    signature: Signature

    @classmethod
    def make(cls, manifest: Manifest, key: Ed25519PrivateKey) -> "SignedManifest":
        """Sign a manifest."""
        return cls(manifest=manifest, signature=sign(key, _PURPOSE, manifest.model_dump(mode="json")).hex())

    def checked(self, key: Ed25519PublicKey) -> Manifest:
        """Return the manifest.

        Raises
        ------
        MembershipError
            The signature is not this key's.
        """
        try:
            verify(key, _PURPOSE, self.manifest.model_dump(mode="json"), bytes.fromhex(self.signature))
        except SignatureError:
            raise MembershipError(
                "the manifest was changed, or another key signed it: take no kit from whom it came", "signature"
            ) from None
        return self.manifest
