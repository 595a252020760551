"""MAML: the exact gradient of the query loss through the inner loop."""

from typing import ClassVar

from common.meta.learner import InnerLoop

__all__ = ["Maml"]


class Maml(InnerLoop):
    """Every parameter adapts; the meta-gradient keeps every second-order term.

    References
    ----------
    Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, algorithm 1.
    """

    name: ClassVar[str] = "maml"
