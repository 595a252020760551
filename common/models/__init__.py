"""Networks as functions of their parameters, and the one way to build them."""

from common.models.network import Network, Theta
from common.models.registry import build, untrained

__all__ = ["Network", "Theta", "build", "untrained"]
