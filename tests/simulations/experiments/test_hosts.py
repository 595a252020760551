"""What leaves a hospital on a host of its own, and whether it would be seen if it were something else."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.capture import NEIGHBOURS, To, to_whom
from tests.server.consortium.test_edge import needs_nginx

ETHERNET = bytes(12)
TO = socket.inet_aton("192.0.2.53")


def ipv4(protocol: int, rest: bytes, *, words: int = 5, offset: int = 0) -> bytes:
    head = bytes([0x40 | words, 0, 0, 0, 0, 0, *offset.to_bytes(2), 64, protocol, 0, 0, 127, 0, 0, 1]) + TO
    return ETHERNET + b"\x08\x00" + head + bytes(4 * (words - 5)) + rest


def ipv6(protocol: int, rest: bytes) -> bytes:
    head = bytes([0x60, 0, 0, 0, 0, 0, protocol, 1]) + bytes(16) + socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    return ETHERNET + b"\x86\xdd" + head + rest


PORTS = (40000).to_bytes(2) + (53).to_bytes(2) + bytes(4)


@pytest.mark.parametrize(
    ("frame", "to"),
    [
        (ipv4(17, PORTS), To("udp", "192.0.2.53", 53)),
        (ipv4(6, PORTS, words=8), To("tcp", "192.0.2.53", 53)),
        (ipv4(17, PORTS, offset=185), To("udp", "192.0.2.53")),
        (ipv4(1, PORTS), To("icmp", "192.0.2.53")),
        (ipv4(47, PORTS), To("ip 47", "192.0.2.53")),
        (ipv6(17, PORTS), To("udp", "2001:db8::1", 53)),
        (ipv6(58, bytes([128, 0, 0, 0])), To("icmpv6", "2001:db8::1")),
        (ipv6(58, bytes([135, 0, 0, 0])), NEIGHBOURS),
        (ipv6(0, bytes([58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0])), NEIGHBOURS),
        (ETHERNET + b"\x08\x06" + bytes(28), NEIGHBOURS),
        (ETHERNET + b"\x88\xcc" + bytes(28), To("ethernet 0x88cc")),
    ],
)
def test_where_a_packet_goes_to(frame: bytes, to: To) -> None:
    assert to_whom(frame) == to


@needs_nginx
@pytest.mark.slow
@pytest.mark.waits
@pytest.mark.timeout(1800)
def test_a_hospital_talks_to_the_edge_alone_and_without_its_gateway_to_nobody(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    command = [sys.executable, "-m", "simulations.experiments.hosts", "--sites", "1", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=1500, check=False)
    if "no network namespace can be made here" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    (site,) = found["sites"].values()
    assert site["to_the_edge"] > 100
    assert site["elsewhere"] == {}
    assert site["alive"] > 0
    assert site["after"] == site["missed"] == 0
    # The same eyes see a question to a DNS server and a connection to somebody else.
    (seen,) = found["on_purpose"].values()
    assert {"udp 192.0.2.53 53", "tcp 198.51.100.7 443"} <= set(seen)
