"""The outer optimiser: one `torch.optim` instance over theta, kept for the whole run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
        self._clip, self._decay, self._steps = outer.clip, outer.average, 0
        self._average = torch.zeros(theta.size if outer.average else 0, dtype=torch.float64)

    @property
    def theta(self) -> Vector:
        """Theta now, ``[D]``."""
        out: Vector = self._theta.detach().numpy()
        return out

    @property
    def published(self) -> Vector:
        """The theta to evaluate and to keep, ``[D]``: the moving average where the study asks for one.

        It is ``sum_i (1 - d) d^(t - i) theta_i / (1 - d^t)`` over the t steps so far: the initial theta has no part in
        it, as in Adam's bias correction (Kingma and Ba 2015, section 3).
        """
        if not self._decay or not self._steps:
            return self.theta
        out: Vector = (self._average / (1 - self._decay**self._steps)).to(self._theta.dtype).numpy()
        return out

    def step(self, gradient: NDArray[np.float64]) -> None:
        """Take one outer step along a meta-gradient ``[D]``, shortened to ``outer.clip`` where it is longer."""
        norm = float((gradient**2).sum() ** 0.5)
        if self._clip and norm > self._clip:
            gradient = gradient * (self._clip / norm)
        self._theta.grad = torch.from_numpy(gradient).to(self._theta.dtype)
        self._optimiser.step()
        if self._schedule is not None:
            self._schedule.step()
        self._steps += 1
        if self._decay:
            self._average.mul_(self._decay).add_(self._theta.detach().double(), alpha=1 - self._decay)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the next step depends on: tensors by name, and the rest as JSON."""
        optimiser = self._optimiser.state_dict()
        moments: Mapping[str, Any] = optimiser["state"].get(0, {})
        tensors = {f"moment.{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
        about = {"group": optimiser["param_groups"][0], "steps": self._steps}
        if self._schedule is not None:
            about["schedule"] = self._schedule.state_dict()
        return {"theta": self._theta.detach(), "average": self._average, **tensors}, about

    def restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Go on from an earlier `state` of the same study."""
        with torch.no_grad():
            self._theta.copy_(tensors["theta"])
        self._average = tensors["average"].clone()
        moments = {n.removeprefix("moment."): t.clone() for n, t in tensors.items() if n.startswith("moment.")}
        state = {0: moments} if moments else {}
        self._optimiser.load_state_dict({"state": state, "param_groups": [dict(about["group"])]})
        if self._schedule is not None:
            self._schedule.load_state_dict(dict(about["schedule"]))
        self._steps = int(about["steps"])
