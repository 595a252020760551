"""The edge as Debian's nginx runs it: who gets in, who does not, and what both ends say about it."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from client.membership import Joined, joined, reach, store
from common.consortium.keys import ec_public, load_tls_private
from common.errors import MembershipError
from server.consortium import members
from server.consortium.authority import Authority
from server.consortium.edge import FLEET_CALLS, Edge, nginx_conf, write_edge
from server.consortium.heads import heads_in
from server.consortium.issue import issue_server, issue_site
from simulations.engines.control import until
from tests.ports import free_port
from tests.server.consortium.edge_log import calls
from tests.server.consortium.founded import NOW, World, enrol, new_world

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed here (.ci/nginx does it)")


@dataclass
class Running:
    """A running edge, and what reached the SuperLink behind it."""

    world: World
    edge: Edge
    calls: list[str]

    def log(self, word: str) -> str:
        """Return the log once a word is in it; nginx writes it after it has answered."""
        for _ in range(3000):
            text = "".join((self.edge.folder / name).read_text() for name in ("access.log", "error.log"))
            if word in text:
                return text
            time.sleep(0.02)
        raise AssertionError(f"{word!r} is not in the log: {text[-2000:]}")

    def reload(self) -> None:
        """Let nginx read its files anew, and wait until no worker that knows the old ones takes connections."""
        master = (self.edge.folder / "nginx.pid").read_text().strip()
        children = Path(f"/proc/{master}/task/{master}/children")
        # nginx comes back from its start before its workers are there.
        until(lambda: len(children.read_text().split()) == os.sysconf("SC_NPROCESSORS_ONLN"), 60, children.read_text)
        old = set(children.read_text().split())
        done = nginx(self.edge, "-s", "reload")
        assert done.returncode == 0, done.stderr
        for _ in range(3000):
            now = set(children.read_text().split())
            if now and not now & old:
                return
            time.sleep(0.02)
        raise AssertionError(f"workers {now & old} of before are still there, or there are none: {now}")


def nginx(edge: Edge, *arguments: str) -> subprocess.CompletedProcess[str]:
    # As root, nginx's workers would be another user, who cannot enter the folder of a test.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    command = [str(NGINX), "-c", str(edge.folder / "nginx.conf"), *user, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def superlink(folder: Path, port: int) -> Iterator[list[str]]:
    """Stand where the SuperLink would, and note what comes."""
    calls: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            calls.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 (as the library calls it)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "superlink.pem", folder / "superlink.key")
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield calls
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def started(world: World, folder: Path) -> Iterator[Running]:
    port = int(world.authority.manifest().edge.split(":")[1])
    edge = Edge(folder, f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}")
    write_edge(world.authority, edge, NOW)
    with superlink(folder, int(edge.superlink.split(":")[1])) as calls:
        begun = nginx(edge)
        assert begun.returncode == 0, begun.stderr
        try:
            yield Running(world, edge, calls)
        finally:
            nginx(edge, "-s", "quit")
            for _ in range(3000):
                if not (folder / "nginx.pid").exists():
                    break
                time.sleep(0.02)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("edge")
    world = new_world(folder, "st-mary", "uni-2", "third", edge=f"localhost:{free_port()}")
    with started(world, folder / "nginx") as edge:
        yield edge


def member(running: Running, site: str = "st-mary") -> Joined:
    return joined(running.world.sites[site], NOW)


def with_certificate(one: Joined, authority: Authority, folder: Path, *, name: str, days: float = 100) -> Joined:
    """Return a member that shows another certificate for its key."""
    shutil.copytree(one.keys, folder, dirs_exist_ok=True)
    certificate = issue_site(authority.issuer, name, ec_public(one.member.tls), NOW, days)
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    return replace(one, keys=folder)


def call(
    one: Joined | None,
    path: str,
    edge: str,
    *,
    method: str = "POST",
    node: str | None = None,
    body: bytes = b"",
    authority: Path | None = None,
    head: str | None = None,
) -> tuple[int, bytes]:
    """Make one call through the edge; the node key is the member's own where none is given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if one is not None:
        context.load_cert_chain(one.keys / "certificate.pem", one.keys / "tls.key")
        node = one.member.node if node is None else node
    context.load_verify_locations(authority or (one.keys / "authority.pem" if one else None))
    host, port = edge.split(":")
    connection = HTTPSConnection(host, int(port), timeout=10, context=context)
    try:
        headers = {"flwr-public-key": b64encode((node or "").encode()).decode()}
        headers |= {} if head is None else {"x-wardround-head": head}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def address(running: Running) -> str:
    return running.world.authority.manifest().edge


