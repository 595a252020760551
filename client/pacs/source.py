"""The PACS to pull from, and what may be sent over which connection."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import DataError

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """Where a PACS answers DICOMweb, and how it knows us.

    Certificates are always verified. Plain http is for this machine only, unless ``plain_http`` says that images
    may cross the network readable by anyone on it; a token or password never does. Redirects are refused, and
    proxies and credentials that the environment names (``HTTPS_PROXY``, ``.netrc``) are not used: what is asked
    goes to the address that was given.

    Attributes
    ----------
    url : str
        Root of the DICOMweb service, as in ``https://pacs.example/dicom-web``.
    token : str, optional
        Bearer token.
    user : tuple of str, optional
        Name and password.
    ca : Path, optional
        Certificates (PEM) to trust instead of the public ones.
    plain_http : bool
        Allow http to another machine.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    user: tuple[str, str] | None = field(default=None, repr=False)
    ca: Path | None = None
    plain_http: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise DataError("the address of the PACS must look like https://pacs.example/dicom-web")
        if parts.username is not None or parts.password is not None:
            raise DataError("take the password out of the address of the PACS and put it into a file (--user-file)")
        if self.token is not None and self.user is not None:
            raise DataError("give a token or a user, not both")
        if self.ca is not None and not self.ca.is_file():
            raise DataError(f"{self.ca} is not a file: --ca takes certificates in PEM form")
        if parts.scheme == "http" and not _is_this_machine(parts.hostname):
            if not self.plain_http:
                raise DataError(
                    "http sends images readable by anyone on the network: use https, or allow it with --plain-http"
                )
            if self.token is not None or self.user is not None:
                raise DataError("a token or password is not sent over http to another machine: use https")


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
