"""The coordinator's authority over who belongs to the consortium."""

from server.consortium.authority import Authority, changing, found, open_authority

__all__ = ["Authority", "changing", "found", "open_authority"]
