"""Addresses that processes listen at: ``host:port``, or a socket's path."""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress

from common.errors import ServiceError

__all__ = ["answers", "must_be_free"]


async def answers(address: str) -> bool:
    """Say whether something can be connected to at an address."""
    host, _, port = address.rpartition(":")
    try:
        if address.startswith("/"):
            _, writer = await asyncio.open_unix_connection(address)
        else:
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    writer.close()
    return True


def must_be_free(addresses: Mapping[str, str]) -> None:
    """Check that nobody listens at some addresses yet.

    Parameters
    ----------
    addresses : mapping
        From an option's name to the address that it has.

    Raises
    ------
    ServiceError
        Nothing can listen at one of them; the option is in the text.
    """
    for option, address in addresses.items():
        try:
            _try_socket(address) if address.startswith("/") else _try_port(address)
        except (OSError, ValueError, OverflowError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ServiceError(
                f"nothing can listen at {address} ({why}): is this running already? {option} takes another address"
            ) from None


def _try_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)
        probe.listen()


def _try_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe, suppress(FileNotFoundError, ConnectionRefusedError):
        probe.connect(path)
        raise ValueError("somebody does")
