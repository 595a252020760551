"""How checked replies become one meta-gradient."""

import numpy as np
from numpy.typing import NDArray

from common.contract import Vector

__all__ = ["Mean"]


class Mean:
    """The mean of vectors, added in float64 in the order in which they come.

    The caller adds in a fixed site order: the same replies then give the same bits. Memory is one vector, however
    many sites there are.
    """

    def __init__(self, size: int) -> None:
        self._total: NDArray[np.float64] = np.zeros(size, np.float64)
        self.count = 0

    def add(self, vector: Vector) -> None:
        """Add one site's vector ``[D]``; every site has the same weight."""
        self._total += vector
        self.count += 1

    def result(self) -> NDArray[np.float64]:
        """Return the mean ``[D]`` of at least one vector."""
        return self._total / self.count