@needs_nginx
def test_nginx_takes_the_configuration(running: Running) -> None:
    checked = nginx(running.edge, "-t")
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr


@needs_nginx
def test_a_member_gets_in_with_every_fleet_call_and_its_bytes_arrive_whole(running: Running) -> None:
    one = member(running)
    body = os.urandom(5 * 2**20 + 4096)  # a chunk of Flower's, and what is around it
    running.calls.clear()
    for name in FLEET_CALLS:
        status, answer = call(one, f"/v1/fleet/{name}", address(running), body=body)
        assert status == 200
        assert answer == body
    assert running.calls == [f"POST /v1/fleet/{name}" for name in FLEET_CALLS]
    found = reach(one)
    assert found.finding.state == "ok"
    assert found.skew is not None
    assert abs(found.skew) < 5
    assert '"site": "st-mary"' in running.log("st-mary")


@needs_nginx
def test_a_head_of_an_audit_log_is_written_down_and_nothing_else_that_stands_there(running: Running) -> None:
    heads = [f"{seq}:{seq:064x}" for seq in (11, 12)]
    for text in (heads[0], f"{heads[0]} DOE^JANE", "DOE^JANE", heads[1]):
        before = len(calls(running.edge.folder))
        assert call(member(running), "/v1/fleet/push-messages", address(running), head=text)[0] == 200
        until(lambda: len(calls(running.edge.folder)) > before, 60, lambda: "nothing is logged")  # noqa: B023
    lines = running.log(heads[1]).encode().splitlines()
    assert [(head.site, str(head)) for head in heads_in(lines)] == [("st-mary", head) for head in heads]
    assert b"DOE" not in b"".join(lines)


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/",
        "/v1/fleet/get-run/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/get-run%2f..%2f..%2fcontrol%2fstart-run",
        "//v1/control/start-run",
        "/v1/fleet/get-run/x",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
def test_nothing_else_reaches_the_superlink(running: Running, path: str) -> None:
    running.calls.clear()
    status, answer = call(member(running), path, address(running))
    assert status == 403
    assert b"nothing else" in answer
    assert running.calls == []


@needs_nginx
def test_other_methods_and_larger_bodies_do_not_reach_it(running: Running) -> None:
    running.calls.clear()
    assert call(member(running), "/v1/fleet/get-run", address(running), method="GET")[0] == 403
    assert call(member(running), "/health", address(running))[0] == 403
    assert call(member(running), "/v1/fleet/push-object", address(running), body=bytes(7 * 2**20))[0] == 413
    assert running.calls == []


@needs_nginx
def test_nobody_gets_in_without_a_certificate(running: Running) -> None:
    running.calls.clear()
    authority = member(running).keys / "authority.pem"
    status, answer = call(None, "/v1/fleet/get-run", address(running), authority=authority)
    assert status == 403
    assert b"no certificate was shown" in answer
    assert running.calls == []
    running.log('"why": "no certificate"')


@needs_nginx
def test_an_expired_certificate_is_refused(running: Running, tmp_path: Path) -> None:
    one = with_certificate(member(running), running.world.authority, tmp_path, name="st-mary", days=-5 / 1440)
    finding = reach(one).finding
    assert finding.state == "fail"
    assert "certificate has expired" in finding.text
    running.log("FAILED:certificate has expired")


@needs_nginx
def test_a_certificate_of_another_authority_is_refused(running: Running, tmp_path: Path) -> None:
    other = new_world(tmp_path / "other").authority
    one = with_certificate(member(running), other, tmp_path / "keys", name="st-mary")
    finding = reach(one).finding
    assert finding.state == "fail"
    assert "unable to verify the first certificate" in finding.text or "certificate signature failure" in finding.text
    running.log("FAILED:")


