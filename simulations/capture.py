"""What comes in at a network interface of Linux: counted by where it goes to, nothing of its content kept."""

import ipaddress
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

__all__ = ["NEIGHBOURS", "Capture", "To", "capture", "to_whom"]

_ALL_PROTOCOLS = 3  # ETH_P_ALL
_OUTGOING = 4  # PACKET_OUTGOING
_STATISTICS = (263, 6)  # SOL_PACKET, PACKET_STATISTICS
_ENOUGH = 128  # bytes of a frame that are looked at
_BUFFER = 2**25

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
#: Of ICMPv6: neighbours and routers looked for, and which groups a host listens to.
_DISCOVERY = {130, 131, 132, 133, 134, 135, 136, 143}


class To(NamedTuple):
    """Where a packet goes to: the protocol, the address, and the port or 0."""

    protocol: str
    address: str = ""
    port: int = 0

    def __str__(self) -> str:
        return " ".join(str(part) for part in self if part)


#: ARP and neighbour discovery, which the kernels at the ends of a cable do by themselves.
NEIGHBOURS = To("neighbours")


class Capture:
    """A running count of packets, by where they go to.

    Parameters
    ----------
    one : socket
        A packet socket that is bound to the interface.
    """

    def __init__(self, one: socket.socket) -> None:
        self._socket, self._lock, self._over = one, threading.Lock(), False
        self._packets: Counter[To] = Counter()
        self._octets: Counter[To] = Counter()

    def packets(self) -> Counter[To]:
        """Return how many came."""
        with self._lock:
            return self._packets.copy()

    def octets(self) -> Counter[To]:
        """Return how many bytes they had."""
        with self._lock:
            return self._octets.copy()

    def forget(self) -> None:
        """Count anew."""
        with self._lock:
            self._packets.clear()
            self._octets.clear()

    def missed(self) -> int:
        """Return how many packets the kernel could not hand over since it was asked last."""
        found = self._socket.getsockopt(*_STATISTICS, 8)
        return int.from_bytes(found[4:8], sys.byteorder)

    def count(self) -> None:
        """Count what comes, until the end."""
        frame = bytearray(_ENOUGH)
        while not self._over:
            with suppress(TimeoutError):
                size, origin = self._socket.recvfrom_into(frame, 0, socket.MSG_TRUNC)
                if origin[2] != _OUTGOING:
                    to = to_whom(bytes(frame[:size]))
                    with self._lock:
                        self._packets[to] += 1
                        self._octets[to] += size

    def end(self) -> None:
        """Let `count` return soon."""
        self._over = True


@contextmanager
def capture(interface: str) -> Iterator[Capture]:
    """Count what comes in at an interface of this network namespace.

    Raises
    ------
    OSError
        There is no such interface, or the rights are missing (CAP_NET_RAW).
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        one.settimeout(0.2)
        one.bind((interface, _ALL_PROTOCOLS))
        found = Capture(one)
        thread = threading.Thread(target=found.count)
        thread.start()
        try:
            yield found
        finally:
            found.end()
            thread.join()


def to_whom(frame: bytes) -> To:
    """Return where an Ethernet frame goes to, from its first bytes."""
    kind, packet = int.from_bytes(frame[12:14]), frame[14:]
    if kind == 0x0806:
        return NEIGHBOURS
    if kind == 0x0800:
        number, address, rest = packet[9], packet[16:20], packet[4 * (packet[0] & 15) :]
        if int.from_bytes(packet[6:8]) & 0x1FFF:  # not the first piece of a packet: it has no ports
            rest = b""
    elif kind == 0x86DD:
        number, address, rest = packet[6], packet[24:40], packet[40:]
        if number == 0:  # options for every hop, as multicast listeners send them
            number, rest = rest[0], rest[8 * (rest[1] + 1) :]
        if number == 58 and rest and rest[0] in _DISCOVERY:
            return NEIGHBOURS
    else:
        return To(f"ethernet {kind:#06x}")
    port = int.from_bytes(rest[2:4]) if number in (6, 17) else 0
    return To(_PROTOCOLS.get(number, f"ip {number}"), str(ipaddress.ip_address(address)), port)
