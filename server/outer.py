"""The outer optimiser: one `torch.optim` instance over theta, kept for the whole run."""

import numpy as np
import torch
from numpy.typing import NDArray

from common.contract import Vector
from common.study import Outer

__all__ = ["OuterOptimiser"]


class OuterOptimiser:
    """Steps theta along aggregated meta-gradients.

    Theta is one vector: Adam and SGD work element by element, so the result is that of separate tensors.

    Parameters
    ----------
    outer : Outer
        The study's section.
    theta : ndarray
        Initial theta ``[D]``; its type is kept.
    rounds : int
        How many steps there will be: the length of the schedule.
    """

    def __init__(self, outer: Outer, theta: Vector, rounds: int) -> None:
        self._theta = torch.nn.Parameter(torch.from_numpy(theta.copy()))
        self._optimiser: torch.optim.Optimizer
        if outer.optimiser == "sgd":
            self._optimiser = torch.optim.SGD([self._theta], lr=outer.rate, momentum=outer.momentum)
        else:
            kind = torch.optim.Adam if outer.optimiser == "adam" else torch.optim.AdamW
            self._optimiser = kind([self._theta], lr=outer.rate)
        self._schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, max(rounds, 1))
            if outer.schedule == "cosine"
            else None
        )

    @property
    def theta(self) -> Vector:
        """Theta now, ``[D]``."""
        out: Vector = self._theta.detach().numpy()
        return out

    def step(self, gradient: NDArray[np.float64]) -> None:
        """Take one outer step along a meta-gradient ``[D]``."""
        self._theta.grad = torch.from_numpy(gradient).to(self._theta.dtype)
        self._optimiser.step()
        if self._schedule is not None:
            self._schedule.step()