@needs_nginx
def test_a_server_certificate_is_no_site(running: Running, tmp_path: Path) -> None:
    one = member(running)
    shutil.copytree(one.keys, tmp_path, dirs_exist_ok=True)
    public = ec_public(one.member.tls)
    certificate = issue_server(running.world.authority.issuer, ["st-mary"], public, NOW)
    (tmp_path / "certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    finding = reach(replace(one, keys=tmp_path)).finding
    assert finding.state == "fail"
    assert "purpose" in finding.text


@needs_nginx
def test_a_certificate_that_was_never_in_the_manifest_is_refused(running: Running, tmp_path: Path) -> None:
    # A name of nobody, issued by the right authority: the wrong name.
    one = with_certificate(member(running), running.world.authority, tmp_path, name="nobody")
    finding = reach(one).finding
    assert finding.state == "fail"
    assert "not in the manifest" in finding.text
    running.log('"why": "revoked"')


@needs_nginx
def test_the_node_key_of_another_site_is_refused(running: Running) -> None:
    running.calls.clear()
    other = member(running, "uni-2").member.node
    for node in (other, "", "x"):
        status, answer = call(member(running), "/v1/fleet/pull-messages", address(running), node=node)
        assert status == 403
        assert b"not the one that the manifest has for st-mary" in answer
    assert running.calls == []
    running.log('"why": "node key"')


@needs_nginx
def test_tls_1_2_is_refused(running: Running) -> None:
    one = member(running)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(one.keys / "authority.pem")
    host, port = address(running).split(":")
    with socket.create_connection((host, int(port)), 5) as raw, pytest.raises(ssl.SSLError) as error:
        context.wrap_socket(raw, server_hostname=host)
    assert "PROTOCOL_VERSION" in str(error.value)
    running.log("unsupported protocol")


@needs_nginx
def test_plain_http_is_refused(running: Running) -> None:
    host, port = address(running).split(":")
    with socket.create_connection((host, int(port)), 5) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


@needs_nginx
def test_revocation_and_rotation_hold_from_the_reload_on(tmp_path: Path) -> None:
    world = new_world(tmp_path, "st-mary", "uni-2", edge=f"localhost:{free_port()}")
    with started(world, tmp_path / "nginx") as edge:
        one, two = member(edge), member(edge, "uni-2")
        assert reach(one).finding.state == reach(two).finding.state == "ok"

        world.authority.publish(members.remove(world.authority.manifest(), "st-mary", NOW))
        kit = enrol(world.authority, store.rotate(world.sites["uni-2"], NOW + timedelta(seconds=1)))
        write_edge(world.authority, edge.edge, NOW)
        edge.reload()
        old_keys = tmp_path / "old"
        shutil.copytree(two.keys, old_keys)
        store.join(world.sites["uni-2"], kit, None, NOW)
        assert "not in the manifest" in reach(one).finding.text
        assert "not in the manifest" in reach(replace(two, keys=old_keys)).finding.text
        assert reach(member(edge, "uni-2")).finding.state == "ok"
        edge.log('"why": "revoked"')


@needs_nginx
def test_a_certificate_of_the_edge_that_is_not_good_is_refused_and_both_ends_say_why(tmp_path: Path) -> None:
    world = new_world(tmp_path, "st-mary", edge=f"localhost:{free_port()}")
    key = load_tls_private((tmp_path / "consortium" / "authority.key").read_bytes())
    other = new_world(tmp_path / "other").authority
    cases = {
        "has ended": (
            issue_server(world.authority.issuer, ["localhost"], key.public_key(), NOW, -5 / 1440),
            "alert certificate expired",
        ),
        "for another name": (
            issue_server(world.authority.issuer, ["elsewhere"], key.public_key(), NOW),
            "alert bad certificate",
        ),
        "is not the consortium's": (
            issue_server(other.issuer, ["localhost"], key.public_key(), NOW),
            "alert unknown ca",
        ),
    }
    for number, (words, (certificate, alert)) in enumerate(cases.items()):
        with started(world, tmp_path / str(number)) as edge:
            (edge.edge.folder / "edge.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
            shutil.copy(tmp_path / "consortium" / "authority.key", edge.edge.folder / "edge.key")
            edge.reload()
            assert words in reach(member(edge)).finding.text
            edge.log(alert)
            assert edge.calls == ["GET /health"] * len(edge.calls)


@needs_nginx
def test_the_edge_asks_the_superlink_for_its_certificate_too(tmp_path: Path) -> None:
    world = new_world(tmp_path, "st-mary", edge=f"localhost:{free_port()}")
    with started(world, tmp_path / "nginx") as edge:
        assert reach(member(edge)).finding.state == "ok"
    impostor = new_world(tmp_path / "impostor").authority
    write_edge(impostor, replace(edge.edge, folder=tmp_path / "theirs"), NOW)
    write_edge(world.authority, edge.edge, NOW)
    with superlink(tmp_path / "theirs", int(edge.edge.superlink.split(":")[1])) as calls:
        assert nginx(edge.edge).returncode == 0
        try:
            finding = reach(member(edge)).finding
        finally:
            nginx(edge.edge, "-s", "stop")
        assert "SuperLink behind it is not" in finding.text
        assert "upstream SSL certificate verify error" in (edge.edge.folder / "error.log").read_text()
        assert calls == []


def test_a_site_says_what_is_wrong_with_the_edge(tmp_path: Path) -> None:
    port = free_port()
    world = new_world(tmp_path, "st-mary", edge=f"localhost:{port}")
    one = joined(world.sites["st-mary"], NOW)
    assert "nothing listens" in reach(one).finding.text

    other = new_world(tmp_path / "other").authority
    public = world.authority.key.public_key()
    key = tmp_path / "edge.key"
    shutil.copy(world.authority.folder / "authority.key", key)
    cases = {
        "has ended": issue_server(world.authority.issuer, ["localhost"], public, NOW, -5 / 1440),
        "for another name": issue_server(world.authority.issuer, ["elsewhere.example"], public, NOW),
        "is not the consortium's": issue_server(other.issuer, ["localhost"], public, NOW),
    }
    for words, certificate in cases.items():
        (tmp_path / "superlink.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
        shutil.copy(key, tmp_path / "superlink.key")
        with superlink(tmp_path, port):
            finding = reach(one).finding
        assert finding.state == "fail"
        assert words in finding.text
        assert finding.remedy


def test_the_edge_of_no_tls_1_3_is_refused_by_the_site(tmp_path: Path) -> None:
    port = free_port()
    world = new_world(tmp_path, "st-mary", edge=f"localhost:{port}")
    edge = Edge(tmp_path / "edge", f"127.0.0.1:{port}", "127.0.0.1:9")
    write_edge(world.authority, edge, NOW)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(edge.folder / "edge.pem", edge.folder / "edge.key")
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with raw, pytest.raises(ssl.SSLError):
                context.wrap_socket(raw, server_side=True)

        thread = Thread(target=serve)
        thread.start()
        finding = reach(joined(world.sites["st-mary"], NOW)).finding
        thread.join()
    assert "does not speak TLS 1.3" in finding.text


def test_certificates_of_servers_are_kept_until_they_near_their_end(tmp_path: Path) -> None:
    world = new_world(tmp_path, "st-mary")
    edge = Edge(tmp_path / "edge", "127.0.0.1:8443", "10.0.0.2:8000")
    assert "edge.pem" in {path.name for path in write_edge(world.authority, edge, NOW)}
    assert {path.name for path in write_edge(world.authority, edge, NOW)} == {"authority.pem", "nginx.conf"}
    again = {path.name for path in write_edge(world.authority, edge, NOW + timedelta(days=61))}
    assert again == {"authority.pem", "nginx.conf", "edge.pem", "superlink.pem"}
    other = {path.name for path in write_edge(world.authority, replace(edge, superlink="10.0.0.3:8000"), NOW)}
    assert "superlink.pem" in other
    assert (edge.folder / "edge.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("address", ["localhost", "host:0", "host:70000", "a b:1", 'x";:1', "host:8000;", ""])
def test_what_is_no_address_does_not_get_into_the_configuration(tmp_path: Path, address: str) -> None:
    world = new_world(tmp_path)
    for edge in (Edge(tmp_path / "e", address, "localhost:1"), Edge(tmp_path / "e", "localhost:1", address)):
        with pytest.raises(MembershipError):
            write_edge(world.authority, edge, NOW)
    assert not (tmp_path / "e" / "nginx.conf").exists()


def test_the_configuration_names_its_manifest(tmp_path: Path) -> None:
    world = new_world(tmp_path, "st-mary")
    manifest = world.authority.manifest()
    text = nginx_conf(manifest, Edge(tmp_path, "0.0.0.0:8443", "127.0.0.1:8000"))
    assert f"manifest epoch {manifest.epoch}" in text
    assert json.dumps(manifest.sites[0].serial) in text
