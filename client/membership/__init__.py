"""A site's keys, and its place in a consortium."""

from client.membership.check import examine
from client.membership.edge import Reached, reach
from client.membership.store import Joined, create, join, joined, rotate, update

__all__ = ["Joined", "Reached", "create", "examine", "join", "joined", "reach", "rotate", "update"]
