"""The mean, which is added up as replies come."""

import numpy as np
from numpy.typing import NDArray

from common.contract import Vector

__all__ = ["Mean"]


class Mean:
    """The weighted mean of vectors, added in float64 in the order in which they come.

    The caller adds in a fixed site order: the same replies then give the same bits. Memory is one vector, however
    many sites there are. One hostile site moves a mean anywhere.
    """

    def __init__(self, size: int) -> None:
        self._total: NDArray[np.float64] = np.zeros(size, np.float64)
        self._weights = 0.0
        self.count = 0

    def add(self, vector: Vector, weight: float = 1.0) -> None:
        """Add one site's vector ``[D]``, with its weight of the study."""
        # In float64 before the weight counts: a Python float would leave a float32 vector as it is.
        self._total += np.multiply(vector, weight, dtype=np.float64)
        self._weights += weight
        self.count += 1

    def result(self) -> NDArray[np.float64]:
        """Return the mean ``[D]`` of at least one vector."""
        return self._total / self._weights
