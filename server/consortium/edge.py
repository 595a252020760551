"""The edge: nginx in front of the SuperLink, which sites connect to.

It asks for a site's certificate, lets in who is in the manifest, with the node key that the manifest has for that site,
and forwards Flower's fleet calls. The control API, by which whoever reaches it can run code at every hospital, has no
way through.
"""

import re
from base64 import b64encode
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from common.consortium import Manifest, days_left, issued_by, load_certificate, same_key
from common.consortium.keys import load_tls_private, new_tls_key, public_pem, tls_pem
from common.errors import MembershipError
from server.consortium.authority import Authority, read_secret
from server.consortium.issue import issue_server
from server.files import write_atomic

__all__ = ["FLEET_CALLS", "Edge", "nginx_conf", "write_edge"]

#: Flower's fleet calls that an enrolled site makes. Registering and unregistering nodes is the coordinator's.
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)

#: A certificate of a server with fewer days left is replaced.
_RENEW_DAYS = 30

#: Largest request in bytes: Flower cuts arrays into chunks of 5 MiB.
_LARGEST = 6 * 2**20

_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:]{2,45})\]|([A-Za-z0-9.-]{1,253})):([0-9]{1,5})")


@dataclass(frozen=True)
class Edge:
    """Where the edge listens, and what is behind it.

    Attributes
    ----------
    folder : Path
        Where its configuration, keys and logs are.
    listen : str
        ``address:port`` to listen on.
    superlink : str
        ``host:port`` of the SuperLink, on an address that only this machine or a private network reaches.
    """

    folder: Path
    listen: str
    superlink: str


def write_edge(authority: Authority, edge: Edge, now: datetime) -> list[Path]:
    """Write nginx's configuration from the current manifest, and the certificates of edge and SuperLink.

    Certificates that are good for a while are kept. Returns the files that were written.

    Raises
    ------
    MembershipError
        An address cannot be one, or a key that is there was readable by others.
    """
    manifest, folder = authority.manifest(), edge.folder
    public_host, _ = _address(manifest.edge)
    private_host, _ = _address(edge.superlink)
    _address(edge.listen)
    if re.search(r'[\s"\\;{}$]', str(folder)):
        raise MembershipError("the edge's folder needs a path without blanks and quotes: nginx reads it", "address")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    written = _certificate(authority, folder, "edge", public_host, now)
    written += _certificate(authority, folder, "superlink", private_host, now)
    for name, data in (
        ("authority.pem", authority.certificate.public_bytes(Encoding.PEM)),
        ("nginx.conf", nginx_conf(manifest, edge).encode()),
    ):
        write_atomic(folder / name, data)
        written.append(folder / name)
    return written


