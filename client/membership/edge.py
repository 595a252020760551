"""Does the edge let this site in? Each way in which it does not has its own sentence."""

import re
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection

from client.finding import Finding
from client.membership.store import Joined

__all__ = ["Reached", "reach"]

#: OpenSSL's codes of what is wrong with the certificate of the other side.
_CERTIFICATE = {
    9: ("the edge's certificate is not valid yet", "set this machine's clock"),
    10: ("the edge's certificate has ended", "the coordinator runs `wardround-study edge` and reloads nginx"),
    18: ("the edge's certificate is not the consortium's", "is this the right host, or is something in between?"),
    19: ("the edge's certificate is not the consortium's", "is this the right host, or is something in between?"),
    20: ("the edge's certificate is not the consortium's", "is this the right host, or is something in between?"),
    62: ("the edge's certificate is for another name", "the coordinator runs `wardround-study edge` for this host"),
    64: ("the edge's certificate is for another address", "the coordinator runs `wardround-study edge` for this host"),
}


@dataclass(frozen=True)
class Reached:
    """What came of an attempt to reach the edge.

    Attributes
    ----------
    finding : Finding
        For a person.
    skew : float or None
        Seconds by which this machine's clock is ahead of the edge's, to about a second; None where nothing answered.
    """

    finding: Finding
    skew: float | None = None


def reach(member: Joined, *, seconds: float = 10.0) -> Reached:
    """Ask the edge for its health with the site's certificate, as TLS 1.3 and nothing less."""
    host, _, port = member.manifest.edge.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(member.keys / "authority.pem")
    context.load_cert_chain(member.keys / "certificate.pem", member.keys / "tls.key")
    connection = HTTPSConnection(host, int(port), timeout=seconds, context=context)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        text, status, date = response.read(500), response.status, response.getheader("Date", "")
    except (OSError, HTTPException) as error:
        return Reached(Finding("edge", "fail", *_what_failed(member.manifest.edge, error)))
    finally:
        connection.close()
    skew = None
    with suppress(ValueError, TypeError):
        skew = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    return Reached(_answered(member.manifest.edge, status, text), skew)


def _answered(edge: str, status: int, text: bytes) -> Finding:
    if status == 200:
        return Finding("edge", "ok", f"{edge} lets this site in")
    if status == 403:
        said = re.sub(r"[^ -~]", "", text.decode("ascii", "replace"))[:200].removeprefix("refused: ")
        return Finding("edge", "fail", f"{edge} refuses this site: {said}", "ask the coordinator for a new kit")
    if status in (502, 503, 504):
        return Finding("edge", "fail", f"{edge} is up, the SuperLink behind it is not", "tell the coordinator")
    return Finding("edge", "fail", f"{edge} answers {status}", "is this the right host, or is something in between?")


def _what_failed(edge: str, error: OSError | HTTPException) -> tuple[str, str]:
    """Return what kept this site from the edge, and the remedy."""
    match error:
        case ssl.SSLCertVerificationError():
            unknown = (f"the edge's certificate is not good ({error.verify_message})", "tell the coordinator")
            return _CERTIFICATE.get(error.verify_code, unknown)
        case ssl.SSLError():
            versions = error.reason in ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL")
            what = "the other side does not speak TLS 1.3" if versions else f"TLS failed ({error.reason})"
            return what, "is this the right port, and is nothing in between that opens TLS?"
        case socket.gaierror():
            return f"the name of {edge} is not known", "check this machine's DNS"
        case TimeoutError():
            return f"{edge} does not answer", "let this machine out to that host and port"
        case ConnectionRefusedError():
            return f"nothing listens at {edge}", "ask the coordinator whether the edge is up"
    return f"the connection to {edge} broke ({type(error).__name__})", "try again"
