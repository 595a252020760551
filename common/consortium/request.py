"""A site's request to join: its name, its public keys, and the proof that it holds the private ones."""

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.consortium.fingerprint import fingerprint
from common.consortium.format import Moment, Name, Pem, Signature, Strict
from common.consortium.keys import ec_public, prove, proven
from common.errors import MembershipError, SignatureError
from common.signing import load_public_key, public_pem, sign, verify

__all__ = ["Request", "SignedRequest"]

_PURPOSE = "membership request"


class Request(Strict):
    """What a site asks to be in the manifest with.

    Attributes
    ----------
    site : str
        The site's name.
    identity, tls, node : str
        Public keys (PEM): Ed25519, P-256 or P-384, P-384.
    made : datetime
        When; a newer request replaces an older one, never the other way round.
    """

    site: Name
    identity: Pem
    tls: Pem
    node: Pem
    made: Moment

    @property
    def fingerprint(self) -> str:
        """What two people compare: the name, and the identity that signs all later requests."""
        return fingerprint({"site": self.site, "identity": self.identity})


class SignedRequest(Strict):
    """A request, signed with each of the keys that it names."""

    request: Request
    by_identity: Signature
    by_tls: Signature
    by_node: Signature

    @classmethod
    def make(
        cls, request: Request, identity: Ed25519PrivateKey, tls: EllipticCurvePrivateKey, node: EllipticCurvePrivateKey
    ) -> "SignedRequest":
        """Sign a request."""
        value = request.model_dump(mode="json")
        return cls(
            request=request,
            by_identity=sign(identity, _PURPOSE, value).hex(),
            by_tls=prove(tls, _PURPOSE, value),
            by_node=prove(node, _PURPOSE, value),
        )

    def checked(self) -> Request:
        """Return the request.

        Raises
        ------
        MembershipError
            It was changed, or whoever made it does not hold one of the private keys.
        """
        value = self.request.model_dump(mode="json")
        tls, node = ec_public(self.request.tls), ec_public(self.request.node)
        if node.curve.name != "secp384r1":
            raise MembershipError("the node key of the request is not P-384, which Flower asks for", "key")
        if tls == node:
            raise MembershipError("the request has one key for two purposes: make a new one", "key")
        try:
            identity = load_public_key(self.request.identity.encode())
            if public_pem(identity).decode() != self.request.identity:
                raise MembershipError("the identity key of the request holds more than a key", "key")
            verify(identity, _PURPOSE, value, bytes.fromhex(self.by_identity))
        except SignatureError:
            raise MembershipError("the request was changed, or not signed by the identity in it", "signature") from None
        for name, key, signature in (("TLS", tls, self.by_tls), ("node", node, self.by_node)):
            if not proven(key, _PURPOSE, value, signature):
                raise MembershipError(
                    f"whoever made the request does not hold the private {name} key that it names", "signature"
                )
        return self.request