def nginx_conf(manifest: Manifest, edge: Edge) -> str:
    """Return the edge's configuration for one manifest."""
    sites = "\n".join(f'        "{member.serial}" "{member.site}";' for member in manifest.sites)
    # As Flower sends it in its header: base64 of the public key's PEM.
    nodes = "\n".join(
        f'        "{member.serial} {b64encode(member.node.encode()).decode()}" 1;' for member in manifest.sites
    )
    calls, folder = "|".join(FLEET_CALLS), edge.folder
    return f"""\
# {manifest.consortium}, manifest epoch {manifest.epoch}. Written by `wardround-study edge`: changes here are lost.
worker_processes auto;
worker_shutdown_timeout 30s;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;

events {{
    worker_connections 1024;
}}

http {{
    server_tokens off;
    default_type text/plain;
    map_hash_bucket_size 1024;
    map_hash_max_size 8192;
    client_body_temp_path {folder}/temp-body;
    proxy_temp_path {folder}/temp-proxy;
    fastcgi_temp_path {folder}/temp-fastcgi;
    uwsgi_temp_path {folder}/temp-uwsgi;
    scgi_temp_path {folder}/temp-scgi;

    # The one certificate of each site that counts. Who is absent is out.
    map $ssl_client_serial $site {{
        default "";
{sites}
    }}

    # The node key that belongs to it.
    map "$ssl_client_serial $http_flwr_public_key" $node {{
        default 0;
{nodes}
    }}

    # The last line of the site's audit log: a number and a hash, and nothing of another form is written down.
    map $http_x_wardround_head $head {{
        default "";
        "~^[0-9]{{1,15}}:[0-9a-f]{{64}}$" $http_x_wardround_head;
    }}

    log_format edge escape=json '{{"time": "$time_iso8601", "from": "$remote_addr", "site": "$site", '
        '"certificate": "$ssl_client_verify", "serial": "$ssl_client_serial", "call": "$request_method $uri", '
        '"status": "$status", "why": "$why", "in": "$request_length", "out": "$bytes_sent", '
        '"head": "$head"}}';
    access_log {folder}/access.log edge;

    upstream superlink {{
        server {edge.superlink};
        keepalive 16;
        # Shorter than the SuperLink's own 5 s: a call on a connection that it is closing would be answered with 502.
        keepalive_timeout 3s;
    }}

    server {{
        listen {edge.listen} ssl;
        ssl_protocols TLSv1.3;
        ssl_certificate {folder}/edge.pem;
        ssl_certificate_key {folder}/edge.key;
        ssl_client_certificate {folder}/authority.pem;
        ssl_verify_client on;
        ssl_verify_depth 1;
        ssl_session_tickets off;
        client_max_body_size {_LARGEST};
        client_body_timeout 30s;
        client_header_timeout 10s;
        error_page 495 = @certificate;
        error_page 496 = @nobody;
        set $why "";

        if ($site = "") {{
            set $why "revoked";
            return 403 "refused: this certificate is not in the manifest (revoked, or replaced by a newer one)\\n";
        }}

        location @certificate {{
            set $why "certificate";
            return 403 "refused: the site's certificate: $ssl_client_verify\\n";
        }}

        location @nobody {{
            set $why "no certificate";
            return 403 "refused: no certificate was shown; the edge asks for the site's own\\n";
        }}

        location = /health {{
            limit_except GET {{
                deny all;
            }}
            proxy_pass https://superlink;
        }}

        location ~ ^/v1/fleet/(?:{calls})$ {{
            limit_except POST {{
                deny all;
            }}
            if ($node = 0) {{
                set $why "node key";
                return 403 "refused: the node key is not the one that the manifest has for $site\\n";
            }}
            proxy_pass https://superlink;
        }}

        location / {{
            set $why "call";
            return 403 "refused: the edge forwards Flower's fleet calls and nothing else\\n";
        }}

        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $proxy_host;
        proxy_set_header X-Wardround-Head "";
        proxy_redirect off;
        proxy_connect_timeout 5s;
        proxy_read_timeout 60s;
        proxy_ssl_protocols TLSv1.3;
        proxy_ssl_verify on;
        proxy_ssl_verify_depth 1;
        proxy_ssl_trusted_certificate {folder}/authority.pem;
        proxy_ssl_name superlink;
        proxy_ssl_server_name on;
    }}
}}
"""


def _certificate(authority: Authority, folder: Path, name: str, host: str, now: datetime) -> list[Path]:
    """Make a server's key where there is none, and a certificate where there is none that is good for a while."""
    key_file, file = folder / f"{name}.key", folder / f"{name}.pem"
    written = []
    if not key_file.exists():
        write_atomic(key_file, tls_pem(new_tls_key()), 0o600)
        written.append(key_file)
    key = load_tls_private(read_secret(key_file))
    # nginx compares names and no addresses, and the coordinator's own commands run beside the SuperLink.
    hosts = list(dict.fromkeys([host, "superlink", "localhost", "127.0.0.1"])) if name == "superlink" else [host]
    if not _good(file, authority, public_pem(key), host, now):
        certificate = issue_server(authority.issuer, hosts, key.public_key(), now)
        write_atomic(file, certificate.public_bytes(Encoding.PEM))
        written.append(file)
    return written


def _good(file: Path, authority: Authority, key: str, host: str, now: datetime) -> bool:
    if not file.exists():
        return False
    certificate = load_certificate(file.read_text())
    return (
        issued_by(certificate, authority.certificate)
        and same_key(certificate, key)
        and certificate.subject.rfc4514_string() == f"CN={host}"
        and days_left(certificate, now) > _RENEW_DAYS
    )


def _address(text: str) -> tuple[str, int]:
    """Return the host and port of an address.

    Raises
    ------
    MembershipError
        It is not one.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise MembershipError(f"not an address: {text!r}; say HOST:PORT", "address")
    return match[1] or match[2], int(match[3])
